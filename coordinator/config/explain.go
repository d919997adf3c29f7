package config

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// maxClaims bounds a file of claims, in bytes; no token is larger.
const maxClaims = 16 << 10

// LoadClaims reads the claims of a job from a file with a JSON object, as they stand in a token's payload.
func LoadClaims(file string) (*claims.Claims, error) {
	const next = "give a file with the JSON object that a token carries as its payload"
	data, err := readBounded(file)
	if err != nil {
		return nil, problem.Wrap(err, problem.Usage, fmt.Sprintf("cannot read %s: %v", file, cause(err)), next)
	}
	if len(data) > maxClaims {
		return nil, problem.New(problem.Usage, fmt.Sprintf("%s is larger than any token", file), next)
	}
	c, err := claims.Parse(data)
	if err != nil {
		return nil, problem.Wrap(err, problem.Usage, fmt.Sprintf("%s does not hold claims: %v", file, err), next)
	}
	if iss, _ := c.Get("iss"); iss == "" {
		return nil, problem.New(problem.Usage, file+" has no claim iss, by which rules tell whose token it is",
			fmt.Sprintf("add the issuer, for GitHub's own runners \"iss\": %q", claims.GitHub))
	}
	return c, nil
}

// Explanation is how a job is judged in one network.
type Explanation struct {
	Network    string             `json:"network"`
	Allowed    bool               `json:"allowed"`
	Grants     []wire.Grant       `json:"grants,omitempty"`
	MaxSession wire.Duration      `json:"max_session,omitempty"`
	Until      time.Time          `json:"until,omitzero"`   // when the first of its rules expires
	Denial     *problem.Denial    `json:"denial,omitempty"` // what the job itself is told
	Rules      []*RuleExplanation `json:"rules"`            // those that match, then the closest, then the rest
}

// RuleExplanation is how far one rule came.
type RuleExplanation struct {
	Rule    string              `json:"rule"`
	Group   string              `json:"group,omitempty"`
	Matched bool                `json:"matched"`
	Skipped string              `json:"skipped,omitempty"` // why it does not apply at all
	Claims  []*ClaimExplanation `json:"claims,omitempty"`
}

// ClaimExplanation is one claim of a rule.
type ClaimExplanation struct {
	Claim    string   `json:"claim"`
	Matched  bool     `json:"matched"`
	Expected []string `json:"expected"`
	Got      *string  `json:"got"` // null where the token carries no such claim
}

// Explain says how a job with these claims is judged at a time: in one network, or in each where none is named. Unlike what
// the job itself is told, nothing is held back.
func (c *Config) Explain(now time.Time, job policy.Claims, network string) ([]*Explanation, error) {
	networks := c.NetworkNames()
	if network != "" {
		if _, ok := c.Networks[network]; !ok {
			return nil, problem.New(problem.NoNetwork, fmt.Sprintf("there is no network %q", network), "name one of "+strings.Join(networks, ", "))
		}
		networks = []string{network}
	}
	var out []*Explanation
	for _, n := range networks {
		d := c.Policy.Evaluate(now, n, job)
		e := &Explanation{Network: n, Allowed: d.Allowed, Grants: d.Grants, MaxSession: wire.Duration(d.MaxSession), Until: d.Until, Denial: d.Denial}
		results := c.Policy.Explain(now, n, job)
		slices.SortStableFunc(results, closestFirst)
		for _, r := range results {
			e.Rules = append(e.Rules, explained(r))
		}
		out = append(out, e)
	}
	return out, nil
}

// closestFirst orders rules by how far they came: those that match in the order of the file, then by the number of claims
// that match, then those that do not apply.
func closestFirst(a, b policy.RuleResult) int {
	rank := func(r policy.RuleResult) int {
		switch {
		case r.Matched:
			return -1 << 20
		case r.Skipped != "":
			return 1 << 20
		}
		return -r.Matches()
	}
	return rank(a) - rank(b)
}

func explained(r policy.RuleResult) *RuleExplanation {
	out := &RuleExplanation{Rule: r.Rule, Group: r.Group, Matched: r.Matched, Skipped: r.Skipped}
	for _, m := range r.Claims {
		c := &ClaimExplanation{Claim: m.Claim, Matched: m.Matched, Expected: m.Expected}
		if m.Present {
			got := m.Got
			c.Got = &got
		}
		out.Claims = append(out.Claims, c)
	}
	return out
}

// Verdict is an error with code denied where the job gets in nowhere.
func Verdict(all []*Explanation) error {
	if slices.ContainsFunc(all, func(e *Explanation) bool { return e.Allowed }) {
		return nil
	}
	return problem.New(problem.Denied, "no rule lets this job in", "compare its claims with the rules above")
}

// closest is how many rules that do not match are shown unless all are asked for.
const closest = 3

// WriteText writes the explanation for people: the rules that match, and of a denied job the closest; all of them if asked.
func (e *Explanation) WriteText(w io.Writer, all bool) {
	if e.Allowed {
		until := ""
		if !e.Until.IsZero() {
			until = ", until " + e.Until.Format(time.RFC3339)
		}
		fmt.Fprintf(w, "network %s: allowed for at most %s%s\n", e.Network, time.Duration(e.MaxSession), until)
	} else {
		fmt.Fprintf(w, "network %s: denied\n", e.Network)
	}
	for _, g := range e.Grants {
		if g.Observe != "" {
			fmt.Fprintf(w, "  observe %s (rule %q)\n", g.Observe, g.Rule)
			continue
		}
		fmt.Fprintf(w, "  allow %s (rule %q)\n", g.Allow, g.Rule)
	}
	visible := e.visible(all)
	for _, r := range visible {
		r.writeText(w)
	}
	if hidden := len(e.Rules) - len(visible); hidden > 0 {
		fmt.Fprintf(w, "  %s; --all shows them\n", count(hidden, "other rule"))
	}
}

// visible are the rules that matter: those that match, of a denied job the closest, all of them if asked.
func (e *Explanation) visible(all bool) []*RuleExplanation {
	if all {
		return e.Rules
	}
	var out []*RuleExplanation
	for _, r := range e.Rules {
		if r.Matched || !e.Allowed && len(out) < closest && (r.Skipped == "" || len(out) == 0) {
			out = append(out, r)
		}
	}
	return out
}

func (r *RuleExplanation) writeText(w io.Writer) {
	group := ""
	if r.Group != "" {
		group = fmt.Sprintf(" by group %q", r.Group)
	}
	switch {
	case r.Skipped != "":
		fmt.Fprintf(w, "  rule %q does not apply: %s\n", r.Rule, r.Skipped)
		return
	case r.Matched:
		fmt.Fprintf(w, "  rule %q matches%s\n", r.Rule, group)
	default:
		fmt.Fprintf(w, "  rule %q does not match%s\n", r.Rule, group)
	}
	for _, m := range r.Claims {
		mark, got := "differs", "nothing"
		if m.Matched {
			mark = "matches"
		}
		if m.Got != nil {
			got = fmt.Sprintf("%q", *m.Got)
		}
		fmt.Fprintf(w, "    %s %s: expected %s, got %s\n", m.Claim, mark, few(m.Expected), got)
	}
}

// few shows a list of values, the first of a long one.
func few(values []string) string {
	const most = 8
	if len(values) <= most {
		return fmt.Sprintf("%q", values)
	}
	return fmt.Sprintf("%q and %d more", values[:most], len(values)-most)
}
