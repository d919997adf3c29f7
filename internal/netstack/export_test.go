package netstack

import (
	"net/netip"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// What tests look at from outside.
const (
	QueueLimit = queueLimit
	QueueWait  = queueWait
)

// SegmentSize is segmentSize.
var SegmentSize = segmentSize

// Queue is a device's outbound queue on its own.
type Queue struct{ *queue }

// NewQueue makes a queue as a device has it.
func NewQueue() Queue { return Queue{newQueue(queueLimit, queueReserve, queueWait, new(counters))} }

// Push takes over pkt.
func (q Queue) Push(pkt *stack.PacketBuffer) {
	if !q.push(pkt) {
		pkt.DecRef()
	}
}

// Take reads so many bytes and gives the number of packets.
func (q Queue) Take(bytes int) int {
	pkts := q.take(nil, bytes)
	for _, pkt := range pkts {
		pkt.DecRef()
	}
	return len(pkts)
}

// Bytes is what waits.
func (q Queue) Bytes() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.bytes
}

// Overflow counts what was dropped.
func (q Queue) Overflow() uint64 { return q.counters.overflow.Load() }

// Close closes the queue.
func (q Queue) Close() { q.close() }

// Send queues a packet as the stack does.
func (d *Device) Send(pkt *stack.PacketBuffer) {
	var list stack.PacketBufferList
	list.PushBack(pkt)
	_, _ = d.link.WritePackets(list)
}

// Fragments cuts a packet.
func Fragments(packet []byte, limit int) [][]byte {
	return (&splitter{ident: new(uint32)}).fragments(packet, limit)
}

// Lanes are a gateway's outbound lanes on their own.
type Lanes struct{ *lanes }

// NewLanes makes lanes as a device has them.
func NewLanes() Lanes {
	c := new(counters)
	return Lanes{newLanes(c, func() *splitter {
		return &splitter{mtu: DefaultMTU, counters: c, path: new(atomic.Pointer[func(netip.Addr) int]), ident: new(uint32)}
	})}
}

// Open is [Device.OpenLane].
func (l Lanes) Open(addrs ...netip.Addr) *Lane { return l.open(addrs) }

// Push takes over pkt; false where it was dropped.
func (l Lanes) Push(pkt *stack.PacketBuffer) bool {
	ok := l.push(pkt)
	if !ok {
		pkt.DecRef()
	}
	return ok
}

// Read gives the destinations and sizes of the packets that a Read would give now.
func (l Lanes) Read(bufs [][]byte) (to []netip.Addr, sizes []int) {
	sizes = make([]int, len(bufs))
	n := l.read(bufs, sizes, 0)
	for _, p := range bufs[:n] {
		to = append(to, netip.AddrFrom4([4]byte(p[16:20])))
	}
	return to, sizes[:n]
}

// Block waits as Read does.
func (l Lanes) Block() bool { return l.block() }

// Depth is what waits, in bytes.
func (l Lanes) Depth() int { return l.depth() }

// Inside is how many packets the tunnel has not sent.
func (l Lanes) Inside() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.inside
}

// Close closes the lanes.
func (l Lanes) Close() { l.close(); l.drop() }

// Delays of acknowledgements.
const (
	AckDelay = ackDelay
	AckSmall = ackSmall
)

// Acks holds acknowledgements back on its own.
type Acks struct{ acks }

// NewAcks makes one that gives send what has waited for long enough.
func NewAcks(send func(*stack.PacketBuffer)) *Acks { return &Acks{acks{send: send}} }

// Pass reports whether a packet goes out at once. It leaves the caller its reference.
func (a *Acks) Pass(pkt *stack.PacketBuffer) bool { return a.pass(pkt) }

// Spared counts what never went out.
func (a *Acks) Spared() uint64 { return a.spared.Load() }

// Close forgets what waits.
func (a *Acks) Close() { a.close() }
