package forward

import "sync/atomic"

// Every flow has a floor of buffer space that nobody takes away. What it needs beyond is lent: by its session's purse, which
// borrows from the process's. A flow pays back what it does not use, so that idle connections cost their floors alone, and a
// job whose connections stall runs out of its own purse and of nobody else's.
//
// A send buffer that grows never takes more than half of what is left, so that the first large flows of a session leave
// something to the next. How fast a flow may grow is not bounded: on a long path it needs megabytes within a second.
//
// With more flows open than smallFrom, a session's new flows get smaller floors. So the most that one session can pin is
//
//	SessionBytes + smallFrom × (sendFloor + receiveFloor) + (SessionFlows − smallFrom) × 2 × smallFloor
//
// which is 172 MiB with the defaults, and the whole process TotalBytes beyond the floors of its flows.
const (
	sendFloor    = 64 << 10
	receiveFloor = 128 << 10
	smallFloor   = 8 << 10
	smallFrom    = 256 // flows of one session
)

// floors are the sizes that a flow's buffers begin with.
type floors struct{ send, receive int64 }

func floorsFor(open int) floors {
	if open > smallFrom {
		return floors{smallFloor, smallFloor}
	}
	return floors{sendFloor, receiveFloor}
}

// purse lends buffer space, in bytes.
type purse struct {
	limit int64
	from  *purse // lends it on; nil for the process's own
	lent  atomic.Int64
}

// take borrows n bytes; false where they are not to be had, or where less than spare would be left.
func (p *purse) take(n, spare int64) bool {
	if p.lent.Add(n) > p.limit-spare {
		p.lent.Add(-n)
		return false
	}
	if p.from != nil && !p.from.take(n, spare) {
		p.lent.Add(-n)
		return false
	}
	return true
}

// give pays n bytes back.
func (p *purse) give(n int64) {
	p.lent.Add(-n)
	if p.from != nil {
		p.from.give(n)
	}
}
