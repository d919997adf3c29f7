package state

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

const (
	replicas = 3

	// gatherTime is how long a cluster that was started just now has for its servers to know each other.
	gatherTime = 10 * time.Second

	// noPeers is NATS's code for a stream that wants more servers than the cluster knows of.
	noPeers = 10005
)

// findOrMake gives a stream, with three replicas where there is a cluster that can, one elsewhere. One that was made when the cluster could not
// is given them now.
func findOrMake(ctx context.Context, js jetstream.JetStream, clustered bool, log *slog.Logger, config jetstream.StreamConfig) (jetstream.Stream, error) {
	stream, err := js.Stream(ctx, config.Name)
	missing := errors.Is(err, jetstream.ErrStreamNotFound)
	if err != nil && !missing {
		return nil, err
	}
	if !clustered && missing {
		return js.CreateStream(ctx, config)
	}
	if !clustered || (!missing && stream.CachedInfo().Config.Replicas >= replicas) {
		return stream, nil
	}
	var made jetstream.Stream
	config.Replicas = replicas
	if missing {
		made, err = gathered(ctx, log, func() (jetstream.Stream, error) { return js.CreateStream(ctx, config) })
	} else {
		config = stream.CachedInfo().Config
		config.Replicas = replicas
		made, err = js.UpdateStream(ctx, config)
	}
	if err == nil || leaderless(err) { // it may come to be all the same: whoever asks again finds it
		return made, err
	}
	log.Warn("a stream is not replicated: nats did not make three replicas; give the cluster three servers with JetStream, and restart a coordinator",
		"stream", config.Name, "err", err)
	if !missing {
		return stream, nil
	}
	config.Replicas = 1
	return js.CreateStream(ctx, config)
}

// gathered does f again while the cluster's servers do not know each other yet.
func gathered(ctx context.Context, log *slog.Logger, f func() (jetstream.Stream, error)) (jetstream.Stream, error) {
	deadline := time.Now().Add(gatherTime)
	for {
		stream, err := f()
		api, ok := errors.AsType[*jetstream.APIError](err)
		if !ok || api.ErrorCode != noPeers || time.Now().After(deadline) {
			return stream, err
		}
		log.Debug("nats knows too few servers yet", "err", err)
		select {
		case <-time.After(lastAgain):
		case <-ctx.Done():
			return nil, err
		}
	}
}
