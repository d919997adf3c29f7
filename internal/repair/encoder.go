package repair

// Budget of parities: what is added is at most a quarter of what is sent, in bytes, beside a fixed allowance.
const (
	budgetShare = 4       // a packet earns its length divided by this
	budgetMost  = 1 << 15 // this much is saved up at most, and there at first
)

// Encoder makes parities for the packets to one peer. It is not safe for concurrent use.
type Encoder struct {
	acc     [MaxPacket]byte // sum of the packets of the group that is being filled
	n       int             // how many these are
	longest int
	lengths uint16
	index   uint32
	base    uint64
	budget  int
}

// NewEncoder gives an encoder.
func NewEncoder() *Encoder { return &Encoder{budget: budgetMost} }

// Add takes the next packet that is sent. When that completes a group, it appends the group's parity to dst. Packets that are no
// transport messages, or longer than [MaxPacket], belong to no group. Where a counter is left out, the group begins anew.
func (e *Encoder) Add(dst, pkt []byte) []byte {
	if !IsTransport(pkt) || len(pkt) > MaxPacket {
		return dst
	}
	e.budget = min(e.budget+len(pkt)/budgetShare, budgetMost)
	idx, count := index(pkt), counter(pkt)
	if e.n > 0 && (idx != e.index || count != e.base+uint64(e.n)) {
		e.clear()
	}
	if e.n == 0 {
		e.index, e.base = idx, count
	}
	mix(e.acc[:], pkt)
	e.n++
	e.longest = max(e.longest, len(pkt))
	e.lengths ^= uint16(len(pkt))
	if e.n < GroupSize {
		return dst
	}
	return e.finish(dst)
}

// Open reports whether there are packets that no parity covers yet, and the budget has room for one. base tells their group from others.
func (e *Encoder) Open() (base uint64, open bool) { return e.base, e.n > 0 && e.budget >= e.longest }

// Flush appends the parity of a group that is not full to dst, if the budget has room for it. A group that it has no room for stays open.
func (e *Encoder) Flush(dst []byte) []byte {
	if _, open := e.Open(); !open {
		return dst
	}
	return e.finish(dst)
}

// finish ends the group. It has no parity where small packets are grouped with a large one, which would cost too much.
func (e *Encoder) finish(dst []byte) []byte {
	if e.budget >= e.longest {
		e.budget -= e.longest
		putHeader(e.acc[:], e.index, e.base, e.n, e.lengths)
		dst = append(dst, e.acc[:e.longest]...)
	}
	e.clear()
	return dst
}

func (e *Encoder) clear() {
	clear(e.acc[:e.longest])
	e.n, e.longest, e.lengths = 0, 0, 0
}
