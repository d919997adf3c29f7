package relay

import (
	"bytes"
	"maps"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// table holds the sessions by channel. Forwarding looks up in it without a lock; a change copies one of its shards.
type table struct {
	limit  int
	count  atomic.Int64
	shards [tableShards]struct {
		mu sync.Mutex
		m  atomic.Pointer[map[Channel]*session]
	}
}

const tableShards = 1024

// session is one session at this relay. It is in the table as long as a side is bound.
type session struct {
	id      [SessionSize]byte
	channel Channel
	sides   [2]half
}

// half is one side of a session.
type half struct {
	binding atomic.Pointer[binding] // nil: not bound
	heard   atomic.Int64            // when the last packet came from it, in nanoseconds since 1970
	meter   meter                   // of what comes from it
	used    used                    // of its reader
	early   atomic.Pointer[early]   // sent before the other side was bound
}

// binding ties a side to an address or to a WebSocket. It never changes; a new one replaces it.
type binding struct {
	origin
	*credential
}

// side is the side that is bound.
func (b *binding) side() Side { return Side(b.ticket[1]) }

// session is the id of the session that it belongs to.
func (b *binding) session() [SessionSize]byte { return [SessionSize]byte(b.ticket[2:]) }

// origin is where a message came from, and where to answer.
type origin struct {
	addr  netip.AddrPort // over UDP
	local netip.Addr     // over UDP: our address that it was sent to; not valid where we have one only
	link  *link          // over a WebSocket, else nil
}

// is reports whether two messages came from the same place.
func (o origin) is(other origin) bool {
	return o.link == other.link && (o.link != nil || o.addr == other.addr)
}

// credential is a ticket that was verified, and the key that goes with it.
type credential struct {
	ticket  [TicketSize]byte
	key     BindKey
	holder  wire.Key
	issued  int64 // seconds since 1970
	expires int64 // nanoseconds since 1970
	rate    uint64
}

// get gives a channel's session, or nil.
func (t *table) get(c Channel) *session {
	m := t.shards[c%tableShards].m.Load()
	if m == nil {
		return nil
	}
	return (*m)[c]
}

// known gives the credential of a ticket that is in use, so that it need not be verified again.
func (t *table) known(ticket Ticket) *credential {
	s := t.get(channelOf([SessionSize]byte(ticket[2:])))
	if s == nil {
		return nil
	}
	if b := s.sides[ticket[1]&1].binding.Load(); b != nil && bytes.Equal(b.ticket[:], ticket) {
		return b.credential
	}
	return nil
}

// bind ties a side to where its message came from and gives 0, or a code if the channel or the side is another's.
func (t *table) bind(b *binding, now int64) (old *binding, code int) {
	id := b.session()
	c := channelOf(id)
	shard := &t.shards[c%tableShards]
	shard.mu.Lock()
	defer shard.mu.Unlock()
	s := t.get(c)
	switch {
	case s == nil && t.count.Load() >= int64(t.limit):
		return nil, CodeFull
	case s == nil:
		s = &session{id: id, channel: c}
		t.change(c, func(m map[Channel]*session) { m[c] = s })
		t.count.Add(1)
	case s.id != id:
		return nil, CodeTaken
	}
	h := &s.sides[b.side()]
	old = h.binding.Load()
	if old != nil && old.holder != b.holder && old.issued > b.issued {
		return nil, CodeTicket // the coordinator has given this side to another since
	}
	h.binding.Store(b)
	h.heard.Store(now)
	return old, 0
}

// unbind unties a side if it is bound to where the message came from; nobody unties what has moved elsewhere.
func (t *table) unbind(id [SessionSize]byte, side Side, from origin) *binding {
	return t.untie(channelOf(id), side, func(s *session, b *binding) bool { return s.id == id && b.is(from) })
}

// untie unties a side if its binding is one that want wants, and forgets a session that has none left.
func (t *table) untie(c Channel, side Side, want func(*session, *binding) bool) *binding {
	shard := &t.shards[c%tableShards]
	shard.mu.Lock()
	defer shard.mu.Unlock()
	s := t.get(c)
	if s == nil {
		return nil
	}
	b := s.sides[side].binding.Load()
	if b == nil || !want(s, b) {
		return nil
	}
	s.sides[side].binding.Store(nil)
	if s.sides[side.Other()].binding.Load() == nil {
		t.change(c, func(m map[Channel]*session) { delete(m, c) })
		t.count.Add(-1)
	}
	return b
}

// change edits a copy of a shard's map, under the shard's lock.
func (t *table) change(c Channel, edit func(map[Channel]*session)) {
	p := &t.shards[c%tableShards].m
	m := map[Channel]*session{}
	if old := p.Load(); old != nil {
		m = maps.Clone(*old)
	}
	edit(m)
	p.Store(&m)
}

// expire unties what has ended or was silent for too long, and gives it to gone.
func (t *table) expire(now int64, gone func(*binding)) {
	for i := range t.shards {
		m := t.shards[i].m.Load()
		if m == nil {
			continue
		}
		for c, s := range *m {
			for side := range Side(len(s.sides)) {
				h := &s.sides[side]
				over := func(_ *session, b *binding) bool {
					return now >= b.expires || now-h.heard.Load() >= int64(IdleLife)
				}
				if b := h.binding.Load(); b != nil && over(s, b) {
					if b = t.untie(c, side, over); b != nil {
						gone(b)
					}
				}
			}
		}
	}
}

// expireEvery is how often the table is looked through. A ticket that has ended moves nothing from then on all the same.
const expireEvery = 10 * time.Second
