package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/culvertnet/culvert/internal/wire"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// Compile checks rules and makes them ready. The error is an [*Error]. No rules compile to a policy that denies all.
func Compile(rules []Rule, opts Options) (*Policy, error) {
	if len(rules) > MaxRules {
		return nil, fault("$.rules", fmt.Sprintf("%d rules are more than the %d that a file may hold", len(rules), MaxRules),
			"join rules with lists of values")
	}
	if len(opts.Issuers) == 0 {
		opts.Issuers = []string{GitHub}
	}
	opts.Issuers = slices.Clone(opts.Issuers)
	c := compiler{opts: opts, named: map[string]int{}}
	p := &Policy{rules: make([]rule, 0, len(rules))}
	for i := range rules {
		r, err := c.rule(&rules[i], fmt.Sprintf("$.rules[%d]", i), i)
		if err != nil {
			return nil, err
		}
		p.rules = append(p.rules, *r)
	}
	return p, nil
}

func fault(path, message, next string) *Error {
	return &Error{Path: path, Message: message, Next: next}
}

// compiler holds what is known of a file's rules so far.
type compiler struct {
	opts  Options
	named map[string]int // index of the rule with this name
	lines int
}

func (c *compiler) rule(in *Rule, path string, index int) (*rule, *Error) {
	checks := []func() *Error{
		func() *Error { return c.checkName(in, path, index) },
		func() *Error { return c.checkNetwork(in, path) },
		func() *Error { return checkMaxSession(in, path) },
		func() *Error { return c.checkMatch(in, path) },
		func() *Error { return c.checkAllow(in, path) },
		func() *Error { return c.checkObserve(in, path) },
	}
	for _, check := range checks {
		if err := check(); err != nil {
			return nil, err
		}
	}
	return c.build(in), nil
}

// build compiles a rule that has been checked.
func (c *compiler) build(in *Rule) *rule {
	r := &rule{
		name: in.Name, network: in.Network, issuers: c.opts.Issuers[:1],
		pin: findPin(in.Match), maxSession: in.MaxSession,
	}
	for _, claim := range claimNames(in) {
		values := slices.Clone(in.Match[claim])
		switch claim {
		case claimIssuer:
			r.issuers = values
			continue
		case claimEvent:
			r.events = values
		}
		r.claims = append(r.claims, newMatcher(claim, values))
	}
	for _, line := range in.Allow {
		r.grants = append(r.grants, wire.Grant{Rule: in.Name, Allow: strings.TrimSpace(line)})
	}
	r.grants = append(r.grants, observeGrants(in)...)
	return r
}

func claimNames(in *Rule) []string {
	names := make([]string, 0, len(in.Match))
	for name := range in.Match {
		names = append(names, name)
	}
	byRank(names)
	return names
}

func (c *compiler) checkName(in *Rule, path string, index int) *Error {
	switch {
	case in.Name == "":
		return fault(path, "a rule has no name", "give it a name: denials, logs and the audit record use it")
	case !printable(in.Name):
		return fault(path+".name", fmt.Sprintf("the name %.64q is too long or not plain text", in.Name),
			fmt.Sprintf("use at most %d printable ASCII characters", MaxName))
	}
	if other, taken := c.named[in.Name]; taken {
		return fault(path+".name", fmt.Sprintf("the name %q is that of rule %d as well", in.Name, other+1), "give every rule its own name")
	}
	c.named[in.Name] = index
	return nil
}

// printable tells whether s is a name: 1 to [MaxName] printable ASCII characters without space around them.
func printable(s string) bool {
	outside := func(r rune) bool { return r < ' ' || r > '~' }
	return s != "" && len(s) <= MaxName && strings.TrimSpace(s) == s && strings.IndexFunc(s, outside) < 0
}

func (c *compiler) checkNetwork(in *Rule, path string) *Error {
	if in.Network != "" && !printable(in.Network) {
		return fault(path+".network", fmt.Sprintf("%.64q is no network's name", in.Network), "use printable ASCII characters")
	}
	networks := c.opts.Networks
	if networks == nil || slices.Contains(networks, in.Network) {
		return nil
	}
	names := quoted(networks)
	switch {
	case in.Network != "":
		next := "the networks are " + names
		if near := yamlfile.Nearest(in.Network, networks); near != "" {
			next = fmt.Sprintf("did you mean %q?", near)
		}
		return fault(path+".network", fmt.Sprintf("there is no network %q", in.Network), next)
	case len(networks) != 1:
		return fault(path, fmt.Sprintf("rule %q does not say which network it is for", in.Name), "add network: one of "+names)
	}
	return nil // the one network is meant
}

func quoted(list []string) string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = fmt.Sprintf("%q", s)
	}
	return strings.Join(out, ", ")
}

func checkMaxSession(in *Rule, path string) *Error {
	d := in.MaxSession
	if d == 0 || d >= MinMaxSession && d <= MaxMaxSession {
		return nil
	}
	return fault(path+".max_session", fmt.Sprintf("max_session %s is not between %s and %s", d, MinMaxSession, MaxMaxSession),
		"write a duration such as 45m or 2h")
}

func (c *compiler) checkAllow(in *Rule, path string) *Error {
	if len(in.Allow)+len(in.Observe) == 0 {
		return fault(path, fmt.Sprintf("rule %q allows nothing", in.Name), `add allow, such as "tcp 10.0.0.5:5432"`)
	}
	if c.lines += len(in.Allow); c.lines > MaxLines {
		return fault(path+".allow", fmt.Sprintf("the rules have more than %d allow lines", MaxLines), "join lines to ranges and lists of ports")
	}
	for i, text := range in.Allow {
		l, err := parseLine(text)
		if err == nil {
			err = l.checkEffect()
		}
		if err != nil {
			err.Path = fmt.Sprintf("%s.allow[%d]", path, i)
			return err
		}
	}
	return nil
}
