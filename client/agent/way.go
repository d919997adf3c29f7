package agent

import (
	"fmt"

	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// way is one gateway that holds the session, and the tunnel to it. Its fields are guarded by the session's mu, but for those that
// never change.
type way struct {
	gateway wire.Gateway
	peer    *tunnel.Peer
	id      string          // what the paths are called; never changes
	granted map[string]bool // names of relays that there are tickets for

	up   bool // there is a path
	met  bool // there was one
	left bool // the gateway has said that it is about to stop
}

// at gives the gateway that carries the session, and the tunnel to it.
func (s *session) at() (wire.Gateway, *tunnel.Peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gateway, s.peer
}

// events are what a peer tells of a way.
func (s *session) events(w *way, opts tunnel.PeerOptions) tunnel.PeerOptions {
	opts.OnPath = func(p tunnel.Path) { s.onPath(w, p) }
	opts.OnMTU = func(mtu int) { s.onMTU(w, mtu) }
	opts.OnLeave = func() { s.onLeave(w) }
	return opts
}

// onPath notes whether a way has a path. The keeper hears of the way in use alone.
func (s *session) onPath(w *way, p tunnel.Path) {
	up := p != (tunnel.Path{})
	s.mu.Lock()
	w.up, w.met = up, w.met || up
	active := w == s.way
	if active {
		s.keeper.path(up)
	}
	s.mu.Unlock()
	if active && up {
		s.knownRelays()
		s.agent.marks.set(&s.agent.marks.path)
		s.once.Do(func() { close(s.pathUp) })
	}
	s.poke()
}

// onLeave notes that a gateway is about to stop.
func (s *session) onLeave(w *way) {
	s.mu.Lock()
	w.left = true
	s.mu.Unlock()
	s.poke()
}

// poke has the companion look again.
func (s *session) poke() {
	select {
	case s.companion.kick <- struct{}{}:
	default:
	}
}

// move makes another way carry the session: what goes into the tunnel goes there, in one step, and the first gateway's tunnel ends.
// Established connections end with it, unless there are none that could be cut.
func (s *session) move(w *way, cut bool) error {
	a := s.agent
	reset := func() error { return nil }
	if cut {
		var err error
		if reset, err = a.link.Established(); err != nil {
			a.log.Warn("open connections may hang, because they cannot be listed", "err", err)
			reset = func() error { return nil }
		}
	}
	s.mu.Lock()
	old := s.way
	s.way, s.companion.way = w, nil
	s.gateway, s.peer, s.granted = w.gateway, w.peer, w.granted
	s.keeper.path(w.up)
	s.mu.Unlock()
	if err := w.peer.SetAllowedIPs(allowed(w.gateway)); err != nil {
		return fmt.Errorf("move the routes inside the tunnel: %w", err)
	}
	a.tunnel.RemovePeer(old.peer)
	if err := reset(); err != nil {
		a.log.Warn("open connections may hang until they send something", "err", err)
	}
	s.onMTU(w, w.peer.MTU())
	if err := a.setRoutes(w.gateway); err != nil {
		return fmt.Errorf("set the routes: %w", err)
	}
	a.setNames(w.gateway.Names)
	a.useNames(s.ctx, w.gateway)
	return nil
}
