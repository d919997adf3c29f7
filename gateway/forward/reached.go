package forward

import (
	"cmp"
	"net"
	"slices"
	"strconv"
	"sync"

	"github.com/culvertnet/culvert/internal/wire"
)

// reached adds up what a session has reached and what it was denied, by target, for the job's own eyes. It is bounded: of each kind it
// keeps the first targets, and counts what goes to others.
type reached struct {
	mu   sync.Mutex
	all  map[reachedKey]*wire.Reached // nil until the first
	kept [2]int                       // let through, turned away
	more uint64
}

type reachedKey struct {
	proto, target string
	verdict       wire.FlowVerdict
}

// add takes what became of a flow that has ended, or of several.
func (r *reached) add(f wire.FlowRecord) {
	key := reachedKey{f.Proto, reachedTarget(f), f.Verdict}
	kind := 0
	if f.Verdict == wire.FlowRefused || f.Verdict == wire.FlowOverLimits {
		kind = 1
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	sum := r.all[key]
	if sum == nil {
		if r.kept[kind] == wire.MaxReached/2 {
			r.more += max(f.Count, 1)
			return
		}
		if r.all == nil {
			r.all = map[reachedKey]*wire.Reached{}
		}
		r.kept[kind]++
		sum = &wire.Reached{Proto: key.proto, Target: key.target, Verdict: key.verdict}
		r.all[key] = sum
	}
	sum.Flows += max(f.Count, 1)
	sum.BytesUp += f.BytesUp
	sum.BytesDn += f.BytesDn
	sum.Rule, sum.Reason, sum.Cause = f.Rule, f.Reason, f.Cause
}

// list gives a copy, what was turned away last, and how many flows are not in it.
func (r *reached) list() (list []wire.Reached, more uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, sum := range r.all {
		list = append(list, *sum)
	}
	slices.SortFunc(list, func(a, b wire.Reached) int {
		return cmp.Or(cmp.Compare(a.Verdict, b.Verdict), cmp.Compare(a.Target, b.Target), cmp.Compare(a.Proto, b.Proto))
	})
	return list, r.more
}

// reachedTarget is how a rule would name the target: by the name that the job used, where it used one.
func reachedTarget(f wire.FlowRecord) string {
	host, port := f.Name, f.Addr.Port()
	if host == "" {
		host = f.Addr.Addr().Unmap().String()
	}
	if port == 0 {
		return host
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}

// tell passes on what became of a flow that has ended.
func (s *Session) tell(r wire.FlowRecord) {
	s.reached.add(r)
	s.f.trace(r)
}

// Reached adds up what the session has reached and was denied, open flows included, and how many flows went elsewhere.
func (s *Session) Reached() ([]wire.Reached, uint64) {
	s.mu.Lock()
	open := make([]*flow, 0, min(len(s.flows), wire.MaxReached))
	for _, fl := range s.flows {
		if !fl.served && len(open) < wire.MaxReached {
			open = append(open, fl)
		}
	}
	s.mu.Unlock()
	list, more := s.reached.list()
	now := reached{more: more}
	for _, sum := range list {
		now.add(wire.FlowRecord{Proto: sum.Proto, Name: sum.Target, Verdict: sum.Verdict, Rule: sum.Rule, Reason: sum.Reason,
			BytesUp: sum.BytesUp, BytesDn: sum.BytesDn, Cause: sum.Cause, Count: sum.Flows})
	}
	for _, fl := range open {
		now.add(fl.record(wire.CauseOpen))
	}
	return now.list()
}
