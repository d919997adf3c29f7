package agent

import (
	"context"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	// nameLimit is how long a relay with a WebSocket waits for its addresses where HTTP goes through a proxy: there names may be
	// known to nobody else.
	nameLimit = 50 * time.Millisecond
	// ticketLife is how long a ticket is relied upon by our own clock, which need not be the coordinator's. The relay is the
	// one that judges; no session lasts longer.
	ticketLife = 120 * time.Hour
	maxURL     = 1024 // of a relay, in bytes
	maxTicket  = 1024
	// livenessLimit is how long a relay may take to show that it is alive.
	livenessLimit = 500 * time.Millisecond
	// relayPatience is how long a session without any path waits for relays that do not answer. One that is back within that
	// time carries on where it stopped; a new session would cut every connection.
	relayPatience = 8 * time.Second
)

// relays makes the relays known to the tunnel, which asks them and dials their WebSockets at once: the coordinator's own without
// having been told of it, so that blocked UDP costs no time; the others as their addresses are known.
func (g *gatherer) relays(ctx context.Context, t *tunnel.Tunnel) {
	guess := g.guess(ctx)
	t.SetRelays([]tunnel.Relay{guess})
	select {
	case g.info = <-g.extra:
	case <-ctx.Done():
		return
	}
	g.info.Relays = g.sound(g.info.Relays)
	close(g.informed)
	known := make([]tunnel.Relay, len(g.info.Relays))
	var mu sync.Mutex
	tell := func(i int, r tunnel.Relay) {
		mu.Lock()
		defer mu.Unlock()
		known[i] = r
		t.SetRelays(slices.DeleteFunc(slices.Clone(known), func(r tunnel.Relay) bool { return r.Name == "" }))
	}
	if len(known) == 0 {
		t.SetRelays(nil) // the guess was wrong
	}
	ctx, cancel := context.WithTimeout(ctx, stunLimit)
	defer cancel()
	var wait sync.WaitGroup
	defer wait.Wait()
	for i, r := range g.info.Relays {
		if r.Name == guess.Name {
			tell(i, guess)
		}
		wait.Go(func() {
			tell(i, g.relay(ctx, r))
			g.hear(ctx, t, r.Name)
		})
	}
}

// guess is the coordinator's own relay at the usual port.
func (g *gatherer) guess(ctx context.Context) tunnel.Relay {
	return g.relay(ctx, wire.Relay{Name: wire.OwnRelay, UDP: ":" + stunPort, URL: g.agent.opts.Coordinator + wire.PathRelay})
}

// relay looks a relay's addresses up. One that cannot be found may still take WebSockets.
func (g *gatherer) relay(ctx context.Context, r wire.Relay) tunnel.Relay {
	out := tunnel.Relay{Name: r.Name, URL: r.URL}
	if r.UDP == "" && r.Name == wire.OwnRelay && r.URL == g.agent.opts.Coordinator+wire.PathRelay {
		r.UDP = ":" + stunPort // as guessed, so that the connection that is on its way is not begun anew; nobody answers there
	}
	if r.UDP == "" {
		return out
	}
	if r.URL != "" && g.agent.api.proxy() != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, nameLimit)
		defer cancel()
	}
	addrs, err := g.names.lookup(ctx, r.UDP)
	if err != nil {
		g.agent.log.Debug("a relay's name does not resolve", "relay", r.Name, "addr", r.UDP, "err", err)
		return out
	}
	out.UDP = addrs
	return out
}

// sound leaves out what is no relay, or one that would be dialled without encryption.
func (g *gatherer) sound(list []wire.Relay) []wire.Relay {
	var out []wire.Relay
	for _, r := range list[:min(len(list), wire.MaxRelays)] {
		twice := slices.ContainsFunc(out, func(o wire.Relay) bool { return o.Name == r.Name })
		if r.Name != "" && len(r.Name) < 64 && oneLine(r.Name) && !twice && len(r.UDP) < maxURL && g.soundURL(r.URL) {
			out = append(out, r)
		}
	}
	return out
}

func (g *gatherer) soundURL(text string) bool {
	if text == "" {
		return true
	}
	u, err := url.Parse(text)
	if err != nil || len(text) > maxURL || u.Hostname() == "" || u.User != nil {
		return false
	}
	return u.Scheme == "https" || u.Scheme == "http" && (g.agent.opts.InsecureHTTP || loopback(u.Hostname()))
}

// nearest names the relays that have answered, the nearest first.
func nearest(t *tunnel.Tunnel) []string {
	var out []string
	for _, r := range t.Relays() {
		if r.Reachable || r.Stream {
			out = append(out, r.Name)
		}
	}
	return out
}

// useRelays lets the session's peer use the relays that the coordinator has given tickets for. Those whose addresses are not
// known yet follow.
func (s *session) useRelays(grants []wire.RelayGrant) {
	sound := make([]wire.RelayGrant, 0, len(grants))
	for _, g := range grants {
		if len(s.gather.sound([]wire.Relay{g.Relay})) == 1 && len(g.Ticket) <= maxTicket {
			sound = append(sound, g)
		}
	}
	peer := s.peer
	for _, g := range sound {
		s.mu.Lock()
		known := s.granted[g.Name]
		s.granted[g.Name] = true
		s.mu.Unlock()
		if known {
			continue
		}
		s.start(func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, stunLimit)
			defer cancel()
			peer.AddRelays([]tunnel.Grant{{
				Relay: s.gather.relay(ctx, g.Relay), Ticket: g.Ticket, Expires: time.Now().Add(ticketLife),
			}})
			return nil
		})
	}
}

// hasRelays reports whether the session has tickets for any.
func (s *session) hasRelays() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.granted) > 0
}

// knownRelays remembers the relays' keys while there is a path.
func (s *session) knownRelays() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.agent.tunnel.Relays() {
		if !r.Key.IsZero() {
			s.relayKeys[r.Name] = r.Key
		}
	}
}

// relaysStand reports whether a relay of the session's is there and is the one that it was: then what has gone is the gateway. A
// relay that has been started anew has to be bound to by both sides first.
func (s *session) relaysStand(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, livenessLimit)
	defer cancel()
	var wait sync.WaitGroup
	alive := make(chan struct{}, 2*wire.MaxRelays)
	for _, r := range s.agent.tunnel.Relays() {
		s.mu.Lock()
		key, known := s.relayKeys[r.Name]
		ours := s.granted[r.Name] && (!known || key == r.Key)
		s.mu.Unlock()
		switch {
		case !ours:
		case r.Stream:
			return true
		case r.Reachable:
			for _, addr := range r.UDP[:min(len(r.UDP), 2)] {
				wait.Go(func() {
					if _, err := s.agent.tunnel.Reflexive(ctx, addr); err == nil {
						alive <- struct{}{}
						cancel()
					}
				})
			}
		}
	}
	wait.Wait()
	return len(alive) > 0
}
