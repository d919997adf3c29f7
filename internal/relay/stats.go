package relay

import (
	"sync/atomic"

	"github.com/culvertnet/culvert/internal/nat"
)

// counts are the counters of one UDP socket, or of all WebSockets.
type counts struct {
	packets, bytes                                  atomic.Uint64
	stranger, alone, overRate, overShare, overQueue atomic.Uint64
	junk, unserved                                  atomic.Uint64
	stun, bound, refused, stale, limited            atomic.Uint64
	unanswered, written                             atomic.Uint64
}

// Stats count since a server's start, in packets unless something else is said.
type Stats struct {
	Sessions int // with a side bound, now
	Links    int // WebSockets, now

	Packets uint64 // forwarded
	Bytes   uint64 // forwarded, frame headers included

	Strangers uint64 // dropped: from where nothing is bound, or after the ticket's end
	Alone     uint64 // dropped: the other side is not bound
	OverRate  uint64 // dropped: over the session's rate
	OverShare uint64 // dropped: more than the session's share while the relay cannot keep up
	OverQueue uint64 // dropped: a queue was full, ours or the kernel's
	Unread    uint64 // dropped by the kernel before they were read

	Junk     uint64 // messages that are none
	Unserved uint64 // STUN that asks for what a relay does not serve

	STUN    uint64 // Binding requests answered
	Bound   uint64 // binds and unbinds that succeeded
	Refused uint64 // binds with a ticket that is not taken
	Stale   uint64 // binds with a nonce that is not good, or no longer
	Limited uint64 // binds dropped because a source asks for too many verifications

	Unanswered uint64 // questions and stale binds that were dropped because there were too many
}

// misfit counts a STUN message that gets no answer. Well-formed ones are no sign of anything: netcheck asks every server for an answer
// from another port (RFC 5780, section 7.2).
func (c *counts) misfit(msg []byte) {
	a := nat.Walk(msg)
	for a.Next() {
	}
	if a.Bad {
		c.junk.Add(1)
	} else {
		c.unserved.Add(1)
	}
}

// Stats gives the counters.
func (s *Server) Stats() Stats {
	st := Stats{Sessions: int(s.table.count.Load())}
	s.mu.Lock()
	st.Links = len(s.links)
	s.mu.Unlock()
	st.add(&s.counts)
	for _, p := range s.ports {
		st.add(&p.counts)
		st.Unread += uint64(p.conn.Stats().Overflow)
	}
	return st
}

func (s *Stats) add(c *counts) {
	s.Packets += c.packets.Load()
	s.Bytes += c.bytes.Load()
	s.Strangers += c.stranger.Load()
	s.Alone += c.alone.Load()
	s.OverRate += c.overRate.Load()
	s.OverShare += c.overShare.Load()
	s.OverQueue += c.overQueue.Load()
	s.Junk += c.junk.Load()
	s.Unserved += c.unserved.Load()
	s.STUN += c.stun.Load()
	s.Bound += c.bound.Load()
	s.Refused += c.refused.Load()
	s.Stale += c.stale.Load()
	s.Limited += c.limited.Load()
	s.Unanswered += c.unanswered.Load()
}
