package tunnel

import (
	"cmp"
	"slices"
	"time"
)

// choose moves traffic where that is better.
func (e *engine) choose(now time.Time, why string) {
	best := e.best(nil)
	if best == nil || best == e.chosen {
		return
	}
	if e.chosen == nil || !e.chosen.valid || e.better(best, e.chosen) && e.steady(best, now) && e.takes(best) {
		e.use(best, now, why)
	}
}

// best gives the best validated path but for one; nil if there is none.
func (e *engine) best(but *path) *path {
	var best *path
	for _, p := range e.paths {
		if p.valid && p != but && (best == nil || e.order(p, best) < 0) {
			best = p
		}
	}
	return best
}

// order compares two validated paths: the nominated one, then kind, then round-trip time.
func (e *engine) order(a, b *path) int {
	switch e.nominee {
	case nil:
	case a:
		return -1
	case b:
		return 1
	}
	return cmp.Or(cmp.Compare(a.rank(), b.rank()), cmp.Compare(a.srtt, b.srtt))
}

// better reports whether a is enough better than the chosen b to move: by nomination or kind always, by round-trip time only with a
// fifth and two milliseconds to spare, so that traffic does not flap between equals. Where the leader has named a path that is
// not validated yet, traffic stays.
func (e *engine) better(a, b *path) bool {
	switch {
	case e.nominee != nil:
		return a == e.nominee
	case a.rank() != b.rank():
		return a.rank() < b.rank()
	}
	return e.lead && a.srtt < b.srtt-max(b.srtt/5, 2*time.Millisecond)
}

// takes reports whether what the session sends is known to fit a path, or at least what does.
func (e *engine) takes(p *path) bool {
	return !e.lead || e.mtu == 0 || p.size.stands > 0 || p.size.found >= e.mtu
}

// steady reports whether a path may take over from one that works. Where it has been lost again and again it has to last first.
func (e *engine) steady(p *path, now time.Time) bool {
	if p.lostAt.IsZero() || now.Sub(p.lostAt) >= steadyFor {
		p.losses = 0
	}
	if p.losses <= steadyAfter {
		return true
	}
	hold := min(time.Second<<min(p.losses-steadyAfter-1, 8), steadyMost)
	if now.Sub(p.since) >= hold {
		return true
	}
	p.next = p.since.Add(hold)
	return false
}

// use makes p carry the traffic.
func (e *engine) use(p *path, now time.Time, why string) {
	e.chosen = p
	if p != nil && e.lead {
		p.next = now // tell the other side
	}
	if p == nil && e.lead {
		for _, q := range e.paths { // nothing is left: everything is worth a try again
			q.tries, q.next = 0, now
		}
	}
	c := Change{At: now, Why: why}
	if p != nil {
		c.Path = p.public()
	}
	e.history = append(e.history, c)
	if len(e.history) > historySize {
		e.history = slices.Delete(e.history, 0, 1)
	}
	e.onChange(p)
}
