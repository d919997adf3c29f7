package policy

import (
	"slices"
	"time"
)

// shadow says which rule makes another one needless.
type shadow struct {
	by   *rule
	same bool // each gives what the other does
}

// shadows finds for every rule one that makes it needless: it matches every job that the rule matches, gives all of what
// the rule gives, and the rule does not shorten the sessions either. Of two that say the same only the later is needless.
func (p *Policy) shadows(now time.Time) []*shadow {
	out := make([]*shadow, len(p.rules))
	for i := range p.rules {
		b := &p.rules[i]
		if b.expired(now) {
			continue
		}
		for j := range p.rules {
			a := &p.rules[j]
			if i == j || a.expired(now) || !a.covers(b) {
				continue
			}
			same := b.covers(a)
			if !same || j < i {
				out[i] = &shadow{a, same}
				break
			}
		}
	}
	return out
}

// covers tells whether b is needless beside a. It may miss that, but never claims it wrongly.
func (a *rule) covers(b *rule) bool {
	switch {
	case a.network != "" && a.network != b.network:
		return false
	case b.maxSession != 0 && (a.maxSession == 0 || a.maxSession > b.maxSession):
		return false // b makes sessions shorter
	case !a.expires.IsZero() && (b.expires.IsZero() || b.expires.After(a.expires)):
		return false
	case !b.expires.IsZero() && !b.expires.Equal(a.expires):
		return false // b bounds sessions by its last day
	}
	for i := range b.ways {
		if !slices.ContainsFunc(a.ways, func(w way) bool { return w.covers(&b.ways[i]) }) {
			return false
		}
	}
	for i, n := range b.lines {
		if !slices.Contains(a.lines, n) && !a.coversLine(b.grants[i].Allow) {
			return false
		}
	}
	return true
}

// covers tells whether every token that matches b matches a.
func (a *way) covers(b *way) bool {
	for _, iss := range b.issuers {
		if !slices.Contains(a.issuers, iss) {
			return false
		}
	}
	for i := range a.claims {
		m := &a.claims[i]
		if !slices.ContainsFunc(b.on(m.claim), m.covers) {
			return false
		}
	}
	for _, e := range explicitEvents {
		if c := (claimsOf{claimEvent: e}); b.mayTrigger(c) && !a.mayTrigger(c) {
			return false
		}
	}
	return true
}

// claimsOf are claims that are asked about without a token.
type claimsOf map[string]string

// Get implements [Claims].
func (c claimsOf) Get(name string) (string, bool) {
	v, ok := c[name]
	return v, ok
}

// covers tells whether every value that o takes m takes too.
func (m *matcher) covers(o *matcher) bool {
	for i := range o.globs {
		if !slices.ContainsFunc(m.globs, func(g glob) bool { return g.covers(&o.globs[i]) }) {
			return false
		}
	}
	return true
}

// covers tells whether every value that o matches g matches too; both fold alike. A wildcard of o has to be taken up by
// one of g that is at least as wide.
func (g *glob) covers(o *glob) bool {
	if o.tokens == nil {
		return g.match(o.literal)
	}
	if g.tokens == nil {
		return false
	}
	known := map[[2]int]bool{}
	return g.coversFrom(o, 0, 0, known)
}

func (g *glob) coversFrom(o *glob, i, j int, known map[[2]int]bool) bool {
	at := [2]int{i, j}
	if _, ok := known[at]; ok {
		return known[at]
	}
	known[at] = false
	known[at] = g.coversHere(o, i, j, known)
	return known[at]
}

func (g *glob) coversHere(o *glob, i, j int, known map[[2]int]bool) bool {
	if i == len(g.tokens) {
		return j == len(o.tokens)
	}
	t := g.tokens[i]
	if t.kind != globChar && g.coversFrom(o, i+1, j, known) {
		return true
	}
	if j == len(o.tokens) {
		return false
	}
	u := o.tokens[j]
	switch t.kind {
	case globChar:
		return u.kind == globChar && u.char == t.char && g.coversFrom(o, i+1, j+1, known)
	case globStar:
		if u.kind == globDouble || u.kind == globChar && u.char == '/' {
			return false
		}
	}
	return g.coversFrom(o, i, j+1, known)
}

// coversLine tells whether one of the rule's allow lines opens all that a line opens.
func (r *rule) coversLine(text string) bool {
	l, err := parseLine(text)
	if text == "" || err != nil {
		return false
	}
	for i := range r.grants {
		own, err := parseLine(r.grants[i].Allow)
		if r.grants[i].Allow != "" && err == nil && own.covers(&l) {
			return true
		}
	}
	return false
}

// covers tells whether l opens all that o opens. A range does not cover an exact address, which opens more.
func (l *line) covers(o *line) bool {
	if l.protos&o.protos != o.protos || !portsCover(l.ports, o.ports) {
		return false
	}
	switch {
	case l.internet || o.internet:
		return l.internet == o.internet
	case l.host.name != "" || o.host.name != "":
		return l.host.name != "" && o.host.name != "" && l.host.covers(o.host)
	case o.prefix.IsSingleIP() && closedBy(o.prefix.Addr()) != nil:
		return l.prefix == o.prefix
	}
	return l.prefix.Bits() <= o.prefix.Bits() && l.prefix.Contains(o.prefix.Addr())
}

// portsCover tells whether every port of b is in a; both are merged and sorted.
func portsCover(a, b []portRange) bool {
	for _, r := range b {
		if !slices.ContainsFunc(a, func(own portRange) bool { return own.lo <= r.lo && r.hi <= own.hi }) {
			return false
		}
	}
	return true
}
