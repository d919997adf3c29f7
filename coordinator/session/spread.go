package session

import (
	"cmp"
	"hash/fnv"
	"io"
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

// spread orders a network's gateways for a session, as many as are asked: the less loaded of two that its id picks, then of the others the least
// loaded ones. Several nodes that know of each other's sessions a moment late would all rush to the one that is the least loaded of all;
// of two that each session picks for itself, they do not. The list is changed.
func (m *Manager) spread(id string, list []state.Presence) []state.Presence {
	now := m.opts.Now()
	for i := range list {
		list[i].Sessions += m.placed.beyond(&list[i], now)
	}
	if len(list) > 2 {
		draw(id, list)
		lightest(list[:2], 1)
		lightest(list[1:], m.opts.MaxOffers-1)
	} else {
		lightest(list, len(list))
	}
	return list[:min(len(list), m.opts.MaxOffers)]
}

// lightest puts the n least loaded gateways of a list to its front, the least loaded first. To sort all for each join would cost more.
func lightest(list []state.Presence, n int) {
	for place := range min(n, len(list)) {
		best := place
		for i := place + 1; i < len(list); i++ {
			if cmp.Or(cmp.Compare(list[i].Sessions, list[best].Sessions), cmp.Compare(list[i].Instance, list[best].Instance)) < 0 {
				best = i
			}
		}
		list[place], list[best] = list[best], list[place]
	}
}

// draw puts two gateways to the front, by a session's id: the first two of the order that is its own.
func draw(id string, list []state.Presence) {
	var room [64]uint64
	ranks := append(room[:0], make([]uint64, len(list))...)
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
