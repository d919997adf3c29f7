package netstack

import (
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Lane is one session's place on the way from the stack to the tunnel.
type Lane struct {
	all   *lanes
	addrs []netip.Addr
	live  func() bool // nil for always
	ready func() bool // as live

	// guarded by all.mu
	packets  []*stack.PacketBuffer
	front    int // of packets
	bytes    int // in packets
	loose    int // of these
	held     int // bytes in split
	deficit  int
	inside   int       // packets in the tunnel
	moved    time.Time // when the tunnel last sent one of them, or got the first
	lost     bool      // they were written off
	knock    time.Time // when the next packet may go to a tunnel that does not send
	patience time.Duration
	next     *Lane
	queued   bool // among those whose turn comes
	closed   bool

	split *splitter // Read's; nil while nothing is cut
}

// OpenLane gives the addresses of a session a lane of their own, until [Lane.Close], and forgets fragments of whoever had them before. It
// panics on a device that does not forward.
func (d *Device) OpenLane(addrs []netip.Addr) *Lane {
	for _, a := range addrs {
		d.pieces.forget(a)
	}
	return d.link.out.(*lanes).open(addrs)
}

func (l *lanes) open(addrs []netip.Addr) *Lane {
	lane := &Lane{all: l, addrs: addrs}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range addrs {
		l.byAddr[a] = lane
	}
	l.last = nil
	return lane
}

// SetLive sets what tells whether the tunnel has keys for the session. While it has none, a packet now and then is
// given to it, so that it asks for some, and the others wait. While ready says no, nothing is given to it. Both are called with a lock
// held: they must not block. When they say otherwise than before, [Lane.Sent] has to be called.
func (s *Lane) SetLive(live, ready func() bool) {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	s.live, s.ready = live, ready
}

// Sent notes that the tunnel has sent n packets of the session.
func (s *Lane) Sent(n int) {
	l := s.all
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.closed {
		return
	}
	was := s.isBusy()
	n = min(n, s.inside)
	s.inside -= n
	l.inside -= n
	s.moved, s.lost, s.patience = time.Now(), false, 0
	if s.inside == 0 {
		delete(l.flying, s)
	}
	l.note(s, was)
	l.enqueue(s)
	if l.full && l.inside < tunnelLimit {
		l.full = false
		signal(l.ready)
	}
}

// Crowded reports that as much of the session waits here as may: larger buffers would only make it wait longer.
func (s *Lane) Crowded() bool {
	l := s.all
	l.mu.Lock()
	defer l.mu.Unlock()
	return s.bytes+s.held >= max(backlogLeast, backlog/max(1, l.busy))
}

// Close drops what waits. The addresses may have another lane already.
func (s *Lane) Close() {
	l := s.all
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.closed {
		return
	}
	for _, a := range s.addrs {
		if l.byAddr[a] == s {
			delete(l.byAddr, a)
		}
	}
	was := s.isBusy()
	l.last = nil
	l.empty(s)
	l.inside -= s.inside
	s.inside = 0
	delete(l.flying, s)
	s.closed = true
	l.note(s, was)
	l.enqueue(s) // Read drops what it is about to cut
}

// isBusy reports packets here or in the tunnel.
func (s *Lane) isBusy() bool { return s.inside > 0 || s.waits() }

// waits reports packets here.
func (s *Lane) waits() bool { return s.front < len(s.packets) || s.held > 0 }

// sends reports whether the tunnel sends what it is given of the session, as far as is known.
func (s *Lane) sends() bool { return !s.lost && (s.live == nil || s.live()) }

// rest puts off the next packet to a tunnel that does not send.
func (s *Lane) rest(now time.Time) {
	s.patience = min(max(2*s.patience, knockFirst), knockMost)
	s.knock = now.Add(s.patience)
}

// take hands a lane's packets to its splitter.
func (s *Lane) take(into []*stack.PacketBuffer, bytes int) []*stack.PacketBuffer {
	l := s.all
	l.mu.Lock()
	defer l.mu.Unlock()
	was := s.isBusy()
	for bytes > 0 && s.front < len(s.packets) {
		pkt := s.packets[s.front]
		s.packets[s.front] = nil
		s.front++
		size := pkt.Size()
		bytes -= size
		l.forget(s, pkt, size)
		s.held += size
		l.bytes += size
		into = append(into, pkt)
	}
	s.compact()
	l.note(s, was)
	return into
}

// compact reclaims the front of packets.
func (s *Lane) compact() {
	switch n := len(s.packets) - s.front; {
	case n == 0 && cap(s.packets) > 64:
		s.packets, s.front = nil, 0
	case n == 0:
		s.packets, s.front = s.packets[:0], 0
	case s.front > 64 && s.front > n:
		copy(s.packets, s.packets[s.front:])
		clear(s.packets[n:])
		s.packets, s.front = s.packets[:n], 0
	}
}
