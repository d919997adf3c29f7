package tunnel

import "time"

// Stats counts what the tunnel has dropped since it was opened, in packets.
type Stats struct {
	Stranger uint64 // WireGuard from an address that is no validated path
	Junk     uint64 // neither WireGuard nor STUN
	NoPath   uint64 // to a peer without a path
}

// Stats reads the counters.
func (t *Tunnel) Stats() Stats {
	c := &t.bind.counts
	return Stats{Stranger: c.stranger.Load(), Junk: c.junk.Load(), NoPath: c.noPath.Load()}
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
