package policy

import (
	"strings"
	"unicode/utf8"

	"github.com/culvertnet/culvert/internal/problem"
)

// maxShown bounds how much of a claim a denial repeats, in bytes.
const maxShown = 256

// nearest keeps the rule that came closest so far.
type nearest struct {
	rule     *rule
	mismatch int // as firstMismatch gives it
	matched  int
}

// consider takes a rule that did not match. Ties go to the earlier rule.
func (n *nearest) consider(r *rule, mismatch int, c Claims) {
	if !r.knows(c) {
		return
	}
	if matched := r.countMatches(c); n.rule == nil || matched > n.matched {
		*n = nearest{rule: r, mismatch: mismatch, matched: matched}
	}
}

func (r *rule) countMatches(c Claims) int {
	n := 0
	for i := range r.claims {
		if got, ok := c.Get(r.claims[i].claim); ok && r.claims[i].match(got) {
			n++
		}
	}
	return n
}

func (n *nearest) denial(c Claims) *problem.Denial {
	if n.rule == nil {
		return nil
	}
	claim, expected := claimEvent, []string(nil)
	if n.mismatch < len(n.rule.claims) {
		claim, expected = n.rule.claims[n.mismatch].claim, n.rule.claims[n.mismatch].values
	} else {
		expected = n.rule.expectedEvents()
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
	Matched bool   // the rule gives its grants
	Skipped string // why the rule does not apply at all: another network, another issuer; then Claims is empty
	Claims  []ClaimResult
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
func (p *Policy) Explain(network string, c Claims) []RuleResult {
	results := make([]RuleResult, 0, len(p.rules))
	for i := range p.rules {
		results = append(results, p.rules[i].explain(network, c))
	}
	return results
}

func (r *rule) explain(network string, c Claims) RuleResult {
	result := RuleResult{Rule: r.name}
	if !r.concerns(network) {
		result.Skipped = "it is for network " + r.network
		return result
	}
	if !r.appliesTo(c) {
		result.Skipped = "it is for tokens of " + strings.Join(r.issuers, " and ")
		return result
	}
	for i := range r.claims {
		m := &r.claims[i]
		got, ok := c.Get(m.claim)
		result.Claims = append(result.Claims, ClaimResult{
			Claim: m.claim, Matched: ok && m.match(got), Expected: append([]string(nil), m.values...), Got: shown(got), Present: ok,
		})
	}
	if !r.mayTrigger(c) {
		result.Claims = r.explainEvent(result.Claims, c)
	}
	result.Matched = r.firstMismatch(c) < 0
	return result
}

// explainEvent marks the event as what differs, also where a wildcard under event_name let it through.
func (r *rule) explainEvent(claims []ClaimResult, c Claims) []ClaimResult {
	for i := range claims {
		if claims[i].Claim == claimEvent {
			claims[i].Matched = false
			return claims
		}
	}
	got, ok := c.Get(claimEvent)
	return append(claims, ClaimResult{Claim: claimEvent, Expected: r.expectedEvents(), Got: shown(got), Present: ok})
}
