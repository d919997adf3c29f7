package relay

import (
	"bytes"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
)

// Both sides of a session hear of it at the same moment, and each binds and sends a check at once. Whose comes first finds nobody on
// the other side, and a round trip would be lost. So the relay keeps that one frame for a moment, for when the other side binds.
const (
	earlyMost = 512                    // bytes
	earlyLife = 250 * time.Millisecond // what is older tells a wrong round-trip time
)

// early is a frame that came before the other side was bound. It never changes.
type early struct {
	at    int64 // nanoseconds since 1970
	frame []byte
}

// await keeps a single small frame until the other side binds for the first time, unless there is a fresh one already, so that whoever sends many has the
// relay copy four a second at most. It reports whether it has. It gives the other side's binding instead if that has come just now.
func (l *lane) await(s *session, side Side, run []byte, frames uint64) (to *binding, kept bool) {
	h, other := &s.sides[side], &s.sides[side.Other()]
	if frames != 1 || len(run) > earlyMost || other.heard.Load() != 0 {
		return nil, false
	}
	if old := h.early.Load(); old != nil && l.now-old.at < int64(earlyLife) {
		return nil, false
	}
	e := &early{l.now, bytes.Clone(run)}
	h.early.Store(e)
	if to = other.binding.Load(); to != nil && h.early.CompareAndSwap(e, nil) {
		return to, false
	}
	return nil, true // nobody is there yet, or whoever has bound has taken it
}

// hand gives a side what the other one has sent ahead, where answer says that it has just bound.
func (l *lane) hand(msg, answer []byte, from origin) {
	if nat.MessageType(answer) != typeBindSuccess {
		return
	}
	m, ok := ParseBind(msg)
	if !ok {
		return
	}
	s := l.server.table.get(channelOf([SessionSize]byte(m.Ticket[2:])))
	if s == nil {
		return
	}
	side := Side(m.Ticket[1] & 1)
	to := s.sides[side].binding.Load()
	if to == nil || !to.is(from) {
		return
	}
	e := s.sides[side.Other()].early.Swap(nil)
	switch {
	case e == nil:
	case l.now-e.at >= int64(earlyLife):
		l.counts.alone.Add(1)
	case to.link != nil:
		l.enqueue(to.link.out, s.channel, e.frame, len(e.frame))
	case l.queue != nil:
		l.queue.Add(e.frame, len(e.frame), to.addr, to.local)
		l.packets, l.bytes = l.packets+1, l.bytes+uint64(len(e.frame))
	}
}
