package policy

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/culvertnet/culvert/internal/wire"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// Compile checks rules and makes them ready. The error is an [*Error], the first of possibly several. No rules compile to
// a policy that denies all.
func Compile(rules []Rule, opts Options) (*Policy, error) {
	p, faults := CompileAll([]Source{{Document: Document{Rules: rules}}}, opts)
	if len(faults) > 0 {
		return nil, &faults[0]
	}
	return p, nil
}

// CompileAll checks what several files say and makes it one policy: targets and groups of any file are there for the rules
// of all, and names are taken once. It tells every mistake, in the order of the files. The policy holds nothing to rely on
// if there are any.
func CompileAll(sources []Source, opts Options) (*Policy, []Error) {
	c := newCompiler(sources, opts)
	if c.tooMany() {
		return nil, c.faults
	}
	c.each(func(d *Document) {
		c.readTargets(d.Targets)
		c.readGroups(d.Groups)
	})
	p := &Policy{index: index{}, pinned: index{}}
	c.each(func(d *Document) {
		for i := range d.Rules {
			if r := c.rule(&d.Rules[i], i); r != nil {
				for j := range r.ways {
					claim, values := r.ways[j].telling()
					p.index.file(len(p.rules), claim, values)
					p.pinned.file(len(p.rules), r.ways[j].pin.who.claim, keysOf(&r.ways[j].pin.who))
				}
				p.rules = append(p.rules, *r)
			}
		}
	})
	if p.lines = len(c.lines); p.lines > MaxLines {
		c.fail("$.rules", fmt.Sprintf("%d different allow lines are more than the %d that there may be", p.lines, MaxLines), "join lines to ranges and lists of ports")
	}
	p.claims = p.namesOfClaims()
	slices.SortStableFunc(c.faults, func(a, b Error) int { return cmp.Compare(a.Source, b.Source) })
	return p, c.faults
}

func fault(path, message, next string) *Error {
	return &Error{Path: path, Message: message, Next: next}
}

// compiler holds what is known of the files so far.
type compiler struct {
	sources []Source
	opts    Options
	source  int // the file that is being read
	faults  []Error

	rules   map[string]rulePlace
	targets map[string]*target
	groups  map[string]*group
	lines   map[wire.Grant]int // number of a line, without its rule
}

// rulePlace says where the rule with some name stands.
type rulePlace struct{ source, index int }

// target is a named list of allow lines.
type target struct {
	source int
	allow  []string
}

// group is a named set of jobs.
type group struct {
	source  int
	entries []entryMatch
	broken  bool
}

// entryMatch is one compiled match: of a rule, or one entry of a group.
type entryMatch struct {
	issuers []string // nil where it does not say
	claims  []matcher
}

func newCompiler(sources []Source, opts Options) *compiler {
	if len(opts.Issuers) == 0 {
		opts.Issuers = []string{GitHub}
	}
	opts.Issuers = slices.Clone(opts.Issuers)
	return &compiler{
		sources: sources, opts: opts, rules: map[string]rulePlace{}, targets: map[string]*target{}, groups: map[string]*group{},
		lines: map[wire.Grant]int{},
	}
}

func (c *compiler) each(f func(*Document)) {
	for i := range c.sources {
		c.source = i
		f(&c.sources[i].Document)
	}
}

// fail notes a mistake in the file that is being read.
func (c *compiler) fail(path, message, next string) {
	c.faults = append(c.faults, Error{Source: c.source, Path: path, Message: message, Next: next})
}

// failed notes a mistake, where there is one.
func (c *compiler) failed(err *Error, path string) bool {
	if err == nil {
		return false
	}
	c.fail(cmp.Or(err.Path, path), err.Message, err.Next)
	return true
}

// tooMany refuses what would take long even to look through.
func (c *compiler) tooMany() bool {
	rules := 0
	c.each(func(d *Document) { rules += len(d.Rules) })
	if rules > MaxRules {
		c.source = 0
		c.fail("$.rules", fmt.Sprintf("%d rules are more than the %d that there may be", rules, MaxRules), "join rules with groups and lists of values")
	}
	return rules > MaxRules
}

func (c *compiler) readTargets(targets map[string][]string) {
	for _, name := range slices.Sorted(maps.Keys(targets)) {
		path := "$.targets" + yamlfile.Key(name)
		if other, taken := c.targets[name]; taken {
			c.fail(path, fmt.Sprintf("the target %q is defined in %s as well", name, c.sources[other.source].File), "give every target its own name")
			continue
		}
		c.targets[name] = &target{source: c.source, allow: targets[name]}
		switch {
		case !printable(name):
			c.fail("$.targets", fmt.Sprintf("%.64q is no name for a target", name), fmt.Sprintf("use at most %d printable ASCII characters", MaxName))
		case len(targets[name]) == 0:
			c.fail(path, fmt.Sprintf("the target %q holds nothing", name), `add lines, such as "tcp 10.0.0.5:5432"`)
		}
		c.checkLines(targets[name], path)
	}
}

func (c *compiler) checkLines(lines []string, path string) {
	if len(lines) > MaxLines {
		c.fail(path, fmt.Sprintf("more than %d allow lines", MaxLines), "join lines to ranges and lists of ports")
		return
	}
	for i, text := range lines {
		l, err := parseLine(text)
		if err == nil {
			err = l.checkEffect()
		}
		if err != nil {
			err.Path = fmt.Sprintf("%s[%d]", path, i)
			c.failed(err, "")
		}
	}
}

func (c *compiler) readGroups(groups map[string][]map[string]Values) {
	for _, name := range slices.Sorted(maps.Keys(groups)) {
		path := "$.groups" + yamlfile.Key(name)
		if other, taken := c.groups[name]; taken {
			c.fail(path, fmt.Sprintf("the group %q is defined in %s as well", name, c.sources[other.source].File), "give every group its own name")
			continue
		}
		before := len(c.faults)
		g := &group{source: c.source}
		c.groups[name] = g
		switch n := len(groups[name]); {
		case !printable(name):
			c.fail("$.groups", fmt.Sprintf("%.64q is no name for a group", name), fmt.Sprintf("use at most %d printable ASCII characters", MaxName))
		case n == 0:
			c.fail(path, fmt.Sprintf("the group %q is empty, so no job belongs to it", name), "add an entry, such as - {repository_owner_id: 9919, repository: acme/shop}")
		case n > MaxEntries:
			c.fail(path, fmt.Sprintf("the group %q has more than %d entries", name, MaxEntries), "join entries with lists of values")
		}
		for i, match := range groups[name] {
			at := fmt.Sprintf("%s[%d]", path, i)
			if len(match) == 0 {
				c.fail(at, fmt.Sprintf("an entry of the group %q is empty, so every job would belong to it", name), "match on repository_owner_id and repository")
			}
			g.entries = append(g.entries, c.compileMatch(match, at))
		}
		g.broken = len(c.faults) > before
	}
}

// compileMatch checks one match and compiles it; what is wrong with it is noted.
func (c *compiler) compileMatch(match map[string]Values, path string) entryMatch {
	var out entryMatch
	c.checkMatch(match, path)
	for _, claim := range claimNames(match) {
		values := slices.Clone(match[claim])
		if claim == claimIssuer {
			for _, v := range values {
				out.issuers = append(out.issuers, c.issuerURL(v))
			}
			continue
		}
		out.claims = append(out.claims, newMatcher(claim, values))
	}
	return out
}

// issuerURL resolves an issuer's short name.
func (c *compiler) issuerURL(v string) string { return cmp.Or(c.opts.IssuerNames[v], v) }

func claimNames(match map[string]Values) []string {
	names := slices.Collect(maps.Keys(match))
	byRank(names)
	return names
}

// printable tells whether s is a name: 1 to [MaxName] printable ASCII characters without space around them.
func printable(s string) bool {
	outside := func(r rune) bool { return r < ' ' || r > '~' }
	return s != "" && len(s) <= MaxName && strings.TrimSpace(s) == s && strings.IndexFunc(s, outside) < 0
}

func quoted(list []string) string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = fmt.Sprintf("%q", s)
	}
	return strings.Join(out, ", ")
}
