package state

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/nats-io/nats.go"
)

const (
	connectTimeout = 5 * time.Second
	redialTimeout  = time.Second            // of one server of a cluster: one that is cut off answers nobody, and others wait for their turn
	pingInterval   = 600 * time.Millisecond // a cluster's server that is cut off or frozen is left for another one after pingsMissed of them
	pingsMissed    = 2
	reconnectWait  = 100 * time.Millisecond // between attempts on one server, plus jitter
)

// connect dials the embedded server, or the cluster where there is none. From then on the connection mends itself,
// and each time it has, reconnected gets a word. Nothing is buffered while it is broken: calls fail at once. What more says goes before what is usual.
func connect(opts Options, in *embedded, reconnected chan<- struct{}, more ...nats.Option) (*nats.Conn, error) {
	log := opts.Logger
	with := []nats.Option{
		nats.Name("culvert-coordinator"),
		nats.MaxReconnects(-1),
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
		conn, err := nats.Connect("", append(with, nats.Timeout(connectTimeout), nats.InProcessServer(in.server))...)
		if err != nil {
			return nil, fmt.Errorf("connect to the embedded nats server: %w", err)
		}
		return conn, nil
	}
	with = append(with, nats.Timeout(redialTimeout), nats.PingInterval(pingInterval), nats.MaxPingsOutstanding(pingsMissed))
	if opts.Credentials != "" {
		who, err := identity(opts.Credentials)
		if err != nil {
			return nil, err
		}
		with = append(with, who)
	}
	conn, err := nats.Connect(strings.Join(opts.NATS, ","), append(with, more...)...)
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

// identity says who we are to nats by a file with a user's JWT and seed, or with the seed of an nkey alone.
func identity(file string) (nats.Option, error) {
	data, err := os.ReadFile(file)
	if err == nil && !bytes.Contains(data, []byte("NATS USER JWT")) {
		var who nats.Option
		if who, err = nats.NkeyOptionFromSeed(file); err == nil {
			return who, nil
		}
	}
	clear(data)
	if err != nil {
		return nil, problem.Wrap(err, problem.BadConfig, "a nats credentials file of state cannot be read",
			"check that it exists, that this program may read it, and that it holds a user's credentials or an nkey's seed")
	}
	return nats.UserCredentials(file), nil
}
