package state

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	connectTimeout = 5 * time.Second
	pingInterval   = time.Second // a server that is cut off or frozen is left for another one after pingsMissed of them
	pingsMissed    = 2
	reconnectWait  = 100 * time.Millisecond // between attempts on one server, plus jitter
)

// connect dials the embedded server, or the cluster where there is none. From then on the connection mends itself,
// and each time it has, reconnected gets a word. Nothing is buffered while it is broken: calls fail at once.
func connect(opts Options, in *embedded, reconnected chan<- struct{}) (*nats.Conn, error) {
	log := opts.Logger
	with := []nats.Option{
		nats.Name("culvert-coordinator"),
		nats.Timeout(connectTimeout),
		nats.MaxReconnects(-1),
		nats.PingInterval(pingInterval),
		nats.MaxPingsOutstanding(pingsMissed),
		nats.ReconnectWait(reconnectWait),
		nats.ReconnectJitter(reconnectWait, reconnectWait),
		nats.ReconnectBufSize(-1),
		nats.IgnoreAuthErrorAbort(), // credentials may be renewed in place
		nats.DisconnectErrHandler(func(c *nats.Conn, err error) {
			if !c.IsClosed() {
				log.Warn("lost the connection to nats", "err", err)
			}
		}),
		nats.ReconnectHandler(func(*nats.Conn) {
			log.Info("connected to nats again")
			select {
			case reconnected <- struct{}{}:
			default: // one word is waiting already
			}
		}),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { log.Warn("nats reports", "err", err) }),
	}
	if in != nil {
		conn, err := nats.Connect("", append(with, nats.InProcessServer(in.server))...)
		if err != nil {
			return nil, fmt.Errorf("connect to the embedded nats server: %w", err)
		}
		return conn, nil
	}
	if opts.Credentials != "" {
		if _, err := os.Stat(opts.Credentials); err != nil {
			return nil, problem.Wrap(err, problem.BadConfig, "the nats credentials file of state cannot be read",
				"check that it exists and that this program may read it")
		}
		with = append(with, nats.UserCredentials(opts.Credentials))
	}
	conn, err := nats.Connect(strings.Join(opts.NATS, ","), with...)
	switch {
	case err == nil:
		return conn, nil
	case errors.Is(err, nats.ErrAuthorization), errors.Is(err, nats.ErrAuthExpired):
		return nil, problem.Wrap(err, problem.BadConfig, "nats refused this coordinator", "check the credentials of state")
	default:
		return nil, problem.Wrap(err, problem.Unreachable, "no nats server of state answers",
			"check that one of the URLs is up and can be reached from here")
	}
}

const (
	startPatience = time.Minute // for a cluster that was started together with us, or has just lost a server
	startRetry    = 250 * time.Millisecond
)

// patiently does f again while JetStream has no leader.
func patiently(ctx context.Context, log *slog.Logger, f func() error) error {
	warned := false
	for deadline := time.Now().Add(startPatience); ; {
		err := f()
		if err == nil || !leaderless(err) || ctx.Err() != nil || time.Now().After(deadline) {
			return err
		}
		if !warned {
			log.Warn("nats is not ready yet", "err", err)
			warned = true
		}
		select {
		case <-time.After(startRetry):
		case <-ctx.Done():
			return err
		}
	}
}

// leaderless reports whether an error is what JetStream says, or keeps silent with, while it elects a leader.
func leaderless(err error) bool {
	if apiErr, ok := errors.AsType[*jetstream.APIError](err); ok {
		return apiErr.Code == http.StatusServiceUnavailable
	}
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrTimeout) || errors.Is(err, nats.ErrNoResponders) ||
		errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, nats.ErrConnectionReconnecting) || errors.Is(err, nats.ErrDisconnected)
}
