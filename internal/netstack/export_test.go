package netstack

import "gvisor.dev/gvisor/pkg/tcpip/stack"

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
func Fragments(packet []byte, limit int) [][]byte { return new(splitter).fragments(packet, limit) }

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
