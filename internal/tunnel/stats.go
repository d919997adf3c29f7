package tunnel

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// Stats counts what the tunnel has dropped since it was opened, in packets, and what it rebuilt.
type Stats struct {
	Stranger uint64 // WireGuard from an address that is no validated path
	Junk     uint64 // neither WireGuard nor STUN
	NoPath   uint64 // to a peer without a path
	OverTurn uint64 // from a peer of which too many waited already
	Rebuilt  uint64 // lost on their way, rebuilt from parities
}

// Stats reads the counters.
func (t *Tunnel) Stats() Stats {
	c := &t.bind.counts
	s := Stats{Stranger: c.stranger.Load(), Junk: c.junk.Load(), NoPath: c.noPath.Load(), Rebuilt: c.rebuilt.Load()}
	if ts := t.bind.turns; ts != nil {
		s.OverTurn = ts.dropped.Load()
	}
	return s
}

// Carried is how many bytes the tunnel has sent to its present peers and received from them.
func (t *Tunnel) Carried() (n uint64) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, p := range t.sessions {
		n += p.rx.Load() + p.tx.Load()
	}
	return n
}

// Vitals tells when the device last had new keys with the peer, zero before the first, and which kind of way its packets take: host, direct,
// relay, websocket or none. It copies nothing, so that it may be asked of every peer.
func (p *Peer) Vitals() (handshake time.Time, way string) {
	if at := p.handshake.completed.Load(); at != 0 {
		handshake = time.Unix(0, at)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.engine.chosen
	if c == nil {
		return handshake, "none"
	}
	return handshake, [...]string{rankHost: "host", rankDirect: "direct", rankRelay: "relay", rankStream: "websocket"}[c.rank()]
}

// PeerState is a peer as tools for WireGuard show one.
type PeerState struct {
	Key        wire.Key
	Endpoint   netip.AddrPort // where packets go at present; not valid without a path, or where that is a WebSocket
	AllowedIPs []netip.Prefix
	Seen
}

// Peers gives the state of all peers, in no order.
func (t *Tunnel) Peers() []PeerState {
	t.mu.RLock()
	peers := slices.Collect(maps.Values(t.sessions))
	t.mu.RUnlock()
	list := make([]PeerState, len(peers))
	for i, p := range peers {
		s := p.Status()
		list[i] = PeerState{Key: p.opts.Key, Endpoint: s.Path.Remote, Seen: Seen{s.Handshake, s.RxBytes, s.TxBytes}}
		p.mu.Lock()
		list[i].AllowedIPs = p.allowed
		p.mu.Unlock()
	}
	return list
}
