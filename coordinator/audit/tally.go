package audit

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

const (
	tallyEvery   = time.Minute
	tallySources = 256 // addresses that are told apart in that time, for each code
)

// Tally counts what is refused before anybody has proven anything, and jobs that no rule knows where there are many: once a minute one record says how many requests there
// were of each kind, and which address sent most of them. A record for each would let a stranger fill the disk.
type Tally struct {
	mu     sync.Mutex
	counts map[problem.Code]*tallied
}

type tallied struct {
	total  uint64
	source map[netip.Addr]uint64
}

// Add counts one request. It costs no more than a map's entry and never blocks.
func (t *Tally) Add(err error, from netip.Addr) {
	code := problem.CodeOf(err)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.counts == nil {
		t.counts = map[problem.Code]*tallied{}
	}
	c := t.counts[code]
	if c == nil {
		c = &tallied{source: map[netip.Addr]uint64{}}
		t.counts[code] = c
	}
	c.total++
	if _, known := c.source[from]; known || len(c.source) < tallySources {
		c.source[from]++
	}
}

// take gives what was counted, and begins again.
func (t *Tally) take() []Refusal {
	t.mu.Lock()
	counts := t.counts
	t.counts = nil
	t.mu.Unlock()
	out := make([]Refusal, 0, len(counts))
	for code, c := range counts {
		r := Refusal{Code: code, Count: c.total}
		var most uint64
		for addr, n := range c.source {
			if addr.IsValid() && (n > most || n == most && addr.String() < r.From) {
				most, r.From = n, addr.String()
			}
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b Refusal) int { return cmp.Compare(a.Code, b.Code) })
	return out
}

// record is the tally's record, if there is anything to say.
func (t *Tally) record() (Record, bool) {
	refusals := t.take()
	r := Record{Event: Refused, Status: statusFailure, Action: actionDenied, Message: "requests refused that have no record of their own",
		Unmapped: Unmapped{Refusals: refusals}}
	for _, one := range refusals {
		r.Count += one.Count
	}
	return r, len(refusals) > 0
}

// periodic writes the tally each minute and the log's head each second, until the log's life is over.
func (l *Log) periodic() {
	tallies, marks := time.NewTicker(tallyEvery), time.NewTicker(markEvery)
	defer tallies.Stop()
	defer marks.Stop()
	var marked uint64
	for {
		select {
		case <-tallies.C:
			l.noteTally()
		case <-marks.C:
			marked = l.mark(l.life, marked)
		case <-l.life.Done():
			ctx, cancel := context.WithTimeout(context.WithoutCancel(l.life), markTimeout)
			defer cancel()
			l.mark(ctx, marked)
			return
		}
	}
}

func (l *Log) noteTally() {
	if r, any := l.tally.record(); any {
		l.Note(r)
	}
}
