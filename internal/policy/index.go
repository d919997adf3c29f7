package policy

import (
	"slices"
	"strings"
)

// index finds the rules that may match a token by whose it is, so that a decision costs the same with ten rules or with
// thousands. Every way to match a rule is filed under each value of its most telling claim that is spelt out; there is
// one, because every way is pinned.
type index map[indexKey][]int32

type indexKey struct {
	claim string
	value string // in lower case for names
}

// file adds a rule under each value of a claim.
func (x index) file(rule int, claim string, values []string) {
	for _, v := range values {
		k := indexKey{claim, v}
		if list := x[k]; len(list) == 0 || list[len(list)-1] != int32(rule) {
			x[k] = append(list, int32(rule))
		}
	}
}

// telling gives the claim by which a way is filed, and its values as the index knows them.
func (w *way) telling() (claim string, values []string) {
	for _, claim := range []string{claimRepoID, claimRepo} {
		if m := w.shortest(claim); m != nil {
			return claim, keysOf(m)
		}
	}
	return w.pin.who.claim, keysOf(&w.pin.who)
}

// shortest gives the matcher on a claim with the fewest values, all of them spelt out; nil where there is none.
func (w *way) shortest(claim string) *matcher {
	var best *matcher
	for i := range w.claims {
		m := &w.claims[i]
		if m.claim == claim && m.literal() && (best == nil || len(m.values) < len(best.values)) {
			best = m
		}
	}
	return best
}

func keysOf(m *matcher) []string {
	keys := make([]string, len(m.values))
	for i, v := range m.values {
		if keys[i] = v; m.claim == claimRepo || m.claim == claimOwner {
			keys[i] = lowered(v)
		}
	}
	return keys
}

// candidates gives the numbers of the rules that may match, in order. All others do not.
func (x index) candidates(c Claims) []int32 {
	var out []int32
	add := func(claim, value string, ok bool) {
		if ok && value != "" {
			out = append(out, x[indexKey{claim, value}]...)
		}
	}
	id, ok := c.Get(claimRepoID)
	add(claimRepoID, id, ok)
	id, ok = c.Get(claimOwnID)
	add(claimOwnID, id, ok)
	repo, ok := c.Get(claimRepo)
	repo = lowered(repo)
	add(claimRepo, repo, ok)
	owner, _, ok := strings.Cut(repo, "/")
	add(claimOwner, owner, ok)
	name, ok := c.Get(claimOwner)
	if name = lowered(name); name != owner {
		add(claimOwner, name, ok)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// lowered folds ASCII letters alone, as matching does.
func lowered(s string) string {
	if strings.IndexFunc(s, func(r rune) bool { return 'A' <= r && r <= 'Z' }) < 0 {
		return s
	}
	b := []byte(s)
	for i := range b {
		b[i] = lower(b[i])
	}
	return string(b)
}
