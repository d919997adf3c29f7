package netstack

import (
	"encoding/binary"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// ackDelay is how long an acknowledgement waits for a packet that says the same and more. RFC 1122, section 4.2.3.2, allows
	// 500 ms; the stack itself waits not at all.
	ackDelay = 4 * time.Millisecond
	// ackSmall bounds, in bytes, what an acknowledgement that waits may be about: less than one full segment of any path, so
	// that a sender of much never waits for it.
	ackSmall = 1200
	// ackFlows is how many connections are remembered, a power of two. What two of them that meet in one place cost is that
	// nothing waits.
	ackFlows = 1024
)

// acks holds back acknowledgements that carry nothing else and are about little, because what a short exchange sends next says it again:
// of the five packets that a connection with one request and one answer sends to the job, two are spared. The second such
// acknowledgement in a row goes out at once.
type acks struct {
	send func(*stack.PacketBuffer) // takes over a reference; called without mu

	mu     sync.Mutex
	flows  []ackFlow // nil until the first packet
	turns  []ackTurn // of what is held, or was, the first to go first
	armed  bool
	timer  *time.Timer
	closed bool
	spared atomic.Uint64
}

// ackFlow is what is remembered of a connection.
type ackFlow struct {
	ends ackEnds
	sent uint32 // the last acknowledgement that went out
	held *stack.PacketBuffer
	due  time.Time // when held goes out
}

// ackTurn says where to look, and when. What is due at another time there is not meant.
type ackTurn struct {
	place uint32
	due   time.Time
}

// ackEnds are addresses and ports. Those of IPv4 leave the rest zero.
type ackEnds [36]byte

// pass looks at a packet on its way out and returns false where it is held back. What waits for its connection is forgotten.
func (a *acks) pass(pkt *stack.PacketBuffer) bool {
	if pkt.TransportProtocolNumber != header.TCPProtocolNumber {
		return true
	}
	ip, tcp := pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice()
	if len(tcp) < header.TCPMinimumSize || len(ip) < header.IPv4MinimumSize {
		return true
	}
	ends, place := ackPlace(ip, tcp)
	ack := binary.BigEndian.Uint32(tcp[header.TCPAckNumOffset:])
	bare := tcp[header.TCPFlagsOffset] == uint8(header.TCPFlagAck) && pkt.Data().Size() == 0 && !reportsLoss(tcp)

	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return true
	}
	if a.flows == nil {
		a.flows = make([]ackFlow, ackFlows)
	}
	f := &a.flows[place]
	if f.ends != ends {
		if f.held != nil {
			return true // of another connection, whose turn comes
		}
		*f = ackFlow{ends: ends, sent: ack}
		return true
	}
	if news := ack - f.sent; bare && f.held == nil && news > 0 && news < ackSmall && len(a.turns) < ackFlows {
		f.held, f.due = pkt.IncRef(), time.Now().Add(ackDelay)
		a.turns = append(a.turns, ackTurn{place, f.due})
		a.arm(ackDelay)
		return false
	}
	if f.held != nil {
		if int32(ack-acknowledged(f.held)) < 0 {
			return true // it says less, and what waits has its turn
		}
		f.held.DecRef()
		f.held = nil
		a.spared.Add(1)
	}
	f.sent = ack
	return true
}

// acknowledged is up to where a segment acknowledges.
func acknowledged(pkt *stack.PacketBuffer) uint32 {
	return binary.BigEndian.Uint32(pkt.TransportHeader().Slice()[header.TCPAckNumOffset:])
}

var ackSeed = maphash.MakeSeed()

// ackPlace gives a segment's ends and where they are remembered.
func ackPlace(ip, tcp []byte) (ends ackEnds, place uint32) {
	copy(ends[:4], tcp)
	if ip[0]>>4 == 4 {
		copy(ends[4:], ip[12:20])
	} else {
		copy(ends[4:], ip[8:40])
	}
	return ends, uint32(maphash.Bytes(ackSeed, ends[:]) % ackFlows)
}

// reportsLoss tells whether a segment has other options than timestamps: blocks that have come out of order. The stack puts two
// that do nothing before either, and where there are no timestamps one block takes as much room as they do.
func reportsLoss(tcp []byte) bool {
	switch len(tcp) {
	case header.TCPMinimumSize:
		return false
	case header.TCPMinimumSize + timestampsLen:
		return tcp[header.TCPMinimumSize+2] != header.TCPOptionTS
	}
	return true
}

// arm sets the timer unless it is set. mu is held.
func (a *acks) arm(d time.Duration) {
	if a.armed {
		return
	}
	a.armed = true
	if a.timer == nil {
		a.timer = time.AfterFunc(d, a.flush)
		return
	}
	a.timer.Reset(d)
}

// flush sends what has waited for long enough.
func (a *acks) flush() {
	for _, pkt := range a.ripe(time.Now()) {
		a.send(pkt)
	}
}

// ripe takes out what is due and sets the timer for what is not.
func (a *acks) ripe(now time.Time) (due []*stack.PacketBuffer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for ; n < len(a.turns) && !a.turns[n].due.After(now); n++ {
		turn := a.turns[n]
		f := &a.flows[turn.place]
		if f.held == nil || !f.due.Equal(turn.due) {
			continue // spared
		}
		f.sent = acknowledged(f.held)
		due = append(due, f.held)
		f.held = nil
	}
	a.turns = append(a.turns[:0], a.turns[n:]...)
	a.armed = false
	if len(a.turns) > 0 {
		a.arm(max(a.turns[0].due.Sub(now), ackDelay/4))
	}
	return due
}

// close forgets what waits.
func (a *acks) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	if a.timer != nil {
		a.timer.Stop()
	}
	for _, turn := range a.turns {
		if f := &a.flows[turn.place]; f.held != nil {
			f.held.DecRef()
			f.held = nil
		}
	}
	a.turns = nil
}
