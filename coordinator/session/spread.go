package session

import (
	"cmp"
	"hash/fnv"
	"io"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/culvertnet/culvert/coordinator/state"
)

// placedFor is how long a session that this node has placed may count on top of what its gateway's presence says: by then the
// presence surely counts it, however clocks differ.
const placedFor = time.Second

// placements are the sessions that this node is placing, or has placed within the last moment, by gateway instance. Without them,
// jobs that join at once would all meet the gateway that was the least loaded before the first of them.
type placements struct {
	mu sync.Mutex
	by map[string]*placed
}

// placed are those of one gateway.
type placed struct {
	asked    int         // it has not answered for these
	answered []time.Time // and for these it has, the oldest first
}

// note counts a session that is offered to a gateway. answered is to be called with when it has answered.
func (p *placements) note(instance string) (answered func(time.Time)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.by == nil {
		p.by = map[string]*placed{}
	}
	its := p.by[instance]
	if its == nil {
		its = &placed{}
		p.by[instance] = its
	}
	its.asked++
	return func(at time.Time) {
		p.mu.Lock()
		defer p.mu.Unlock()
		its.asked--
		its.answered = append(its.answered, at)
	}
}

// beyond counts what a presence does not count, and forgets what any must by now.
func (p *placements) beyond(g *state.Presence, now time.Time) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	its := p.by[g.Instance]
	if its == nil {
		return 0
	}
	its.answered = its.answered[after(its.answered, now.Add(-placedFor)):]
	if its.asked == 0 && len(its.answered) == 0 {
		delete(p.by, g.Instance)
	}
	return its.asked + len(its.answered) - after(its.answered, g.Counted)
}

// after gives the place of the first time that is after at.
func after(times []time.Time, at time.Time) int {
	return sort.Search(len(times), func(i int) bool { return times[i].After(at) })
}

// spread orders a network's gateways for a session: the less loaded of two that its id picks, then the others, the least loaded
// first. Several nodes that know of each other's sessions a moment late would all rush to the one that is the least loaded of all;
// of two that each session picks for itself, they do not.
func (m *Manager) spread(id string, gateways []state.Presence) []state.Presence {
	now := m.opts.Now()
	lighter := func(a, b state.Presence) int {
		return cmp.Or(cmp.Compare(a.Sessions, b.Sessions), cmp.Compare(a.Instance, b.Instance))
	}
	out := slices.Clone(gateways)
	for i := range out {
		out[i].Sessions += m.placed.beyond(&out[i], now)
	}
	if len(out) > 2 {
		draw(id, out)
		slices.SortFunc(out[:2], lighter)
		slices.SortFunc(out[1:], lighter)
		return out
	}
	slices.SortFunc(out, lighter)
	return out
}

// draw puts two gateways to the front, by a session's id: the first two of the order that is its own.
func draw(id string, list []state.Presence) {
	ranks := make([]uint64, len(list))
	for i := range list {
		ranks[i] = rank(id, &list[i])
	}
	for place := range 2 {
		best := place
		for i := place + 1; i < len(list); i++ {
			if ranks[i] < ranks[best] {
				best = i
			}
		}
		list[place], list[best] = list[best], list[place]
		ranks[place], ranks[best] = ranks[best], ranks[place]
	}
}

// rank is a gateway's place in the order that is a session's own.
func rank(id string, g *state.Presence) uint64 {
	h := fnv.New64a()
	_, _ = io.WriteString(h, id)
	_, _ = io.WriteString(h, g.Instance)
	x := h.Sum64()
	x ^= x >> 33 // FNV mixes the last bytes badly upwards
	x *= 0xff51afd7ed558ccd
	return x ^ x>>33
}
