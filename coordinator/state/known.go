package state

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/culvertnet/culvert/internal/wire"
)

const (
	knownPrefix = subjects + "known."

	// knownTTL is how long a gateway's key is remembered after it was last seen, and knownFresh how old that memory may get
	// before a gateway that is seen again renews it.
	knownTTL   = 90 * 24 * time.Hour
	knownFresh = 24 * time.Hour
)

// GatewayKey remembers the WireGuard key of a gateway by its network and name, and gives the one that it had before: the zero
// key where it was not known.
func (s *Store) GatewayKey(ctx context.Context, network, name string, key wire.Key) (before wire.Key, err error) {
	subject := knownPrefix + token(network) + "." + token(name)
	for range maxRaces {
		var revision uint64
		msg, err := s.bucket.stream.GetLastMsgForSubject(ctx, subject)
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			before = wire.Key{}
		case err != nil:
			return wire.Key{}, fmt.Errorf("read a gateway's key: %w", err)
		default:
			revision = msg.Sequence
			if before.UnmarshalText(msg.Data) != nil { // a marker that it has expired
				before = wire.Key{}
			}
			if before == key && time.Since(msg.Time) < knownFresh {
				return before, nil
			}
		}
		_, err = s.bucket.js.PublishMsg(ctx, &nats.Msg{Subject: subject, Data: []byte(key.String())},
			jetstream.WithExpectLastSequencePerSubject(revision), jetstream.WithMsgTTL(knownTTL))
		if err == nil {
			return before, nil
		}
		if !wrongRevision(err) {
			return wire.Key{}, fmt.Errorf("remember a gateway's key: %w", err)
		}
	}
	return wire.Key{}, ErrConflict
}
