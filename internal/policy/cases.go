package policy

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// Cases are a file of expectations on a policy: the claims of a job and what it should get.
type Cases struct {
	// Defaults are claims of every case that does not give them itself.
	Defaults map[string]*Claim `yaml:"defaults,omitempty"`
	// Cases are held against the policy in turn.
	Cases []Case `yaml:"cases" jsonschema:"required"`
}

// Case is one expectation. What it does not mention may be anything, except that a case which only has claims expects the
// job to be denied or allowed by Allowed.
type Case struct {
	// Name of the case in the report.
	Name string `yaml:"name" jsonschema:"required"`
	// Network that the job wants into; may be left out where there is one.
	Network string `yaml:"network,omitempty"`
	// Claims of the job's token; null takes a default away.
	Claims map[string]*Claim `yaml:"claims,omitempty"`
	// At is the day on which the job comes; default today.
	At Date `yaml:"at,omitempty"`
	// Allowed says whether the job gets in. Left out, it does if anything below but Closest is expected.
	Allowed *bool `yaml:"allowed,omitempty"`
	// Rules that match, no more and no fewer, in any order.
	Rules Values `yaml:"rules,omitempty"`
	// Allow holds the lines that are granted, no more and no fewer, in any order.
	Allow []string `yaml:"allow,omitempty"`
	// MaxSession is how long a session may last.
	MaxSession time.Duration `yaml:"max_session,omitempty"`
	// Reaches are flows that are let through, such as "tcp db.internal:5432".
	Reaches []string `yaml:"reaches,omitempty"`
	// Refuses are flows that are not.
	Refuses []string `yaml:"refuses,omitempty"`
	// Closest is what a denied job is told: the rule that came closest, and the claim that differed.
	Closest *Closest `yaml:"closest,omitempty"`
}

// Closest names a rule and a claim.
type Closest struct {
	Rule  string `yaml:"rule" jsonschema:"required"`
	Claim string `yaml:"claim,omitempty"`
}

// Claim is a claim's value as text; numbers are taken as they are written.
type Claim string

// UnmarshalYAML takes any scalar as its text.
func (c *Claim) UnmarshalYAML(node ast.Node) error {
	text, ok := yamlfile.Scalar(node)
	if !ok {
		return &yaml.SyntaxError{Message: "a claim has to be a text", Token: node.GetToken()}
	}
	*c = Claim(text)
	return nil
}

// ParseCases reads a file of cases. The error is a *problem.Error with line and column.
func ParseCases(file string, data []byte) (*Cases, error) {
	parsed, err := yamlfile.Parse(file, data)
	if err != nil {
		return nil, err
	}
	var c Cases
	l := Locator{File: file, Document: parsed}
	l.Decode(&c)
	c.check(&l)
	if found := l.Findings(); len(found) > 0 {
		return nil, found[0].Problem()
	}
	return &c, nil
}

func (c *Cases) check(l *Locator) {
	if len(c.Cases) == 0 {
		l.Add(Mistake, "", "$.cases", "the file holds no case", "write at least one under cases")
	}
	names := map[string]bool{}
	for i := range c.Cases {
		at, path := &c.Cases[i], fmt.Sprintf("$.cases[%d]", i)
		switch {
		case at.Name == "":
			l.Add(Mistake, "", path, "a case has no name", "give it one: the report uses it")
		case names[at.Name]:
			l.Add(Mistake, "", path+".name", fmt.Sprintf("the name %q is another case's as well", at.Name), "give every case its own name")
		}
		names[at.Name] = true
		if !at.expects() {
			l.Add(Mistake, "", path, fmt.Sprintf("case %q expects nothing", at.Name), "say allowed: false, or what the job gets: rules, allow, reaches")
		}
		at.checkFlows(l, path)
	}
}

func (at *Case) expects() bool { return at.Allowed != nil || at.wantsIn() || at.Closest != nil }

// wantsIn tells whether the case says something that only an allowed job can get.
func (at *Case) wantsIn() bool {
	return len(at.Rules)+len(at.Allow)+len(at.Reaches)+len(at.Refuses) > 0 || at.MaxSession > 0
}

func (at *Case) checkFlows(l *Locator, path string) {
	if at.Allowed != nil && !*at.Allowed && at.wantsIn() || at.wantsIn() && at.Closest != nil {
		l.Add(Mistake, "", path, fmt.Sprintf("case %q expects the job to be denied and to get something", at.Name), "decide for one")
	}
	for key, flows := range map[string][]string{"reaches": at.Reaches, "refuses": at.Refuses} {
		for i, text := range flows {
			if _, _, err := parseFlow(text); err != nil {
				l.Add(Mistake, "", fmt.Sprintf("%s.%s[%d]", path, key, i), err.Error(), `write one flow, such as "tcp db.internal:5432", "udp 10.0.0.1:53" or "icmp 10.0.0.1"`)
			}
		}
	}
}

// parseFlow reads one flow: to a name, or else to an address.
func parseFlow(text string) (name string, f Flow, err error) {
	l, perr := parseLine(text)
	if perr != nil {
		return "", f, errors.New(perr.Message)
	}
	var port uint16
	switch {
	case l.protos != TCP && l.protos != UDP && l.protos != ICMP:
		return "", f, fmt.Errorf("%q has more than one protocol", text)
	case l.internet || l.host.wild || l.host.name == "" && !l.prefix.IsSingleIP():
		return "", f, fmt.Errorf("%q is more than one host", text)
	case l.protos == ICMP:
	case len(l.ports) != 1 || l.ports[0].lo != l.ports[0].hi:
		return "", f, fmt.Errorf("%q is more than one port", text)
	default:
		port = l.ports[0].lo
	}
	return l.host.name, Flow{Proto: l.protos, Dst: netip.AddrPortFrom(l.prefix.Addr(), port)}, nil
}

// CaseResult is what came of one case.
type CaseResult struct {
	Name        string   `json:"name"`
	Passed      bool     `json:"passed"`
	Differences []string `json:"differences,omitempty"` // one line each
	Rules       []string `json:"rules"`                 // that matched
}

// caseClaims are a case's claims as a token would carry them.
type caseClaims map[string]string

// Get implements [Claims].
func (c caseClaims) Get(name string) (string, bool) {
	v, ok := c[name]
	return v, ok
}

// Run holds every case against a policy. networks are those that exist, of which a case has to name one unless there is only
// one; nil where any may be named.
func (c *Cases) Run(p *Policy, networks []string, now time.Time) ([]CaseResult, error) {
	var out []CaseResult
	for i := range c.Cases {
		at, when := &c.Cases[i], now
		network := at.Network
		if network == "" && len(networks) == 1 {
			network = networks[0]
		}
		if network == "" && len(networks) > 1 {
			return nil, problem.New(problem.NoNetwork, fmt.Sprintf("case %q names no network, and there are several", at.Name),
				"give it, or the defaults, network: "+strings.Join(networks, " or "))
		}
		if networks != nil && !slices.Contains(networks, network) {
			return nil, problem.New(problem.NoNetwork, fmt.Sprintf("case %q is about the network %q, which there is not", at.Name, network),
				suggest(network, networks, "the networks are"))
		}
		if !at.At.IsZero() {
			when = at.At.day
		}
		d := p.Evaluate(when, network, c.claimsOf(at))
		diff := at.differences(d)
		out = append(out, CaseResult{Name: at.Name, Passed: len(diff) == 0, Differences: diff, Rules: slices.Clone(d.Rules)})
	}
	return out, nil
}

// claimsOf joins a case's claims with the defaults. The issuer is GitHub's unless one is given, or taken away.
func (c *Cases) claimsOf(at *Case) caseClaims {
	all := maps.Clone(c.Defaults)
	if all == nil {
		all = map[string]*Claim{}
	}
	if _, said := all[claimIssuer]; !said {
		github := Claim(GitHub)
		all[claimIssuer] = &github
	}
	maps.Copy(all, at.Claims)
	out := caseClaims{}
	for name, value := range all {
		if value != nil {
			out[name] = string(*value)
		}
	}
	return out
}

// differences says in what a decision is not what the case expects.
func (at *Case) differences(d Decision) []string {
	want := at.wantsIn()
	if at.Allowed != nil {
		want = *at.Allowed
	}
	if want != d.Allowed {
		return []string{fmt.Sprintf("expected the job to be %s, but it is %s", verdict(want), told(d))}
	}
	if !d.Allowed {
		return at.denialDiffers(d.Denial)
	}
	var granted []string
	for _, g := range d.Grants {
		if g.Allow != "" {
			granted = append(granted, g.Allow)
		}
	}
	var diff []string
	if len(at.Rules) > 0 {
		diff = append(diff, setDiff("rule", at.Rules, d.Rules)...)
	}
	if len(at.Allow) > 0 {
		diff = append(diff, setDiff("line", at.Allow, granted)...)
	}
	if at.MaxSession > 0 && at.MaxSession != d.MaxSession {
		diff = append(diff, fmt.Sprintf("expected a max_session of %s, but it is %s", at.MaxSession, d.MaxSession))
	}
	return append(diff, at.flowsDiffer(d)...)
}

func verdict(allowed bool) string {
	if allowed {
		return "allowed"
	}
	return "denied"
}

// told is what a decision comes to, in words.
func told(d Decision) string {
	switch {
	case d.Allowed:
		return fmt.Sprintf("allowed by %s", quoted(d.Rules))
	case d.Denial == nil:
		return "denied: no rule is for its owner with a token of its issuer; iss is the issuer's URL, and GitHub's where neither case nor defaults say it"
	}
	got := "nothing"
	if d.Denial.Got != "" {
		got = fmt.Sprintf("%q", d.Denial.Got)
	}
	return fmt.Sprintf("denied: closest rule %q expects %s to be %s, got %s", d.Denial.Rule, d.Denial.Claim, quoted(d.Denial.Expected), got)
}

func (at *Case) denialDiffers(d *problem.Denial) []string {
	switch {
	case at.Closest == nil:
		return nil
	case d == nil:
		return []string{fmt.Sprintf("expected rule %q to come closest, but no rule is for the job's owner", at.Closest.Rule)}
	case at.Closest.Rule != d.Rule:
		return []string{fmt.Sprintf("expected rule %q to come closest, but it is %q, by claim %s", at.Closest.Rule, d.Rule, d.Claim)}
	case at.Closest.Claim != "" && at.Closest.Claim != d.Claim:
		return []string{fmt.Sprintf("expected the claim %s of rule %q to differ, but it is %s: got %q", at.Closest.Claim, d.Rule, d.Claim, d.Got)}
	}
	return nil
}

// setDiff says what of one kind is missing and what is too much.
func setDiff(kind string, want, got []string) []string {
	var out []string
	for _, w := range want {
		if !slices.Contains(got, w) {
			out = append(out, fmt.Sprintf("- %s %q is expected, but not there", kind, w))
		}
	}
	for _, g := range got {
		if !slices.Contains(want, g) {
			out = append(out, fmt.Sprintf("+ %s %q is there, but not expected", kind, g))
		}
	}
	return out
}

func (at *Case) flowsDiffer(d Decision) []string {
	g, err := ParseGrant(d.Grants)
	if err != nil {
		return []string{err.Error()}
	}
	s := Scope{Offered: g}
	var out []string
	for _, text := range at.Reaches {
		if v := s.decideText(text); !v.Allowed {
			out = append(out, fmt.Sprintf("expected to reach %q, but it is refused: %s", text, v.Reason))
		}
	}
	for _, text := range at.Refuses {
		if v := s.decideText(text); v.Allowed {
			out = append(out, fmt.Sprintf("expected %q to be refused, but rule %q allows it", text, v.Rule))
		}
	}
	return out
}

// decideText judges a flow that [parseFlow] takes. What a gateway's own policy or addresses would refuse is not known here.
func (s *Scope) decideText(text string) Verdict {
	name, f, err := parseFlow(text)
	switch {
	case err != nil:
		return Verdict{Reason: err.Error()}
	case name != "":
		return s.OffersName(name, f.Proto, f.Dst.Port())
	}
	return s.Decide(f)
}

// Names lists the rules, in file order.
func (p *Policy) Names() []string {
	out := make([]string, len(p.rules))
	for i := range p.rules {
		out[i] = p.rules[i].name
	}
	return out
}
