// Package trace keeps what became of flows until the coordinator has recorded it.
//
//	forward ── record ──▶ Log ── batch ──▶ stream ──▶ coordinator
//	                       ▲                              │
//	                       └────────── acknowledged ──────┘
//
// Flows that were let through wait in a queue; when it is full they are lost, and counted. Denials are never lost: those of
// one session and target that wait together become one record with their number, and where a session scans more targets than
// there is room for, those of several targets do. So what the log takes is bounded, whatever jobs do and for however long the
// coordinator is away.
package trace

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// Options configure a [Log].
type Options struct {
	Queue    int           // records of flows that wait; default 32768
	Denials  int           // sums of denials that wait; default 8192
	Targets  int           // of those, of one session; default 64
	Batches  int           // batches that wait to be acknowledged; default 64
	Interval time.Duration // how long records wait for others; default 1 s
	Wake     func()        // called when there may be a batch to send; must not block nor call the log
}

// Validate fills in defaults.
func (o *Options) Validate() error {
	if min(o.Queue, o.Denials, o.Targets, o.Batches) < 0 || o.Interval < 0 {
		return errors.New("a limit of the flow log cannot be negative")
	}
	set := func(v *int, to int) {
		if *v == 0 {
			*v = to
		}
	}
	set(&o.Queue, 32768)
	set(&o.Denials, 8192)
	set(&o.Targets, 64)
	set(&o.Batches, 64)
	if o.Interval == 0 {
		o.Interval = time.Second
	}
	if o.Wake == nil {
		o.Wake = func() {}
	}
	return nil
}

// Log collects records and gives them out in batches. Its methods never block.
type Log struct {
	opts Options

	mu      sync.Mutex
	queue   []wire.FlowRecord
	sums    map[target]*wire.FlowRecord
	order   []*wire.FlowRecord // sums, oldest first
	perID   map[string]int     // sums of each session
	batches []wire.Flows       // sent and not acknowledged, or to be sent again
	sent    int                // of batches, how many the present stream has taken
	seq     uint64
	due     time.Time // when what waits is to be sent; zero when nothing waits
	timer   *time.Timer
	closed  bool
	dropped uint64
	total   uint64
}

// target is what denials are added up by. Where details give way, addr loses its port, then everything but the session does.
type target struct {
	session, proto, name, reason string
	addr                         netip.AddrPort
	verdict                      wire.FlowVerdict
}

// New makes a log.
func New(opts Options) (*Log, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	return &Log{opts: opts, sums: map[target]*wire.FlowRecord{}, perID: map[string]int{}}, nil
}

// Add takes a record. Those with a Count are added up.
func (l *Log) Add(r wire.FlowRecord) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total++
	if r.Count > 0 {
		l.sum(r)
	} else if len(l.queue) >= l.opts.Queue {
		l.dropped++
		return
	} else {
		l.queue = append(l.queue, r)
	}
	if len(l.queue)+len(l.order) >= wire.MaxFlowRecords {
		l.due = time.Now()
		l.opts.Wake()
		return
	}
	if l.due.IsZero() && !l.closed {
		l.due = time.Now().Add(l.opts.Interval)
		l.timer = time.AfterFunc(l.opts.Interval, l.opts.Wake)
	}
}

// reasonSeveral stands in sums that hold more than one target's denials.
const reasonSeveral = "several targets"

// sum adds a denial to those of its session and target, with less detail where there is no room. mu is held.
func (l *Log) sum(r wire.FlowRecord) {
	key := target{r.Session, r.Proto, r.Name, r.Reason, r.Addr, r.Verdict}
	for level := 0; ; level++ {
		switch level {
		case 1:
			key.addr, key.name = netip.AddrPortFrom(key.addr.Addr(), 0), parent(key.name)
		case 2:
			key.addr, key.name, key.reason = netip.AddrPort{}, "", reasonSeveral
		case 3:
			key.session = ""
		}
		if have := l.sums[key]; have != nil {
			have.Count += r.Count
			have.Lasted = wire.Duration(max(r.Began.Sub(have.Began), 0))
			return
		}
		if l.hasRoom(key.session, level) {
			break
		}
	}
	sum := r // r itself stays on the stack: most denials are added to others
	if key.reason == reasonSeveral {
		sum.Rule = ""
	}
	sum.Flow, sum.Session, sum.Name, sum.Addr, sum.Reason = 0, key.session, key.name, key.addr, key.reason
	l.sums[key] = &sum
	l.order = append(l.order, &sum)
	l.perID[key.session]++
}

// hasRoom tells whether another sum of this much detail may be begun. mu is held.
func (l *Log) hasRoom(session string, level int) bool {
	n := l.perID[session]
	switch level {
	case 0:
		return len(l.order) < l.opts.Denials && n < (l.opts.Targets+1)/2
	case 1:
		return len(l.order) < l.opts.Denials && n < l.opts.Targets
	case 2:
		return len(l.order) < 2*l.opts.Denials
	}
	return true // one for each protocol and verdict
}

// parent is the domain that a refused name lies in: a session that asks for ever new names below one is told of as one.
func parent(name string) string {
	for i := range len(name) {
		if name[i] == '.' {
			return name[i+1:]
		}
	}
	return name
}

// Next gives the next batch to send, and whether there is one now: one that is to be sent again, or a new one if records have
// waited long enough, or are enough, and no more than may be are unacknowledged.
func (l *Log) Next() (wire.Flows, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sent < len(l.batches) {
		l.sent++
		return l.batches[l.sent-1], true
	}
	if l.due.IsZero() || time.Now().Before(l.due) || len(l.batches) >= l.opts.Batches {
		return wire.Flows{}, false
	}
	b := l.take()
	l.batches = append(l.batches, b)
	l.sent++
	return b, true
}

// take makes a batch of what waits, denials first. mu is held.
func (l *Log) take() wire.Flows {
	l.seq++
	b := wire.Flows{Seq: l.seq, Dropped: l.dropped}
	n := min(len(l.order), wire.MaxFlowRecords)
	for _, r := range l.order[:n] {
		b.Records = append(b.Records, *r)
		delete(l.sums, target{r.Session, r.Proto, r.Name, r.Reason, r.Addr, r.Verdict})
		if l.perID[r.Session]--; l.perID[r.Session] == 0 {
			delete(l.perID, r.Session)
		}
	}
	l.order = advance(l.order, n)
	n = min(len(l.queue), wire.MaxFlowRecords-n)
	b.Records = append(b.Records, l.queue[:n]...)
	l.queue = advance(l.queue, n)
	if len(l.order)+len(l.queue) == 0 {
		l.due = time.Time{}
	}
	return b
}

// advance takes n off the front of a list. What is left moves to new room when the list grows the next time.
func advance[T any](list []T, n int) []T {
	clear(list[:n])
	if n == len(list) {
		return nil
	}
	return list[n:]
}

// Acked forgets the batches up to seq.
func (l *Log) Acked(seq uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	full := len(l.batches) >= l.opts.Batches
	for len(l.batches) > 0 && l.batches[0].Seq <= seq && l.sent > 0 {
		l.batches = slices.Delete(l.batches, 0, 1)
		l.sent--
	}
	if full && !l.due.IsZero() {
		l.opts.Wake()
	}
}

// Again makes every batch that is not acknowledged be given out anew: a stream has ended.
func (l *Log) Again() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent = 0
}

// Flush makes what waits be given out at once.
func (l *Log) Flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.due.IsZero() {
		l.due = time.Now()
	}
	l.opts.Wake()
}

// Close ends the log's timer. What is added afterwards is kept but not called for.
func (l *Log) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	if l.timer != nil {
		l.timer.Stop()
	}
}

// Stats are what a log has done since it was made, and what waits in it.
type Stats struct {
	Records  uint64 // taken, each denial counted
	Dropped  uint64 // lost to a full queue
	Waiting  int    // records and sums
	Unproven int    // batches that are not acknowledged
}

// Stats reads the counters.
func (l *Log) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Stats{Records: l.total, Dropped: l.dropped, Waiting: len(l.queue) + len(l.order), Unproven: len(l.batches)}
}
