package netstack

import (
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// gsoMax bounds one segment of the stack with its headers: what an IP length field can say.
	gsoMax = 65535
	// queueLimit bounds what waits for Read, in bytes. It is a standing delay for everybody, 5 ms at 3 Gbit/s, and must
	// hold enough to keep WireGuard's batches full.
	queueLimit = 2 << 20
	// queueReserve is for packets that never wait: acknowledgements, resets, datagrams.
	queueReserve = 512 << 10
	// queueWait bounds how long a sender waits for room. The stack sends under its connection's lock and on the
	// goroutines that process acknowledgements, so waiting without limit would stop everything. It is long enough for a
	// reader that the scheduler has put off; once one wait has run out, nobody waits until Read has taken something.
	queueWait = 50 * time.Millisecond
)

// link is the stack's interface towards the tunnel: no link header, host GSO, and a queue that Read drains.
type link struct {
	mtu   uint32
	out   outbound
	acks  acks
	watch atomic.Pointer[Watch]

	mu         sync.RWMutex
	dispatcher stack.NetworkDispatcher
}

var (
	_ stack.LinkEndpoint = (*link)(nil)
	_ stack.GSOEndpoint  = (*link)(nil)
)

func newLink(mtu int, out outbound) *link {
	l := &link{mtu: uint32(mtu), out: out}
	l.acks.send = func(pkt *stack.PacketBuffer) {
		if !l.out.push(pkt) {
			pkt.DecRef()
		}
	}
	return l
}

// outbound is what waits between the stack and Read.
type outbound interface {
	push(pkt *stack.PacketBuffer) bool // takes over a reference unless it returns false
	read(bufs [][]byte, sizes []int, offset int) int
	block() bool // false says that it is closed
	isClosed() bool
	depth() int // bytes
	close()
	drop() // what read holds; nobody reads any more
}

// single is one queue for all that the stack sends.
type single struct {
	*queue
	split *splitter
}

func (s single) read(bufs [][]byte, sizes []int, offset int) int {
	return s.split.fill(s.queue, bufs, sizes, offset)
}

func (s single) depth() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes
}

func (s single) drop() { s.split.drop() }

// WritePackets queues what the stack sends. A packet for which there is no room in time is dropped and counted; to the
// stack it was sent, as on any wire, and TCP recovers.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	list, watch := pkts.AsSlice(), l.watch.Load()
	for i, pkt := range list {
		if watch != nil {
			watch.answered(pkt)
		}
		if !l.acks.pass(pkt) {
			continue
		}
		if !l.out.push(pkt.IncRef()) {
			pkt.DecRef()
			if l.out.isClosed() {
				return i, &tcpip.ErrClosedForSend{}
			}
		}
	}
	return len(list), nil
}

// MTU implements stack.LinkEndpoint.
func (l *link) MTU() uint32 { return l.mtu }

// SetMTU implements stack.LinkEndpoint; the MTU is fixed.
func (*link) SetMTU(uint32) {}

// GSOMaxSize implements stack.GSOEndpoint.
func (*link) GSOMaxSize() uint32 { return gsoMax }

// SupportedGSO implements stack.GSOEndpoint.
func (*link) SupportedGSO() stack.SupportedGSO { return stack.HostGSOSupported }

// Capabilities implements stack.LinkEndpoint. Receive checksum offload is not among them: Write marks what it has
// checked packet by packet, and the stack checks the rest.
func (*link) Capabilities() stack.LinkEndpointCapabilities { return stack.CapabilityNone }

// MaxHeaderLength implements stack.LinkEndpoint.
func (*link) MaxHeaderLength() uint16 { return 0 }

// LinkAddress implements stack.LinkEndpoint.
func (*link) LinkAddress() tcpip.LinkAddress { return "" }

// SetLinkAddress implements stack.LinkEndpoint.
func (*link) SetLinkAddress(tcpip.LinkAddress) {}

// ARPHardwareType implements stack.LinkEndpoint.
func (*link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }

// AddHeader implements stack.LinkEndpoint.
func (*link) AddHeader(*stack.PacketBuffer) {}

// ParseHeader implements stack.LinkEndpoint.
func (*link) ParseHeader(*stack.PacketBuffer) bool { return true }

// Attach implements stack.LinkEndpoint.
func (l *link) Attach(d stack.NetworkDispatcher) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dispatcher = d
}

// IsAttached implements stack.LinkEndpoint.
func (l *link) IsAttached() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.dispatcher != nil
}

// Wait implements stack.LinkEndpoint; the link has no goroutine.
func (*link) Wait() {}

// Close implements stack.LinkEndpoint; the device closes the queue itself.
func (*link) Close() {}

// SetOnCloseAction implements stack.LinkEndpoint.
func (*link) SetOnCloseAction(func()) {}

// queue holds packets between the stack and Read, bounded in bytes.
type queue struct {
	limit, reserve int
	wait           time.Duration
	counters       *counters

	mu      sync.Mutex
	ring    []*stack.PacketBuffer // length is a power of two
	head    int                   // index of the oldest
	count   int
	bytes   int
	waiters int
	stuck   bool // a wait ran out since Read last took something: waiting again is futile
	closed  bool

	ready chan struct{} // one token: there may be something to read, or the queue is closed
	room  chan struct{} // one token: there may be room again
}

func newQueue(limit, reserve int, wait time.Duration, c *counters) *queue {
	return &queue{
		limit: limit, reserve: reserve, wait: wait, counters: c,
		ring:  make([]*stack.PacketBuffer, 64),
		ready: make(chan struct{}, 1),
		room:  make(chan struct{}, 1),
	}
}

// push takes over a reference to pkt unless it returns false.
func (q *queue) push(pkt *stack.PacketBuffer) bool {
	size := pkt.Size()
	q.mu.Lock()
	if q.bytes+size > q.limit && !q.makeRoom(pkt, size) {
		if !q.closed {
			q.counters.overflow.Add(1)
		}
		q.mu.Unlock()
		return false
	}
	if q.closed {
		q.mu.Unlock()
		return false
	}
	q.append(pkt, size)
	first := q.count == 1
	q.mu.Unlock()
	if first {
		signal(q.ready)
	}
	return true
}

// makeRoom decides on a packet over the limit: small ones go into the reserve, TCP segments of the stack wait for a
// bounded time. It is called and returns with mu held.
func (q *queue) makeRoom(pkt *stack.PacketBuffer, size int) bool {
	if pkt.Data().Size() == 0 || pkt.GSOOptions.Type == stack.GSONone {
		return q.bytes+size <= q.limit+q.reserve
	}
	if q.stuck {
		return false
	}
	timer := time.NewTimer(q.wait)
	defer timer.Stop()
	for q.bytes+size > q.limit && !q.closed {
		q.waiters++
		q.mu.Unlock()
		expired := false
		select {
		case <-q.room:
		case <-timer.C:
			expired = true
		}
		q.mu.Lock()
		q.waiters--
		if expired {
			q.stuck = q.bytes+size > q.limit
			break
		}
	}
	q.wakeWriter()
	return q.bytes+size <= q.limit && !q.closed
}

// wakeWriter passes the token on while there is room and somebody waits for it. mu is held.
func (q *queue) wakeWriter() {
	if q.waiters > 0 && (q.bytes < q.limit*3/4 || q.closed) {
		signal(q.room)
	}
}

func (q *queue) append(pkt *stack.PacketBuffer, size int) {
	if q.count == len(q.ring) {
		grown := make([]*stack.PacketBuffer, 2*len(q.ring))
		for i := range q.count {
			grown[i] = q.ring[(q.head+i)&(len(q.ring)-1)]
		}
		q.ring, q.head = grown, 0
	}
	q.ring[(q.head+q.count)&(len(q.ring)-1)] = pkt
	q.count++
	q.bytes += size
}

// take appends to into what waits, until it has so many bytes, and hands over the references.
func (q *queue) take(into []*stack.PacketBuffer, bytes int) []*stack.PacketBuffer {
	q.mu.Lock()
	defer q.mu.Unlock()
	for bytes > 0 && q.count > 0 {
		pkt := q.ring[q.head]
		q.ring[q.head] = nil
		q.head = (q.head + 1) & (len(q.ring) - 1)
		q.count--
		size := pkt.Size()
		q.bytes -= size
		bytes -= size
		into = append(into, pkt)
	}
	q.stuck = false
	q.wakeWriter()
	if q.count > 0 {
		signal(q.ready)
	}
	return into
}

// block waits until something may be there; false says that the queue is closed.
func (q *queue) block() bool {
	<-q.ready
	if q.isClosed() {
		signal(q.ready) // for the next one who asks
		return false
	}
	return true
}

func (q *queue) isClosed() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.closed
}

// close drops what waits and wakes everybody.
func (q *queue) close() {
	q.mu.Lock()
	q.closed = true
	for ; q.count > 0; q.count-- {
		q.ring[q.head].DecRef()
		q.ring[q.head] = nil
		q.head = (q.head + 1) & (len(q.ring) - 1)
	}
	q.bytes = 0
	q.wakeWriter()
	q.mu.Unlock()
	signal(q.ready)
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
