package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/culvertnet/culvert/internal/problem"
)

// Bounds on what a denial repeats.
const (
	maxShown    = 256 // bytes of a claim
	maxExpected = 20  // values of a rule
)

// nearest keeps the way to match that came closest so far.
type nearest struct {
	rule     *rule
	way      *way
	mismatch int // as firstMismatch gives it
	matched  int
}

// consider takes a way that did not match. Ties go to the earlier one.
func (n *nearest) consider(r *rule, w *way, c Claims) {
	mismatch := w.firstMismatch(c)
	if matched := w.countMatches(c); n.way == nil || matched > n.matched {
		*n = nearest{rule: r, way: w, mismatch: mismatch, matched: matched}
	}
}

func (w *way) countMatches(c Claims) int {
	n := 0
	for i := range w.claims {
		if got, ok := c.Get(w.claims[i].claim); ok && w.claims[i].match(got) {
			n++
		}
	}
	return n
}

// denial names the rule that came closest, nil for a stranger.
func (p *Policy) denial(now time.Time, network string, c Claims) *problem.Denial {
	var closest nearest
	for _, i := range p.pinned.candidates(c) {
		r := &p.rules[i]
		if !r.inForce(now, network) {
			continue
		}
		for j := range r.ways {
			if w := &r.ways[j]; w.appliesTo(c) && w.knows(c) {
				closest.consider(r, w, c)
			}
		}
	}
	return closest.denial(c)
}

func (n *nearest) denial(c Claims) *problem.Denial {
	if n.way == nil {
		return nil
	}
	claim, expected := claimEvent, []string(nil)
	if n.mismatch < len(n.way.claims) {
		claim, expected = n.way.claims[n.mismatch].claim, n.way.claims[n.mismatch].values
	} else {
		expected = n.way.expectedEvents()
	}
	if len(expected) > maxExpected {
		expected = append(slices.Clone(expected[:maxExpected]), fmt.Sprintf("… and %d more", len(expected)-maxExpected))
	}
	got, _ := c.Get(claim)
	return &problem.Denial{Rule: n.rule.name, Claim: claim, Expected: append([]string(nil), expected...), Got: shown(got)}
}

// shown shortens a claim for a person and drops what is no UTF-8.
func shown(s string) string {
	s = strings.ToValidUTF8(s, "�")
	if len(s) <= maxShown {
		return s
	}
	cut := maxShown
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "…"
}

// RuleResult is how far one rule came with a token.
type RuleResult struct {
	Rule    string
	Group   string // the group by which it matched or came closest; empty where the rule has none
	Matched bool   // the rule gives its grants
	Skipped string // why the rule does not apply at all: another network, another issuer, expired; then Claims is empty
	Claims  []ClaimResult
}

// Matches counts the claims that matched.
func (r *RuleResult) Matches() int {
	n := 0
	for i := range r.Claims {
		if r.Claims[i].Matched {
			n++
		}
	}
	return n
}

// ClaimResult is one claim of a rule's match, and what the token carries for it.
type ClaimResult struct {
	Claim    string
	Matched  bool
	Expected []string // as the file writes them
	Got      string   // shortened; empty where Present is false
	Present  bool
}

// Explain says of every rule, in file order, whether it matches and what stood in its way. It holds nothing back, so it
// is for the operator, not for the job.
func (p *Policy) Explain(now time.Time, network string, c Claims) []RuleResult {
	results := make([]RuleResult, 0, len(p.rules))
	for i := range p.rules {
		results = append(results, p.rules[i].explain(now, network, c))
	}
	return results
}

func (r *rule) explain(now time.Time, network string, c Claims) RuleResult {
	switch {
	case r.network != "" && r.network != network:
		return RuleResult{Rule: r.name, Skipped: "it is for network " + r.network}
	case r.expired(now):
		return RuleResult{Rule: r.name, Skipped: "it expired at " + r.expires.Format(time.RFC3339)}
	}
	var closest nearest
	for i := range r.ways {
		if w := &r.ways[i]; w.appliesTo(c) {
			if w.firstMismatch(c) < 0 {
				return w.explain(r, c)
			}
			closest.consider(r, w, c)
		}
	}
	if closest.way == nil {
		return RuleResult{Rule: r.name, Skipped: "it is for tokens of " + strings.Join(r.issuers(), " and ")}
	}
	return closest.way.explain(r, c)
}

// issuers lists the issuers of all ways to match.
func (r *rule) issuers() []string {
	var all []string
	for i := range r.ways {
		all = append(all, r.ways[i].issuers...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func (w *way) explain(r *rule, c Claims) RuleResult {
	result := RuleResult{Rule: r.name, Group: w.group, Matched: w.firstMismatch(c) < 0}
	for i := range w.claims {
		m := &w.claims[i]
		got, ok := c.Get(m.claim)
		result.Claims = append(result.Claims, ClaimResult{
			Claim: m.claim, Matched: ok && m.match(got), Expected: append([]string(nil), m.values...), Got: shown(got), Present: ok,
		})
	}
	if !w.mayTrigger(c) {
		result.Claims = w.explainEvent(result.Claims, c)
	}
	return result
}

// explainEvent marks the event as what differs, also where a wildcard under event_name let it through.
func (w *way) explainEvent(claims []ClaimResult, c Claims) []ClaimResult {
	for i := range claims {
		if claims[i].Claim == claimEvent {
			claims[i].Matched = false
			return claims
		}
	}
	got, ok := c.Get(claimEvent)
	return append(claims, ClaimResult{Claim: claimEvent, Expected: w.expectedEvents(), Got: shown(got), Present: ok})
}
