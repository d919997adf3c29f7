package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/culvertnet/culvert/internal/wire"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// rule compiles one rule; nil where something is wrong with it, which is noted.
func (c *compiler) rule(in *Rule, index int) *rule {
	path, before := fmt.Sprintf("$.rules[%d]", index), len(c.faults)
	c.checkName(in, path, index)
	c.checkNetwork(in, path)
	checkMaxSession(c, in, path)
	c.checkAccept(in, path)
	r := &rule{name: in.Name, network: in.Network, maxSession: in.MaxSession, expires: in.Expires.End(), source: c.source, index: index}
	who := len(c.faults)
	groups := c.groupsOf(in, path)
	own := c.compileMatch(in.Match, path+".match")
	if len(c.faults) == who {
		r.ways = c.ways(in, own, groups, path)
	}
	c.addLines(r, in, path)
	if len(c.faults) > before {
		return nil
	}
	return r
}

func (c *compiler) checkName(in *Rule, path string, index int) {
	switch other, taken := c.rules[in.Name]; {
	case in.Name == "":
		c.fail(path, "a rule has no name", "give it a name: denials, logs and the audit record use it")
	case !printable(in.Name):
		c.fail(path+".name", fmt.Sprintf("the name %.64q is too long or not plain text", in.Name),
			fmt.Sprintf("use at most %d printable ASCII characters", MaxName))
	case taken && other.source != c.source:
		c.fail(path+".name", fmt.Sprintf("the name %q is that of a rule in %s as well", in.Name, c.sources[other.source].File), "give every rule its own name")
	case taken:
		c.fail(path+".name", fmt.Sprintf("the name %q is that of rule %d as well", in.Name, other.index+1), "give every rule its own name")
	default:
		c.rules[in.Name] = rulePlace{c.source, index}
	}
}

func (c *compiler) checkNetwork(in *Rule, path string) {
	networks := c.opts.Networks
	switch {
	case in.Network != "" && !printable(in.Network):
		c.fail(path+".network", fmt.Sprintf("%.64q is no network's name", in.Network), "use printable ASCII characters")
	case networks == nil || slices.Contains(networks, in.Network):
	case in.Network != "":
		c.fail(path+".network", fmt.Sprintf("there is no network %q", in.Network), suggest(in.Network, networks, "the networks are"))
	case len(networks) != 1:
		c.fail(path, fmt.Sprintf("rule %q does not say which network it is for", in.Name), "add network: one of "+quoted(networks))
	}
}

// suggest gives the nearest name, or all of them after a word.
func suggest(got string, names []string, otherwise string) string {
	if near := yamlfile.Nearest(got, names); near != "" {
		return fmt.Sprintf("did you mean %q?", near)
	}
	if len(names) == 0 {
		return "there are none; define it, or take it out"
	}
	const most = 20
	if len(names) > most {
		return fmt.Sprintf("%s %s and %d more", otherwise, quoted(names[:most]), len(names)-most)
	}
	return otherwise + " " + quoted(names)
}

func checkMaxSession(c *compiler, in *Rule, path string) {
	d := in.MaxSession
	if d != 0 && (d < MinMaxSession || d > MaxMaxSession) {
		c.fail(path+".max_session", fmt.Sprintf("max_session %s is not between %s and %s", d, MinMaxSession, MaxMaxSession),
			"write a duration such as 45m or 2h")
	}
}

func (c *compiler) checkAccept(in *Rule, path string) {
	for i, code := range in.Accept {
		if _, ok := warnings[Code(code)]; !ok {
			c.fail(item(path+".accept", i, len(in.Accept)), fmt.Sprintf("there is no warning %q", code), suggest(code, codes(), "the warnings are"))
		}
	}
}

// item is the path of one value where a list of one may stand without brackets.
func item(path string, i, n int) string {
	if n == 1 {
		return path
	}
	return fmt.Sprintf("%s[%d]", path, i)
}

// groupsOf finds the groups that a rule names.
func (c *compiler) groupsOf(in *Rule, path string) []string {
	var found []string
	for i, name := range in.Groups {
		at := item(path+".groups", i, len(in.Groups))
		switch {
		case c.groups[name] == nil:
			c.fail(at, fmt.Sprintf("there is no group %q", name), suggest(name, slices.Sorted(maps.Keys(c.groups)), "the groups are"))
		case slices.Contains(found, name):
			c.fail(at, fmt.Sprintf("the group %q is named twice", name), "keep one")
		default:
			found = append(found, name)
		}
	}
	return found
}

// ways joins a rule's own match with every entry of its groups.
func (c *compiler) ways(in *Rule, own entryMatch, groups []string, path string) []way {
	var out []way
	if len(groups) == 0 {
		out = append(out, c.way("", in, own, path))
	}
	for _, name := range groups {
		if c.groups[name].broken {
			continue // that is noted
		}
		for _, e := range c.groups[name].entries {
			out = append(out, c.way(name, in, joined(own, e), path))
		}
	}
	if len(out) > MaxEntries {
		c.fail(path+".groups", fmt.Sprintf("the groups of rule %q have more than %d entries together", in.Name, MaxEntries), "split the rule")
		return nil
	}
	for i := range out {
		if !c.checkWay(in, &out[i], path) {
			break
		}
	}
	return out
}

// joined is what two matches ask for together.
func joined(a, b entryMatch) entryMatch {
	out := entryMatch{issuers: a.issuers, claims: slices.Concat(a.claims, b.claims)}
	slices.SortStableFunc(out.claims, func(x, y matcher) int { return compareRank(x.claim, y.claim) })
	switch {
	case a.issuers == nil:
		out.issuers = b.issuers
	case b.issuers != nil:
		out.issuers = []string{}
		for _, iss := range a.issuers {
			if slices.Contains(b.issuers, iss) {
				out.issuers = append(out.issuers, iss)
			}
		}
	}
	return out
}

func (c *compiler) way(group string, in *Rule, m entryMatch, path string) way {
	w := way{group: group, issuers: m.issuers, claims: m.claims, pin: findPin(m.claims)}
	if w.issuers == nil {
		if iss, ok := DefaultIssuer(c.opts.Issuers); ok {
			w.issuers = []string{iss}
		}
	}
	for i := range m.claims {
		if m.claims[i].claim == claimEvent {
			w.events = append(w.events, m.claims[i].values)
		}
	}
	return w
}

// checkWay refuses what would let anybody in, or nobody.
func (c *compiler) checkWay(in *Rule, w *way, path string) bool {
	at, which := path+".match", fmt.Sprintf("rule %q", in.Name)
	if w.group != "" {
		at, which = path+".groups", fmt.Sprintf("rule %q with the group %q", in.Name, w.group)
	}
	switch {
	case w.issuers == nil:
		c.fail(at, fmt.Sprintf("%s does not say whose tokens it is for, and none of the issuers is github.com's", which),
			"add iss to its match: one of "+quoted(c.issuerWords()))
	case len(w.issuers) == 0:
		c.fail(at, fmt.Sprintf("%s is for tokens of one issuer and of another at once, so it never matches", which), "name the issuer in one place")
	case !w.pin.found:
		c.fail(at, which+" pins neither an owner nor a repository, so any GitHub user's job could match it",
			"add repository_owner_id (surest), repository_owner, repository_id, or repository with the owner spelt out")
	default:
		return true
	}
	return false
}

// issuerWords lists what a match may name as iss.
func (c *compiler) issuerWords() []string {
	return append(slices.Sorted(maps.Keys(c.opts.IssuerNames)), c.opts.Issuers...)
}

// addLines gives a rule what its targets and its own lines allow, and what it observes.
func (c *compiler) addLines(r *rule, in *Rule, path string) {
	if len(in.Targets)+len(in.Allow)+len(in.Observe) == 0 {
		c.fail(path, fmt.Sprintf("rule %q allows nothing", in.Name), `add allow, such as "tcp 10.0.0.5:5432", or targets`)
	}
	var lines []string
	for i, name := range in.Targets {
		t := c.targets[name]
		if t == nil {
			c.fail(item(path+".targets", i, len(in.Targets)), fmt.Sprintf("there is no target %q", name),
				suggest(name, slices.Sorted(maps.Keys(c.targets)), "the targets are"))
			continue
		}
		lines = append(lines, t.allow...)
	}
	c.checkLines(in.Allow, path+".allow")
	c.checkObserve(in.Observe, path+".observe")
	for _, text := range append(lines, in.Allow...) {
		c.addLine(r, wire.Grant{Allow: strings.TrimSpace(text)})
	}
	for _, text := range in.Observe {
		c.addLine(r, wire.Grant{Observe: strings.TrimSpace(text)})
	}
}

// addLine gives a rule one line, unless it has it.
func (c *compiler) addLine(r *rule, g wire.Grant) {
	n, known := c.lines[g]
	if !known {
		n = len(c.lines)
		c.lines[g] = n
	}
	if !slices.Contains(r.lines, n) {
		g.Rule = r.name
		r.grants, r.lines = append(r.grants, g), append(r.lines, n)
	}
}
