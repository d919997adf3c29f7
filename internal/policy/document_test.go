package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/wire"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// documentOf decodes a file's text, which has to decode.
func documentOf(t testing.TB, file, text string) Source {
	t.Helper()
	var d Document
	if err := yamlfile.Decode(file, []byte(text), &d); err != nil {
		t.Fatal(err)
	}
	return Source{File: file, Document: d}
}

const shared = `
targets:
  database: ["tcp db.internal:5432", "icmp db.internal"]
  registry: ["tcp registry.corp:443"]
groups:
  shops:
    - {repository_owner_id: 9919, repository: [acme/shop, acme/cart]}
    - {repository_owner_id: 9919, repository_id: [77, 78]}
  tools:
    - {repository_owner: acme, repository: acme/tool-*}
  main:
    - {ref: refs/heads/main}
    - {ref: refs/heads/release/*, environment: production}
`

const rulesOfShared = `
rules:
  - name: shops
    groups: [shops, tools]
    match: {event_name: push}
    targets: [database, registry]
    allow: ["tcp 10.0.0.1:1", "tcp registry.corp:443"]
  - name: release
    match: {repository_owner_id: 9919}
    groups: main
    targets: registry
`

func TestGroupsAndTargets(t *testing.T) {
	p, faults := CompileAll([]Source{documentOf(t, "a.yaml", shared), documentOf(t, "b.yaml", rulesOfShared)}, Options{})
	if len(faults) > 0 {
		t.Fatal(faults)
	}
	const db, icmp, registry, own = "tcp db.internal:5432", "icmp db.internal", "tcp registry.corp:443", "tcp 10.0.0.1:1"
	tests := []struct {
		name   string
		claims claimSet
		rules  string
		allow  []string
	}{
		{"first entry", github("ref", "refs/heads/x"), "shops", []string{db, icmp, registry, own}},
		{"other value of it", github("ref", "refs/heads/x", "repository", "Acme/Cart"), "shops", []string{db, icmp, registry, own}},
		{"second entry", github("ref", "refs/heads/x", "repository", "acme/y", "repository_id", "78"), "shops", []string{db, icmp, registry, own}},
		{"second group", github("ref", "refs/heads/x", "repository", "acme/tool-1"), "shops", []string{db, icmp, registry, own}},
		{"no group", github("ref", "refs/heads/x", "repository", "acme/other"), "", nil},
		{"entries do not mix", github("ref", "refs/heads/x", "repository_owner_id", "1"), "", nil},
		{"own match still holds", github("ref", "refs/heads/x", "event_name", "schedule"), "", nil},
		{"both rules", github(), "shops release", []string{db, icmp, registry, own}},
		{"the second rule alone", github("event_name", "schedule"), "release", []string{registry}},
		{"the second way to it", github("event_name", "schedule", "ref", "refs/heads/release/1"), "release", []string{registry}},
		{"half of it", github("event_name", "schedule", "ref", "refs/heads/release/1", "environment", "staging"), "", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := p.Evaluate(today, "corp", tt.claims)
			var allow []string
			for _, g := range d.Grants {
				allow = append(allow, g.Allow)
			}
			if strings.Join(d.Rules, " ") != tt.rules || !slices.Equal(allow, tt.allow) {
				t.Errorf("got %+v", d)
			}
			if (d.Denial != nil) != (tt.rules == "" && tt.claims["repository_owner"] == "acme") {
				t.Errorf("denial %+v", d.Denial)
			}
		})
	}
}

func TestExplainGroups(t *testing.T) {
	p, _ := CompileAll([]Source{documentOf(t, "a.yaml", shared+rulesOfShared)}, Options{})
	got := p.Explain(today, "corp", github("repository", "acme/tool-1", "event_name", "schedule"))
	if len(got) != 2 || got[0].Matched || got[0].Group != "tools" || got[0].Matches() != 2 || !got[1].Matched || got[1].Group != "main" {
		t.Errorf("got %+v", got)
	}
}

func TestCompileAllRefuses(t *testing.T) {
	tests := []struct{ name, first, second, path, message, next string }{
		{"no such group", "rules: [{name: a, groups: shop, allow: ['tcp 10.0.0.1:1']}]", shared, "$.rules[0].groups", `no group "shop"`, `"shops"`},
		{"group twice", "rules: [{name: a, groups: [tools, tools], allow: ['tcp 10.0.0.1:1']}]", shared, "$.rules[0].groups[1]", "named twice", ""},
		{"no such target", "rules: [{name: a, groups: tools, targets: [registry, databse]}]", shared, "$.rules[0].targets[1]", "no target", `"database"`},
		{"nothing to reach", "rules: [{name: a, groups: tools, targets: []}]", shared, "$.rules[0]", "allows nothing", ""},
		{"unpinned by its groups", "rules: [{name: a, groups: main, targets: registry}]", shared, "$.rules[0].groups", "pins neither", "repository_owner_id"},
		{"one unpinned entry", "groups: {x: [{repository_id: 1}, {actor: me}]}\nrules: [{name: a, groups: x, targets: registry}]", shared, "$.rules[0].groups", "pins neither", ""},
		{"unpinned without groups", "rules: [{name: a, targets: registry}]", shared, "$.rules[0].match", "pins neither", ""},
		{"empty group", "groups: {x: []}", "", "$.groups.x", "no job belongs", ""},
		{"empty entry", "groups: {x: [{repository_id: 1}, {}]}", "", "$.groups.x[1]", "every job", ""},
		{"bad claim in a group", "groups: {x: [{repository_id: 1, reff: x}]}", "", "$.groups.x[0].reff", "unknown claim", `"ref"`},
		{"bad value in a group", "groups: {x: [{repository_id: [1, x]}]}", "", "$.groups.x[0].repository_id[1]", "is a number", ""},
		{"group's name", "groups: {'a\tb': [{repository_id: 1}]}", "", "$.groups", "no name for a group", ""},
		{"group in two files", "groups: {x: [{repository_id: 1}]}", "groups: {x: [{repository_id: 1}]}", "$.groups.x", "defined in first.yaml", ""},
		{"target in two files", "targets: {x: ['tcp 10.0.0.1:1']}", "targets: {x: ['tcp 10.0.0.1:1']}", "$.targets.x", "defined in first.yaml", ""},
		{"rule in two files", oneRule("a", ""), oneRule("a", ""), "$.rules[0].name", "in first.yaml as well", ""},
		{"rule twice", strings.Replace(oneRule("a", ""), "rules: [", "rules: [{name: a, match: {repository_id: 2}, allow: ['tcp 10.0.0.1:1']}, ", 1), "", "$.rules[1].name", "rule 1", ""},
		{"empty target", "targets: {x: []}", "", "$.targets.x", "holds nothing", ""},
		{"bad line in a target", "targets: {x: ['tcp 10.0.0.1:1', tcp]}", "", "$.targets.x[1]", "is not protocols", ""},
		{"closed range in a target", "targets: {x: ['tcp 127.0.0.0/8:1']}", "", "$.targets.x[0]", "no range opens", ""},
		{"target's name", "targets: {'': ['tcp 10.0.0.1:1']}", "", "$.targets", "no name for a target", ""},
		{"issuers that exclude each other", "groups: {x: [{iss: ghes, repository_id: 1}]}\n" + oneRule("a", "groups: x, "), "", "$.rules[0].groups", "never matches", ""},
		{"misspelt issuer", oneRule("a", "", "iss: gehs"), "", "$.rules[0].match.iss", "not an issuer", `"ghes"`},
		{"unknown warning accepted", oneRule("a", "accept: [names-without-id], "), "", "$.rules[0].accept", "no warning", ""},
	}
	opts := Options{Issuers: []string{GitHub, "https://ghes.example/_services/token"}, IssuerNames: map[string]string{"ghes": "https://ghes.example/_services/token", "github": GitHub}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sources := []Source{documentOf(t, "first.yaml", tt.first)}
			if tt.second != "" {
				sources = append(sources, documentOf(t, "second.yaml", tt.second))
			}
			_, faults := CompileAll(sources, opts)
			if len(faults) != 1 {
				t.Fatalf("%d faults: %v", len(faults), faults)
			}
			e := faults[0]
			if e.Path != tt.path || !strings.Contains(e.Message, tt.message) || !strings.Contains(e.Next, tt.next) || e.Next == "" {
				t.Errorf("got %+v", e)
			}
			if wantSecond := strings.Contains(tt.message, "first.yaml"); (e.Source == 1) != wantSecond {
				t.Errorf("in file %d", e.Source)
			}
		})
	}
}

// oneRule is a document with one sound rule, with more keys and more to match on.
func oneRule(name, keys string, match ...string) string {
	if strings.Contains(keys, "groups: x") {
		match = append(match, "iss: github")
	}
	return fmt.Sprintf("rules: [{name: %s, %smatch: {%s}, allow: ['tcp 10.0.0.1:1']}]", name, keys, strings.Join(append(match, "repository_owner_id: 9919"), ", "))
}

func TestIssuerNames(t *testing.T) {
	const ghes = "https://ghes.example/_services/token"
	opts := Options{Issuers: []string{ghes, GitHub}, IssuerNames: map[string]string{"ghes": ghes}}
	byName, _ := CompileAll([]Source{documentOf(t, "f", oneRule("a", "", "iss: ghes"))}, opts)
	silent, _ := CompileAll([]Source{documentOf(t, "f", oneRule("a", ""))}, opts)
	for iss, want := range map[string][2]bool{ghes: {true, false}, GitHub: {false, true}, "ghes": {false, false}} {
		if got := byName.Evaluate(today, "corp", github("iss", iss)).Allowed; got != want[0] {
			t.Errorf("%s under a rule that names GHES: %v", iss, got)
		}
		if got := silent.Evaluate(today, "corp", github("iss", iss)).Allowed; got != want[1] {
			t.Errorf("%s under a rule that names none, GHES listed first: %v", iss, got)
		}
	}
	opts.Issuers = []string{ghes, "https://other.example"}
	_, faults := CompileAll([]Source{documentOf(t, "f", oneRule("a", ""))}, opts)
	if len(faults) != 1 || !strings.Contains(faults[0].Message, "whose tokens") || !strings.Contains(faults[0].Next, `"ghes"`) {
		t.Errorf("no default issuer: %v", faults)
	}
	for issuers, want := range map[string]string{"": GitHub, "x": "x", "x y": "", "x y " + GitHub: GitHub} {
		if got, ok := DefaultIssuer(strings.Fields(issuers)); got != want || ok != (want != "") {
			t.Errorf("default of %q is %q", issuers, got)
		}
	}
}

func TestExpires(t *testing.T) {
	src := documentOf(t, "f", `
rules:
  - {name: short, match: {repository_owner_id: 9919}, allow: ["tcp 10.0.0.1:1"], expires: 2026-11-21}
  - {name: long, match: {repository_owner_id: 9919}, allow: ["tcp 10.0.0.1:2"], expires: 2026-12-31}
  - {name: other, match: {repository_owner_id: 9919, ref: refs/heads/other}, allow: ["tcp 10.0.0.1:3"], expires: 2026-01-01}
`)
	p, faults := CompileAll([]Source{src}, Options{})
	if len(faults) > 0 {
		t.Fatal(faults)
	}
	end := time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
	last := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		at    time.Time
		rules string
		until time.Time
		next  time.Time
	}{
		{today, "short long", end, end},
		{end.Add(-time.Nanosecond), "short long", end, end},
		{end.Add(-time.Nanosecond).In(time.FixedZone("", -11*3600)), "short long", end, end},
		{end, "long", last, last},
		{last.Add(-1), "long", last, last},
		{last, "", time.Time{}, time.Time{}},
	} {
		d := p.Evaluate(tt.at, "corp", github())
		if strings.Join(d.Rules, " ") != tt.rules || !d.Until.Equal(tt.until) {
			t.Errorf("%s: %+v", tt.at, d)
		}
		if next, ok := p.NextExpiry(tt.at); !next.Equal(tt.next) || ok != !tt.next.IsZero() {
			t.Errorf("%s: next expiry %s, %v", tt.at, next, ok)
		}
	}
	if d := p.Evaluate(last, "corp", github()); d.Denial != nil {
		t.Errorf("an expired rule is told about: %+v", d.Denial)
	}
	if got := p.Explain(last, "corp", github())[0].Skipped; got != "it expired at 2026-11-22T00:00:00Z" {
		t.Errorf("explained as %q", got)
	}
	for _, text := range []string{"soon", "2026-13-01", "2026-02-30", "31.12.2026", "2026-12-31T00:00:00Z", "1026-12-31", "20261231"} {
		var d Document
		err := yamlfile.Decode("f", []byte("rules: [{expires: "+text+"}]"), &d)
		if err == nil || !strings.Contains(err.Error(), "2027-01-31") {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// The index only leaves out rules that do not match.
func TestIndexAgreesWithAllRules(t *testing.T) {
	values := map[string][]string{
		"repository_owner_id": {"9919", "7"}, "repository_owner": {"acme", "ACME", "other"},
		"repository_id": {"42", "43"}, "repository": {"acme/shop", "Acme/Cart", "acme/*", "other/x"}, "ref": {"refs/heads/main", "**"},
	}
	rapid.Check(t, func(t *rapid.T) {
		var rules []Rule
		for i := range rapid.IntRange(0, 8).Draw(t, "rules") {
			r := Rule{Name: fmt.Sprint(i), Match: map[string]Values{}, Allow: []string{"tcp 10.0.0.1:1"}}
			for _, claim := range slices.Sorted(maps.Keys(values)) {
				if rapid.Bool().Draw(t, claim+"?") {
					r.Match[claim] = rapid.SliceOfN(rapid.SampledFrom(values[claim]), 1, 3).Draw(t, claim)
				}
			}
			if _, err := Compile([]Rule{r}, Options{}); err == nil {
				rules = append(rules, r)
			}
		}
		p, err := Compile(rules, Options{})
		if err != nil {
			t.Fatal(err)
		}
		c := github()
		for _, claim := range slices.Sorted(maps.Keys(values)) {
			v := rapid.SampledFrom(append([]string{"-", "x/y"}, values[claim]...)).Draw(t, "claim "+claim)
			if c[claim] = v; v == "-" {
				delete(c, claim)
			}
		}
		var want []string
		for i := range p.rules {
			if p.rules[i].matches(c) {
				want = append(want, p.rules[i].name)
			}
		}
		got := p.Evaluate(today, "corp", c)
		if !slices.Equal(got.Rules, want) {
			t.Fatalf("got %v, want %v", got.Rules, want)
		}
		if len(want) > 0 {
			return
		}
		var closest nearest
		for i := range p.rules {
			for j := range p.rules[i].ways {
				if w := &p.rules[i].ways[j]; w.appliesTo(c) && w.knows(c) {
					closest.consider(&p.rules[i], w, c)
				}
			}
		}
		if diff := cmp.Diff(closest.denial(c), got.Denial); diff != "" {
			t.Fatal(diff)
		}
	})
}

// A company's whole file: every job costs about what it costs with one rule.
func manyRules(n int) []Rule {
	var rules []Rule
	for i := range n {
		r := sound()
		r.Name = fmt.Sprintf("rule-%d", i)
		r.Match = match("repository_owner_id", "9919", "repository", fmt.Sprintf("acme/repo-%d", i), "ref", "refs/heads/main", "ref", "refs/tags/v*")
		r.Allow = []string{"tcp db.internal:5432", "tcp *.svc.corp:443", fmt.Sprintf("tcp 10.0.%d.%d:443", i/256, i%256)}
		rules = append(rules, r)
	}
	return rules
}

func BenchmarkEvaluate(b *testing.B) {
	for _, n := range []int{1, 500, MaxRules / 2} {
		p := policyOf(b, Options{}, manyRules(n)...)
		allowed, denied, stranger := github("repository", "acme/repo-0"), github("repository", "acme/repo-0", "ref", "refs/heads/x"), github("repository_owner_id", "1")
		for _, c := range []struct {
			name   string
			claims claimSet
		}{{"allowed", allowed}, {"denied", denied}, {"stranger", stranger}} {
			b.Run(fmt.Sprintf("rules=%d/%s", n, c.name), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					p.Evaluate(today, "corp", c.claims)
				}
			})
		}
	}
}

func TestPolicyNamesItsClaims(t *testing.T) {
	p, _ := CompileAll([]Source{documentOf(t, "f", shared+rulesOfShared)}, Options{})
	want := []string{"environment", "event_name", "iss", "ref", "repository", "repository_id", "repository_owner", "repository_owner_id"}
	if d := cmp.Diff(want, p.Claims()); d != "" {
		t.Error(d)
	}
}

func TestTargetsShareLines(t *testing.T) {
	src := documentOf(t, "f", `
targets: {all: ["tcp 10.0.0.1:1", "tcp 10.0.0.1:2"]}
rules:
  - {name: a, match: {repository_owner_id: 9919}, targets: all, allow: ["tcp 10.0.0.1:2", "tcp 10.0.0.1:3"]}
  - {name: b, match: {repository_owner_id: 9919}, targets: all, observe: [10.0.0.0/8]}
`)
	p, faults := CompileAll([]Source{src}, Options{})
	if len(faults) > 0 {
		t.Fatal(faults)
	}
	want := []wire.Grant{{Rule: "a", Allow: "tcp 10.0.0.1:1"}, {Rule: "a", Allow: "tcp 10.0.0.1:2"}, {Rule: "a", Allow: "tcp 10.0.0.1:3"}, {Rule: "b", Observe: "10.0.0.0/8"}}
	if d := cmp.Diff(want, p.Evaluate(today, "corp", github()).Grants); d != "" {
		t.Error(d)
	}
}
