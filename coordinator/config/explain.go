package config

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
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

// Explain writes how a job with these claims is judged: in one network, or in each where none is named. It fails with
// code denied where the job gets in nowhere. Unlike what the job itself is told, nothing is held back.
func (c *Config) Explain(w io.Writer, job *claims.Claims, network string) error {
	networks := c.NetworkNames()
	if network != "" {
		if _, ok := c.Networks[network]; !ok {
			return problem.New(problem.NoNetwork, fmt.Sprintf("there is no network %q", network), "name one of "+strings.Join(networks, ", "))
		}
		networks = []string{network}
	}
	allowed, now := false, time.Now()
	for _, n := range networks {
		d := c.Policy.Evaluate(now, n, job)
		allowed = allowed || d.Allowed
		explainDecision(w, n, d)
		for _, r := range c.Policy.Explain(now, n, job) {
			explainRule(w, r)
		}
	}
	if !allowed {
		return problem.New(problem.Denied, "no rule lets this job in", "compare its claims with the rules above")
	}
	return nil
}

func explainDecision(w io.Writer, network string, d policy.Decision) {
	if !d.Allowed {
		fmt.Fprintf(w, "network %s: denied\n", network)
		return
	}
	fmt.Fprintf(w, "network %s: allowed for at most %s\n", network, d.MaxSession)
	for _, g := range d.Grants {
		if g.Observe != "" {
			fmt.Fprintf(w, "  observe %s (rule %q)\n", g.Observe, g.Rule)
			continue
		}
		fmt.Fprintf(w, "  allow %s (rule %q)\n", g.Allow, g.Rule)
	}
}

func explainRule(w io.Writer, r policy.RuleResult) {
	switch {
	case r.Skipped != "":
		fmt.Fprintf(w, "  rule %q does not apply: %s\n", r.Rule, r.Skipped)
		return
	case r.Matched:
		fmt.Fprintf(w, "  rule %q matches\n", r.Rule)
	default:
		fmt.Fprintf(w, "  rule %q does not match\n", r.Rule)
	}
	for _, m := range r.Claims {
		mark, got := "differs", "nothing"
		if m.Matched {
			mark = "matches"
		}
		if m.Present {
			got = fmt.Sprintf("%q", m.Got)
		}
		fmt.Fprintf(w, "    %s %s: expected %q, got %s\n", m.Claim, mark, m.Expected, got)
	}
}
