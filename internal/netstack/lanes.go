package netstack

import (
	"net/netip"
	"runtime"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// tunnelLimit is how many packets may be inside the tunnel, read and not yet sent, 64 KiB of memory each. It has to keep
	// every core busy with batches; what waits beyond that waits in lanes, where turns are taken.
	tunnelLimit = 512
	// laneLimit is how many of these are one lane's at least: two batches, one that is encrypted and one that is sent.
	laneLimit = 88
	// looseLimit bounds the bytes that wait in one lane beside TCP data, and looseTotal those of all lanes: each may have half of
	// what is left, and looseLeast in any case. TCP data is bounded by the send buffers that it lies in anyway.
	looseLimit = 1 << 20
	looseTotal = 64 << 20
	looseLeast = 4 << 10
	// bulkLimit bounds the TCP data in one lane: what one flow's send buffer holds, and as much again that is sent anew.
	bulkLimit = 64 << 20
	// backlog is how much TCP data may wait in all lanes before buffers stop to grow, see [Lane.Crowded].
	backlog      = 16 << 20
	backlogLeast = 32 << 10
	// stall is after how long packets that the tunnel has not sent are written off: it drops without a word what has no keys.
	stall = 100 * time.Millisecond
	// knockFirst and knockMost are how long a lane whose packets are not sent waits before it sends another one, doubled each time.
	// Each may lie in the tunnel for a minute and a half, until WireGuard gives up its handshake.
	knockFirst = 5 * time.Second
	knockMost  = 80 * time.Second
)

// lanes hold what waits between the stack and Read on a gateway: a lane for each session, served in turns by bytes (deficit round
// robin, Shreedhar and Varghese 1995). A session that takes less than its share never waits for those that take more, and
// whoever has much in flight waits in its own lane.
//
// Nothing that TCP sends is dropped here and no sender is held up: what waits lies in the send buffers of its flows. WireGuard's own
// queues are first come, first served, so no more than a few batches are let into them at a time.
type lanes struct {
	counters *counters
	splitter func() *splitter

	mu         sync.Mutex
	byAddr     map[netip.Addr]*Lane
	other      *Lane // for destinations without a lane
	last       *Lane // of the packet before: most come in runs
	lastAddr   netip.Addr
	head, tail *Lane // those whose turn comes
	flying     map[*Lane]struct{}
	inside     int // packets in the tunnel
	loose      int // bytes that are not TCP data
	bytes      int
	busy       int // lanes with packets here or in the tunnel
	full       bool
	closed     bool
	spares     []*splitter // Read's
	timer      *time.Timer // Read's
	ready      chan struct{}
}

func newLanes(c *counters, s func() *splitter) *lanes {
	l := &lanes{
		counters: c, splitter: s, byAddr: map[netip.Addr]*Lane{}, flying: map[*Lane]struct{}{},
		ready: make(chan struct{}, 1), timer: time.NewTimer(time.Hour),
	}
	l.timer.Stop()
	l.other = &Lane{all: l}
	return l
}

// note keeps count of busy lanes.
func (l *lanes) note(s *Lane, was bool) {
	switch is := s.isBusy(); {
	case is && !was:
		l.busy++
	case was && !is:
		l.busy--
	}
}

// push takes over a reference to pkt unless it returns false.
func (l *lanes) push(pkt *stack.PacketBuffer) bool {
	size, bulk := pkt.Size(), isBulk(pkt)
	dst := destination(pkt)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	s := l.lane(dst)
	if bulk && s.bytes+size > bulkLimit || !bulk && s.loose+size > max(looseLeast, min(looseLimit, (looseTotal-l.loose)/2)) {
		l.counters.overflow.Add(1)
		return false
	}
	was := s.isBusy()
	s.packets = append(s.packets, pkt)
	s.bytes += size
	l.bytes += size
	if !bulk {
		s.loose += size
		l.loose += size
	}
	l.note(s, was)
	l.enqueue(s)
	return true
}

// isBulk tells TCP data, which waits in its flow's send buffer anyway, from all else.
func isBulk(pkt *stack.PacketBuffer) bool {
	return pkt.GSOOptions.Type != stack.GSONone && pkt.Data().Size() > 0
}

// destination is where a packet goes; the zero address where it does not say.
func destination(pkt *stack.PacketBuffer) netip.Addr {
	ip := pkt.NetworkHeader().Slice()
	if len(ip) == 0 { // injected as a whole
		ip, _ = pkt.Data().PullUp(min(pkt.Data().Size(), ipv6Len))
	}
	switch {
	case len(ip) >= ipv4Len && ip[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(ip[16:20]))
	case len(ip) >= ipv6Len:
		return netip.AddrFrom16([16]byte(ip[24:40]))
	}
	return netip.Addr{}
}

func (l *lanes) lane(dst netip.Addr) *Lane {
	if l.last != nil && l.lastAddr == dst {
		return l.last
	}
	s := l.byAddr[dst]
	if s == nil {
		s = l.other
	}
	l.last, l.lastAddr = s, dst
	return s
}

// room is how many packets of a lane the tunnel may have now.
func (l *lanes) room(s *Lane) int {
	if s.closed {
		return 1
	}
	if s.ready != nil && !s.ready() {
		return 0
	}
	if !s.sends() {
		if time.Now().Before(s.knock) {
			return 0
		}
		return 1
	}
	return max(laneLimit, tunnelLimit/max(1, l.busy)) - s.inside
}

// enqueue gives a lane a turn if there is something for it to do.
func (l *lanes) enqueue(s *Lane) {
	if s.queued || !s.closed && !s.waits() || l.room(s) <= 0 {
		return
	}
	s.queued, s.next = true, nil
	s.deficit = min(s.deficit, 0) + quantum
	if l.head == nil {
		l.head = s
		signal(l.ready)
	} else {
		l.tail.next = s
	}
	l.tail = s
}

// quantum is how many bytes a lane sends in its turn: a batch, see [splitter.most].
const quantum = 60 << 10

// dequeue takes the first lane out.
func (l *lanes) dequeue() {
	s := l.head
	if l.head = s.next; l.head == nil {
		l.tail = nil
	}
	s.queued, s.next = false, nil
}

// pick gives the lane whose turn it is and how many packets it may send; nil where none may.
func (l *lanes) pick() (*Lane, int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.head != nil && !l.closed {
		if l.inside >= tunnelLimit {
			l.full = true
			return nil, 0
		}
		s := l.head
		switch room := l.room(s); {
		case s.closed:
			was := s.isBusy()
			l.dequeue()
			l.recycle(s)
			l.note(s, was)
		case room <= 0 || !s.waits():
			l.dequeue()
		case s.deficit <= 0:
			l.dequeue()
			l.enqueue(s)
		default:
			return s, room
		}
	}
	return nil, 0
}

// recycle takes back a lane's splitter. What is still in it is dropped.
func (l *lanes) recycle(s *Lane) {
	if s.split == nil {
		return
	}
	s.split.drop()
	l.bytes -= s.held
	if len(l.spares) < 64 {
		l.spares = append(l.spares, s.split)
	}
	s.split, s.held = nil, 0
}

// read fills bufs with packets of the lanes whose turn it is: of one alone, where it has a batch. Only one goroutine calls it at a time.
func (l *lanes) read(bufs [][]byte, sizes []int, offset int) (n int) {
	most := len(bufs)
	for n < most {
		s, room := l.pick()
		if s == nil {
			break
		}
		if s.split == nil {
			s.split = l.spare()
		}
		most = min(most, s.split.most())
		to := min(most, n+room)
		if n >= to {
			break
		}
		got := s.split.fill(s, bufs[n:to], sizes[n:to], offset)
		bytes := 0
		for _, size := range sizes[n : n+got] {
			bytes += size
		}
		l.account(s, got, bytes)
		n += got
	}
	return n
}

func (l *lanes) spare() *splitter {
	if n := len(l.spares); n > 0 {
		s := l.spares[n-1]
		l.spares = l.spares[:n-1]
		return s
	}
	return l.splitter()
}

// account notes what a lane has just given to the tunnel.
func (l *lanes) account(s *Lane, packets, bytes int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	was := s.isBusy()
	l.bytes -= s.held
	s.held = s.split.pending()
	l.bytes += s.held
	s.deficit -= bytes
	if !s.closed && s != l.other && packets > 0 {
		now := time.Now()
		if s.inside == 0 {
			s.moved = now
			l.flying[s] = struct{}{}
		}
		s.inside += packets
		l.inside += packets
		if !s.sends() {
			s.rest(now)
		}
	}
	if !s.waits() {
		l.recycle(s)
	}
	l.note(s, was)
}

// forget takes a packet out of the sums.
func (l *lanes) forget(s *Lane, pkt *stack.PacketBuffer, size int) {
	s.bytes -= size
	l.bytes -= size
	if !isBulk(pkt) {
		s.loose -= size
		l.loose -= size
	}
}

// empty drops a lane's packets, but for those that Read is about to cut.
func (l *lanes) empty(s *Lane) {
	for _, pkt := range s.packets[s.front:] {
		l.forget(s, pkt, pkt.Size())
		pkt.DecRef()
	}
	s.packets, s.front = nil, 0
}

// block waits until something may be there; false says that the lanes are closed.
func (l *lanes) block() bool {
	if !l.await() {
		return false
	}
	select {
	case <-l.ready:
		runtime.Gosched() // who is about to send something as well goes first: then it leaves in the same batch
	case <-l.timer.C:
		l.writeOff()
	}
	if l.isClosed() {
		signal(l.ready) // for the next one who asks
		return false
	}
	return true
}

// await sets the timer where the tunnel is full: it may never send what it has.
func (l *lanes) await() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.timer.Stop()
	if l.full {
		l.timer.Reset(stall / 4)
	}
	return !l.closed
}

// writeOff makes room for others where the tunnel does not send a lane's packets.
func (l *lanes) writeOff() {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	for s := range l.flying {
		if now.Sub(s.moved) < stall {
			continue
		}
		was := s.isBusy()
		l.inside -= s.inside
		s.inside, s.lost = 0, true
		s.rest(now)
		delete(l.flying, s)
		l.note(s, was)
	}
	l.full = l.inside >= tunnelLimit
}

func (l *lanes) isClosed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

func (l *lanes) depth() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bytes
}

// close drops what waits and wakes everybody.
func (l *lanes) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for _, s := range l.byAddr {
		l.empty(s)
	}
	l.empty(l.other)
	signal(l.ready)
}

// drop lets go of what Read was about to cut. Nobody reads any more.
func (l *lanes) drop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.byAddr {
		l.recycle(s)
	}
	for s := l.head; s != nil; s = s.next {
		l.recycle(s)
	}
	l.recycle(l.other)
}
