package state

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/culvertnet/culvert/internal/problem"
)

const (
	aliveEvery = 100 * time.Millisecond // between a server's answer and the next question
	aliveCall  = 300 * time.Millisecond // for a server to answer: one that takes longer is frozen, or cut off from here
)

// panel is a connection to each server of a cluster, of the user that may ask for elections. Each is asked all the time whether its server lives. So the
// loss of one is known soon, whoever calls; and when members have to be asked there is nothing left to connect, and what each server's connection brings
// tells which members that server reaches.
type panel struct {
	seats []*seat
	lost  chan struct{} // a word when a server is lost
}

// seat is one of these connections.
type seat struct {
	conn  *nats.Conn
	host  string // in the server's URL
	lives atomic.Bool
	peer  atomic.Pointer[string] // the server's name in Raft, once it is known
	lost  chan<- struct{}
}

// newPanel connects to all servers; to those that do not answer it goes on trying. nil where there is no user for it.
func newPanel(opts Options) (*panel, error) {
	if opts.Elections == "" {
		return nil, nil
	}
	lost := make(chan struct{}, 1)
	p := &panel{lost: lost, seats: make([]*seat, len(opts.NATS))}
	failed := make([]error, len(opts.NATS))
	var dialing sync.WaitGroup
	for i, server := range opts.NATS {
		dialing.Go(func() {
			p.seats[i] = &seat{lost: lost}
			failed[i] = p.seats[i].connect(opts, server)
		})
	}
	dialing.Wait()
	if err := errors.Join(failed...); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// connect takes a seat at a server, and at no other one, unless only one URL is known.
func (s *seat) connect(opts Options, server string) error {
	if u, err := url.Parse(server); err == nil {
		s.host = u.Host
	}
	with := []nats.Option{
		nats.DisconnectErrHandler(func(*nats.Conn, error) { s.note(false) }),
		nats.ReconnectHandler(func(*nats.Conn) {}), // the main connection's are logged
	}
	if len(opts.NATS) > 1 {
		with = append(with, nats.IgnoreDiscoveredServers())
	}
	of := Options{NATS: []string{server}, Credentials: opts.Elections, Logger: opts.Logger}
	var err error
	s.conn, err = connect(of, nil, nil, with...)
	if p, ok := errors.AsType[*problem.Error](err); ok && p.Code == problem.Unreachable {
		s.conn, err = connect(of, nil, nil, append(with, nats.RetryOnFailedConnect(true))...)
	}
	if err == nil {
		s.note(s.conn.IsConnected())
	}
	return err
}

// run asks all servers whether they live, until ctx ends.
func (p *panel) run(ctx context.Context) {
	var asking sync.WaitGroup
	for _, s := range p.seats {
		asking.Go(func() {
			for ctx.Err() == nil {
				s.note(s.answers(ctx))
				pause(ctx, aliveEvery)
			}
		})
	}
	asking.Wait()
}

// close ends the connections.
func (p *panel) close() {
	if p == nil {
		return
	}
	for _, s := range p.seats {
		if s.conn != nil {
			s.conn.Close()
		}
	}
}

// answers reports whether the server answers in time.
func (s *seat) answers(ctx context.Context) bool {
	if !s.conn.IsConnected() {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, aliveCall)
	defer cancel()
	return s.conn.FlushWithContext(ctx) == nil
}

// note takes whether the server lives.
func (s *seat) note(lives bool) {
	if lives {
		if name := s.conn.ConnectedServerName(); name != "" {
			peer := peerOf(name)
			s.peer.Store(&peer)
		}
	}
	if !s.lives.Swap(lives) || lives {
		return
	}
	select {
	case s.lost <- struct{}{}:
	default: // one word is waiting already
	}
}

// living gives the seats whose servers live, as far as is known.
func (p *panel) living() (out []*seat) {
	for _, s := range p.seats {
		if s.lives.Load() {
			out = append(out, s)
		}
	}
	return out
}

// dead gives the members whose servers do not live, as far as there is a seat at them.
func (p *panel) dead() map[string]bool {
	out := map[string]bool{}
	for _, s := range p.seats {
		if peer := s.peer.Load(); peer != nil && !s.lives.Load() {
			out[*peer] = true
		}
	}
	return out
}

// first gives a connection to a server that lives and is not left out, if there is one.
func (p *panel) first(out func(peer string) bool) *nats.Conn {
	for _, s := range p.living() {
		if peer := s.peer.Load(); peer == nil || !out(*peer) {
			return s.conn
		}
	}
	return p.seats[0].conn
}

// all leaves nobody out.
func all(string) bool { return false }

// publish says the same through every server that lives, but those that are left out.
func (p *panel) publish(subject string, data []byte, out func(peer string) bool) {
	for _, s := range p.living() {
		if peer := s.peer.Load(); peer == nil || !out(*peer) {
			_ = s.conn.Publish(subject, data) // an error says that the connection is broken
		}
	}
}

// connectBeside is connect, for leases or log; where there is a panel that has the connection go to a server that lives when it loses its own.
func connectBeside(p *panel, opts Options, in *embedded, reconnected chan<- struct{}) (*nats.Conn, error) {
	if p == nil {
		return connect(opts, in, reconnected)
	}
	c := &choice{panel: p}
	conn, err := connect(opts, in, reconnected, nats.ReconnectToServer(c.next))
	if err == nil {
		c.now(conn)
	}
	return conn, err
}

// choice chooses for one connection the server that it goes to next: one that lives, and not the one that it was at, which may be lost without
// that being known yet.
type choice struct {
	panel *panel

	mu   sync.Mutex
	last string // host of the server that it was sent to
	at   time.Time
}

// now notes where the connection is.
func (c *choice) now(conn *nats.Conn) {
	if u, err := url.Parse(conn.ConnectedUrl()); err == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.last = u.Host
	}
}

// next is for [nats.ReconnectToServer]; nil leaves it to that library.
func (c *choice) next(pool []nats.Server, _ nats.ServerInfo) (*nats.Server, time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var good []*nats.Server
	for i, server := range pool {
		if server.URL != nil && server.URL.Host != c.last && c.panel.livesAt(server.URL.Host) {
			good = append(good, &pool[i])
		}
	}
	if len(good) == 0 {
		c.last = "" // the next attempt may be there again
		return nil, 0
	}
	chosen := good[rand.N(len(good))] //nolint:gosec // spreads load
	wait := max(0, reconnectWait-time.Since(c.at))
	c.last, c.at = chosen.URL.Host, time.Now().Add(wait)
	return chosen, wait
}

// livesAt reports whether the server at a host lives.
func (p *panel) livesAt(host string) bool {
	return slices.ContainsFunc(p.seats, func(s *seat) bool { return s.host == host && s.lives.Load() })
}

// pause waits, unless ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
