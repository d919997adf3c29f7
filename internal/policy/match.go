package policy

import (
	"slices"
	"strings"
)

// matcher holds one key of a rule's match.
type matcher struct {
	claim  string
	values []string // as the file writes them, for denials
	globs  []glob
}

func newMatcher(claim string, values []string) matcher {
	k, _ := lookup(claim)
	m := matcher{claim: claim, values: values}
	for _, v := range values {
		m.globs = append(m.globs, compileGlob(v, k.fold))
	}
	return m
}

func (m *matcher) match(value string) bool {
	for i := range m.globs {
		if m.globs[i].match(value) {
			return true
		}
	}
	return false
}

// pin is by what a rule is tied to owners or repositories: the surest claim of the four that it matches on with
// literal values only.
type pin struct {
	found bool
	who   matcher // whether a token comes from an owner (or, for repository_id, a repository) that is pinned
}

// literal tells whether every value is spelt out.
func (m *matcher) literal() bool {
	for i := range m.globs {
		if m.globs[i].tokens != nil {
			return false
		}
	}
	return len(m.globs) > 0
}

// findPin looks for the pin of what has to match together: a numeric owner id, an owner's name, the owner part of a
// repository's name, a numeric repository id. Every value has to pin, because any of them may match.
func findPin(claims []matcher) pin {
	for _, claim := range []string{claimOwnID, claimOwner, claimRepo, claimRepoID} {
		for i := range claims {
			if claims[i].claim != claim {
				continue
			}
			if values := pinned(claim, claims[i].values); len(values) > 0 {
				as := claim
				if claim == claimRepo {
					as = claimOwner
				}
				return pin{found: true, who: newMatcher(as, values)}
			}
		}
	}
	return pin{}
}

// pinned gives the owners (or the repository ids) that values tie a rule to, nil where one of them ties it to none.
func pinned(claim string, values []string) []string {
	var out []string
	for _, v := range values {
		if claim == claimRepo {
			owner, name, ok := strings.Cut(v, "/")
			if !ok || name == "" {
				return nil
			}
			v = owner
		}
		if v == "" || strings.Contains(v, "*") {
			return nil
		}
		out = append(out, v)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// knows tells whether the token comes from an owner that the rule pins. A rule that pins only repository ids knows the
// repository's own jobs and nobody else.
func (w *way) knows(c Claims) bool {
	m := &w.pin.who
	got, ok := c.Get(m.claim)
	if !ok && m.claim == claimOwner {
		repo, _ := c.Get(claimRepo)
		got, _, ok = strings.Cut(repo, "/")
	}
	return ok && m.match(got)
}
