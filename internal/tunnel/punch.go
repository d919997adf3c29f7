package tunnel

import (
	"net/netip"
	"slices"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// punch is what a peer does for a way through two NATs of which one is hard: its [birthday], with the sockets that it takes. The
// peer's lock guards it.
type punch struct {
	birthday
	turns  []*spare      // the round's, by number
	spares []*spare      // all that are open
	quit   chan struct{} // closed with the peer
}

func newPunch(lead bool, c *crowd) punch {
	return punch{birthday: birthday{lead: lead, crowd: c, shuffle: ports.shuffled}, quit: make(chan struct{})}
}

// SetNAT tells what the NAT in front of this host does with the tunnel's socket, and what servers saw of it. It is to be called whenever
// that is found out anew, and with [wire.MappingUnknown] when the local network has changed.
func (t *Tunnel) SetNAT(mapping wire.Mapping, seen []nat.Observation) {
	next := newMapper(mapping, seen)
	for {
		old := t.mapper.Load()
		if *old == *next || t.mapper.CompareAndSwap(old, next) {
			return
		}
	}
}

// owns reports whether a door is one of the peer's spares.
func (p *punch) owns(via door) bool {
	s, ok := via.(*spare)
	return ok && slices.Contains(p.spares, s)
}

// heed takes what the other side says of itself. p.mu is held.
func (p *Peer) heed(word nat.Behind, now time.Time) {
	if word.Known() && p.punch.hear(word, now) {
		p.settleSpares(now)
	}
}

// situation is what the birthday needs to know.
func (p *Peer) situation() situation {
	s := situation{own: p.tunnel.mapper.Load()}
	c := p.engine.chosen
	s.relayed = c != nil && !c.direct()
	for _, q := range p.engine.paths {
		if q.valid && q.direct() && p.engine.lead {
			s.relayed = false
		}
		if q.kind == wire.Reflexive && q.spot.via == nil && p.tunnel.public(q.spot.remote.Addr()) {
			s.target = q.spot.remote // where it was seen last
		}
	}
	return s
}

// punching does what the birthday wants done: it gives the word to the other side, if there is one, and the probes. p.mu is held.
func (p *Peer) punching(now time.Time) (say *nat.Behind, out []outgoing) {
	s := p.situation()
	e := p.punch.step(s, now)
	if e.open > 0 {
		round, server := p.punch.round, s.own.server
		if !e.sample {
			server = netip.AddrPort{}
		}
		p.tunnel.tasks.Go(func() { p.open(e.open, round, server) })
	}
	for _, one := range e.probes {
		to := route{spot: spot{remote: netip.AddrPortFrom(s.target.Addr(), one.port)}}
		if one.socket >= 0 {
			to.via = p.punch.turns[one.socket]
		}
		p.seq++
		pkt, err := nat.AppendCheck(nil, nat.Check{ID: p.newID(), Username: p.name, Seq: p.seq}, p.key, 0)
		if err == nil {
			out = append(out, outgoing{pkt, &to})
		}
	}
	if e.over {
		p.settleSpares(now)
	}
	if len(p.punch.spares) > 0 && p.punch.phase == birthdayIdle {
		p.sweep(now)
	}
	if e.say {
		word := p.punch.word(s.own)
		say = &word
	}
	return say, out
}

// open opens sockets for a round.
func (p *Peer) open(n int, round uint8, server netip.AddrPort) {
	list := p.openSpares(n)
	p.tunnel.crowd.gone(n - len(list))
	mapped := sample(list, server, p.punch.quit)
	taken := false
	p.act(func(now time.Time) {
		if taken = p.punch.opened(round, len(list), mapped, now); taken {
			p.punch.turns = list
			p.punch.spares = append(p.punch.spares, list...)
		}
	})
	if !taken {
		for _, s := range list {
			s.close()
		}
	}
}

// settleSpares closes what a round has opened but for the sockets of paths. p.mu is held.
func (p *Peer) settleSpares(now time.Time) {
	p.punch.turns = nil
	p.sweep(now)
}

// sweep closes spares that no path leads through, and ends paths that have been lost for long. p.mu is held.
func (p *Peer) sweep(now time.Time) {
	used := map[door]bool{}
	for _, q := range slices.Clone(p.engine.paths) {
		s, ok := q.spot.via.(*spare)
		if !ok {
			continue
		}
		if last := maxOf(q.heard, q.lostAt); !q.valid && now.Sub(last) > spareBroken {
			p.engine.drop(q, now)
			continue
		}
		used[s] = used[s] || q == p.engine.chosen || len(used) < sparesKept
	}
	p.punch.spares = slices.DeleteFunc(p.punch.spares, func(s *spare) bool {
		if used[s] {
			return false
		}
		for _, q := range slices.Clone(p.engine.paths) {
			if q.spot.via == door(s) {
				p.engine.drop(q, now)
			}
		}
		s.close()
		return true
	})
}

// maxOf gives the later of two times.
func maxOf(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// closeSpares closes all. The peer is closed, and p.mu held.
func (p *Peer) closeSpares() {
	p.punch.finish()
	close(p.punch.quit)
	for _, s := range p.punch.spares {
		s.close()
	}
	p.punch.spares, p.punch.turns = nil, nil
}
