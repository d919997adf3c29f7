package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// lintOf gives the codes of a file's warnings, and where each is.
func lintOf(t testing.TB, text string) (found []string, warned []Warn) {
	t.Helper()
	sources := []Source{documentOf(t, "f.yaml", text)}
	p, faults := CompileAll(sources, Options{Issuers: []string{GitHub, "https://ghes.example"}})
	if len(faults) > 0 {
		t.Fatalf("%s: %v", text, faults)
	}
	warned = Lint(p, sources, today)
	for _, w := range warned {
		if w.Message == "" || w.Next == "" || warnings[w.Code] == "" || strings.ContainsAny(w.Message+w.Next, "\n") {
			t.Errorf("a warning without words: %+v", w)
		}
		found = append(found, strings.TrimPrefix(w.Path, "$.rules[0].")+" "+string(w.Code))
	}
	return found, warned
}

// calm is a rule about which there is nothing to say.
const calm = `repository_owner_id: 9919, repository: acme/shop, ref: refs/heads/main, event_name: push, runner_environment: github-hosted`

func TestLintRule(t *testing.T) {
	edit := func(old, new string) string {
		if !strings.Contains(calm, old) {
			t.Fatalf("nothing to replace: %s", old)
		}
		return strings.Replace(calm, old, new, 1)
	}
	tests := []struct{ name, match, more, want string }{
		{"deploy", calm, "", ""},
		{"check", calm, "", ""},
		{"x", edit("repository_owner_id: 9919, ", ""), "", "match.repository names-without-ids"},
		{"x", edit("repository_owner_id: 9919, repository: acme/shop", "repository_owner: acme"), "", "match.repository_owner names-without-ids"},
		{"x", edit("repository_owner_id: 9919, repository: acme/shop", "repository_id: 42"), "", ""},
		{"x", edit("repository_owner_id: 9919, ", ""), "accept: names-without-ids, ", ""},
		{"x", calm, "accept: [names-without-ids, ref-wide], ", "accept[0] nothing-to-accept|accept[1] nothing-to-accept"},
		{"x", calm, "accept: [names-without-ids, nothing-to-accept], ", ""},
		{"x", edit(", runner_environment: github-hosted", ""), "", "match runner-environment-missing"},
		{"x", edit("runner_environment: github-hosted", "sub: 'repo:acme/shop:*'"), "accept: runner-environment-missing, ", "match.sub fragile-sub"},

		{"x", calm + ", job_workflow_ref: 'acme/shared/.github/workflows/x.yml@refs/tags/v1'", "", ""},
		{"x", calm + ", job_workflow_ref: '*/shared/.github/workflows/x.yml@refs/tags/v1'", "", "match.job_workflow_ref crosses-owners"},
		{"x", calm + ", job_workflow_ref: '**/x.yml@refs/tags/v1'", "", "match.job_workflow_ref crosses-owners"},
		{"x", edit("acme/shop", "'*/shop'"), "", ""},
		{"x", edit("repository_owner_id: 9919, repository: acme/shop", "repository_owner_id: [1, 2], repository: '*/shop'"), "", "match.repository crosses-owners"},

		{"deploy", edit("ref: refs/heads/main, ", ""), "", "match ref-missing"},
		{"Release it", edit("ref: refs/heads/main, ", ""), "", "match ref-missing"},
		{"x", edit("ref: refs/heads/main, ", ""), "", ""},
		{"x", edit("ref: refs/heads/main", "environment: eu"), "", "match ref-missing"},
		{"x", edit("ref: refs/heads/main", "environment: eu, ref_protected: true"), "", ""},
		{"x", edit("ref: refs/heads/main", "environment: eu, ref_protected: '*'"), "", "match ref-missing"},
		{"x", edit("ref: refs/heads/main", "environment: eu, job_workflow_ref: acme/s/.github/workflows/x.yml@refs/heads/main"), "", ""},
		{"x", edit("ref: refs/heads/main", "environment: eu, workflow_ref: 'acme/shop/.github/workflows/x.yml@**'"), "", "match ref-missing"},
		{"deploy", edit("refs/heads/main", "refs/heads/*"), "", "match.ref ref-wide"},
		{"deploy", edit("refs/heads/main", "'**'"), "", "match.ref ref-wide"},
		{"deploy", edit("refs/heads/main", "refs/**"), "", "match.ref ref-wide"},
		{"deploy", edit("refs/heads/main", "[refs/heads/main, refs/tags/v*]"), "", ""},
		{"deploy", edit("refs/heads/main", "refs/heads/release/*"), "", ""},
		{"deploy", edit("refs/heads/main, event_name: push", "refs/pull/**, event_name: pull_request"), "allow: ['tcp 10.0.0.1:443'], ", "match.ref ref-wide"},

		{"x", edit("push", "[push, pull_request_target]"), "allow: ['tcp 10.0.0.1:443'], ", "match.event_name stranger-input"},
		{"x", edit("push", "workflow_run"), "", "match.event_name stranger-input|match.event_name pull-request-writes"},
		{"x", edit("refs/heads/main, event_name: push", "refs/pull/*/merge, event_name: pull_request"), "", "match.event_name pull-request-writes"},
		{"x", edit("refs/heads/main, event_name: push", "refs/pull/*/merge, event_name: pull_request"), "allow: ['tcp 10.0.0.1:443'], ", ""},
		{"x", edit("refs/heads/main, event_name: push", "refs/pull/*/merge, event_name: pull_request"), "allow: ['tcp 10.0.0.1:1-65535'], ", "match.event_name pull-request-writes"},
		{"x", edit("refs/heads/main, event_name: push", "refs/pull/*/merge, event_name: pull_request"), "allow: ['udp internet:5432'], ", ""},
		{"x", edit("ref: refs/heads/main, event_name: push, ", ""), "", "match pull-request-writes"},
		{"x", edit(", event_name: push", ""), "", ""},
		{"x", edit("ref: refs/heads/main, event_name: push", "event_name: [push, pull_request]"), "", "match.event_name pull-request-writes"},

		{"x", calm + ", workflow: Deploy", "", "match.workflow user-controlled"},
		{"x", edit("refs/heads/main, event_name: push", "'**', event_name: pull_request, head_ref: safe"), "allow: ['tcp 10.0.0.1:443'], ", "match.head_ref user-controlled"},
		{"x", calm + ", team: core", "", "match.team unknown-claim"},
		{"x", calm + ", team: core, iss: 'https://ghes.example'", "", ""},
		{"x", calm + ", repo_property_team: core", "", ""},

		{"x", calm, "allow: ['tcp 10.0.0.0/8:443'], ", "allow[0] wide-target"},
		{"x", calm, "allow: ['tcp 10.0.0.1:443', 'udp 10.1.0.0/16:*'], ", "allow[1] wide-target"},
		{"x", calm, "allow: ['tcp 10.1.0.0/16:443'], ", ""},
		{"x", calm, "allow: ['icmp 0.0.0.0/0'], ", "allow[0] wide-target"},
		{"x", calm, "allow: ['tcp [fd00::/32]:443'], ", "allow[0] wide-target"},
		{"x", calm, "allow: ['tcp [fd00::/48]:443'], ", ""},
		{"x", calm, "allow: ['tcp internet:443'], ", ""},
		{"x", calm, "allow: ['tcp internet:*'], ", "allow[0] wide-target"},
		{"x", calm, "allow: ['tcp *.com:443'], ", "allow[0] public-wildcard"},
		{"x", calm, "allow: ['tcp *.co.uk:443'], ", "allow[0] public-wildcard"},
		{"x", calm, "allow: ['tcp *.github.io:443'], ", "allow[0] public-wildcard"},
		{"x", calm, "allow: ['tcp *.corp:443', 'tcp *.example.com:443', 'tcp acme.github.io:443', 'tcp *.internal:443'], ", ""},
		{"x", calm, "observe: [10.0.0.0/8], ", "observe observes"},

		{"x", calm, "expires: 2026-11-20, ", "expires expired"},
		{"x", calm, "expires: 2026-11-21, ", "expires expires-soon"},
		{"x", calm, "expires: 2026-12-01, ", "expires expires-soon"},
		{"x", calm, "expires: 2027-12-01, ", ""},
		{"x", edit("repository_owner_id: 9919, ", ""), "expires: 2026-11-20, ", "expires expired"},
	}
	for _, tt := range tests {
		keys := tt.more
		if !strings.Contains(keys, "allow:") {
			keys += "allow: ['tcp db.internal:5432'], "
		}
		text := fmt.Sprintf("rules: [{name: %s, %smatch: {%s}}]", tt.name, keys, tt.match)
		found, _ := lintOf(t, text)
		if got := strings.Join(found, "|"); got != tt.want {
			t.Errorf("%s\n got %q\nwant %q", text, got, tt.want)
		}
	}
}

func TestLintNeverMatches(t *testing.T) {
	for _, tt := range []struct{ match, why string }{
		{"repository_owner: acme, repository: other/shop", "repository_owner has to be"},
		{"repository_owner: ACME, repository: acme/shop", ""},
		{"repository_owner: a*, repository: acme/shop", ""},
		{"ref_type: tag, ref: refs/heads/main", "ref_type has to be"},
		{"ref_type: branch, ref: refs/tags/v*", "ref_type has to be"},
		{"ref_type: '*', ref: refs/tags/v*", ""},
		{"ref_type: tag, ref: [refs/heads/main, refs/tags/v*]", ""},
		{"ref_type: tags", `may be "tag"`},
		{"runner_environment: github_hosted", `may be "github-hosted"`},
		{"runner_environment: hosted", `one of "github-hosted", "self-hosted"`},
		{"runner_environment: '*-hosted'", ""},
		{"repository_visibility: secret", "one of"},
		{"ref_protected: yes", "one of"},
		{"event_name: pul_request", `may be "pull_request"`},
		{"event_name: [pul_request, push]", ""},
		{"event_name: pull_request, ref: refs/heads/main", "refs/pull/N/merge"},
		{"event_name: [pull_request, push], ref: refs/heads/main", ""},
		{"event_name: pull_request_target, ref: refs/heads/main", ""},
		{"event_name: pull_request, ref: '**'", ""},
		{"event_name: push, base_ref: main", "base_ref is empty"},
		{"event_name: [push, pull_request], base_ref: main", ""},
		{"event_name: '*', base_ref: main", ""},
		{"workflow_ref: acme/shop/.github/workflows/x.yml", "ends in @"},
		{"job_workflow_ref: acme/shop/.github/workflows/*.yml", "ends in @"},
		{"workflow_ref: 'acme/shop/.github/workflows/*'", ""},
		{"repository: acme/shop, workflow_ref: acme/other/.github/workflows/x.yml@refs/heads/main", "job_workflow_ref"},
		{"repository: acme/shop, workflow_ref: ACME/Shop/.github/workflows/x.yml@refs/heads/main", ""},
		{"repository: acme/*, workflow_ref: acme/other/.github/workflows/x.yml@refs/heads/main", ""},
		{"repository: acme/shop, workflow_ref: 'acme/*/.github/workflows/x.yml@refs/heads/main'", ""},
		{"repository: acme/shop, job_workflow_ref: acme/other/.github/workflows/x.yml@refs/heads/main", ""},
	} {
		_, warned := lintOf(t, "rules: [{name: x, match: {repository_owner_id: 9919, "+tt.match+"}, allow: ['tcp 10.0.0.1:443']}]")
		i := slices.IndexFunc(warned, func(w Warn) bool { return w.Code == NeverMatches })
		switch {
		case i >= 0 && (tt.why == "" || !strings.Contains(warned[i].Message, tt.why) || len(warned) != 1):
			t.Errorf("%s: %+v", tt.match, warned)
		case i < 0 && tt.why != "":
			t.Errorf("%s: not seen", tt.match)
		}
	}
	_, warned := lintOf(t, `
groups: {main: [{ref: refs/heads/main}], tags: [{ref: refs/tags/v*}]}
rules:
  - {name: never, groups: main, match: {repository_owner_id: 9919, ref: refs/heads/dev, runner_environment: self-hosted}, allow: ['tcp 10.0.0.1:443']}
  - {name: sometimes, groups: [main, tags], match: {repository_owner_id: 9919, ref: refs/heads/main, runner_environment: self-hosted}, allow: ['tcp 10.0.0.1:443']}
`)
	if len(warned) != 1 || warned[0].Code != NeverMatches || warned[0].Path != "$.rules[0]" {
		t.Errorf("with groups: %+v", warned)
	}
}

// What never matches by the linter's word matches no token indeed.
func TestNeverMatchesIsTrue(t *testing.T) {
	values := map[string][]string{
		"repository_owner": {"acme", "other", "a*"}, "repository": {"acme/shop", "other/x", "acme/*"}, "ref_type": {"branch", "tag", "b*", "tags"},
		"ref": {"refs/heads/main", "refs/tags/v*", "refs/pull/*/merge", "**"}, "event_name": {"push", "pull_request", "pull*", "x"},
		"base_ref": {"main", "**"}, "runner_environment": {"github-hosted", "hosted"},
		"workflow_ref": {"acme/shop/w@refs/heads/main", "other/x/w@**", "acme/*/w@**", "acme/shop/w"},
	}
	tokens := []claimSet{
		github("workflow_ref", "acme/shop/w@refs/heads/main"),
		github("ref", "refs/tags/v1", "ref_type", "tag", "workflow_ref", "acme/shop/w@refs/tags/v1"),
		github("event_name", "pull_request", "ref", "refs/pull/7/merge", "base_ref", "main", "workflow_ref", "acme/shop/w@refs/pull/7/merge"),
		github("repository", "other/x", "repository_owner", "other", "workflow_ref", "other/x/w@refs/heads/main"),
	}
	rapid.Check(t, func(t *rapid.T) {
		r := sound()
		r.Match = match("repository_owner_id", "9919")
		for _, claim := range slices.Sorted(maps.Keys(values)) {
			if rapid.IntRange(0, 2).Draw(t, claim+"?") == 0 {
				r.Match[claim] = rapid.SliceOfN(rapid.SampledFrom(values[claim]), 1, 2).Draw(t, claim)
			}
		}
		p, err := Compile([]Rule{r}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		why := p.rules[0].ways[0].contradiction()
		for _, c := range tokens {
			if why != "" && p.Evaluate(today, "corp", c).Allowed {
				t.Fatalf("%v is said never to match (%s), and matches %v", r.Match, why, c)
			}
		}
	})
}

func TestLintNeedless(t *testing.T) {
	const who = "match: {repository_owner_id: 9919"
	tests := []struct{ name, a, b, want string }{
		{"same", who + "}, allow: ['tcp 10.0.0.1:1']", who + "}, allow: ['tcp 10.0.0.1:1']", "b duplicate"},
		{"wider match", who + "}, allow: ['tcp 10.0.0.1:1']", who + ", ref: refs/heads/main}, allow: ['tcp 10.0.0.1:1']", "b shadowed"},
		{"either order", who + ", ref: refs/heads/main}, allow: ['tcp 10.0.0.1:1']", who + "}, allow: ['tcp 10.0.0.1:1']", "a shadowed"},
		{"wider glob", who + ", ref: refs/heads/*}, allow: ['tcp 10.0.0.1:1']", who + ", ref: [refs/heads/a*, refs/heads/b]}, allow: ['tcp 10.0.0.1:1']", "b shadowed"},
		{"other glob", who + ", ref: refs/heads/*}, allow: ['tcp 10.0.0.1:1']", who + ", ref: refs/heads/**}, allow: ['tcp 10.0.0.1:2']", ""},
		{"wider range", who + "}, allow: ['tcp 10.0.0.0/8:1-9']", who + "}, allow: ['tcp 10.1.0.0/16:2,3']", "b shadowed"},
		{"exact addresses open more", who + "}, allow: ['tcp 169.0.0.0/8:1']", who + "}, allow: ['tcp 169.254.1.1:1']", ""},
		{"wider name", who + "}, allow: ['tcp *.corp:*']", who + "}, allow: ['tcp *.svc.corp:443', 'tcp db.corp:1']", "b shadowed"},
		{"name is no range", who + "}, allow: ['tcp 0.0.0.0/0:*']", who + "}, allow: ['tcp db.corp:1']", ""},
		{"one line more", who + "}, allow: ['tcp 10.0.0.1:1']", who + ", ref: refs/heads/main}, allow: ['tcp 10.0.0.1:1', 'tcp 10.0.0.1:2']", ""},
		{"another protocol", who + "}, allow: ['tcp 10.0.0.1:1']", who + "}, allow: ['tcp,udp 10.0.0.1:1']", "a shadowed"},
		{"it shortens sessions", who + "}, allow: ['tcp 10.0.0.1:1']", who + "}, max_session: 1h, allow: ['tcp 10.0.0.1:1']", "a shadowed"},
		{"both shorten", who + "}, max_session: 1h, allow: ['tcp 10.0.0.1:1']", who + ", ref: refs/heads/main}, max_session: 2h, allow: ['tcp 10.0.0.1:1']", "b shadowed"},
		{"it names an event", who + "}, allow: ['tcp 10.0.0.1:443']", who + ", event_name: pull_request_target}, allow: ['tcp 10.0.0.1:443']", ""},
		{"another network", "network: x, " + who + "}, allow: ['tcp 10.0.0.1:1']", "network: y, " + who + "}, allow: ['tcp 10.0.0.1:1']", ""},
		{"every network", who + "}, allow: ['tcp 10.0.0.1:1']", "network: y, " + who + "}, allow: ['tcp 10.0.0.1:1']", "b shadowed"},
		{"another issuer", who + "}, allow: ['tcp 10.0.0.1:1']", who + ", iss: 'https://ghes.example'}, allow: ['tcp 10.0.0.1:1']", ""},
		{"it ends earlier", "expires: 2027-06-01, " + who + "}, allow: ['tcp 10.0.0.1:1']", who + "}, allow: ['tcp 10.0.0.1:1']", ""},
		{"it observes", who + "}, allow: ['tcp 10.0.0.1:1']", who + "}, observe: [10.0.0.0/24]", ""},
	}
	for _, tt := range tests {
		_, warned := lintOf(t, "rules:\n  - {name: a, "+tt.a+"}\n  - {name: b, "+tt.b+"}\n")
		var got []string
		for _, w := range warned {
			if w.Code == Duplicate || w.Code == Shadowed {
				got = append(got, map[string]string{"$.rules[0]": "a ", "$.rules[1]": "b "}[w.Path]+string(w.Code))
			}
		}
		if strings.Join(got, "|") != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

// A rule that is said to be needless can go without any decision changing.
func TestNeedlessIsTrue(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rules, c := drawRules(t), drawClaims(t)
		whole, err := Compile(rules, Options{})
		if err != nil {
			t.Fatal(err)
		}
		for i, s := range whole.shadows(today) {
			if s == nil {
				continue
			}
			less, err := Compile(slices.Delete(slices.Clone(rules), i, i+1), Options{})
			if err != nil {
				t.Fatal(err)
			}
			for _, network := range []string{"corp", "lab"} {
				a, b := whole.Evaluate(today, network, c), less.Evaluate(today, network, c)
				a.Rules, b.Rules = nil, nil
				if diff := cmp.Diff(a, b, sortDecision); diff != "" {
					t.Fatalf("without rule %s: %s", rules[i].Name, diff)
				}
			}
		}
	})
}

// One pattern covers another only if it matches whatever that matches.
func TestGlobCoversIsTrue(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pattern := rapid.StringMatching(`[ab/*]{1,6}`)
		g, o := compileGlob(pattern.Draw(t, "g"), foldNone), compileGlob(pattern.Draw(t, "o"), foldNone)
		if !g.covers(&o) {
			return
		}
		v := rapid.StringMatching(`[ab/]{1,7}`).Draw(t, "value")
		if o.match(v) && !g.match(v) {
			t.Fatalf("%q", v)
		}
	})
	for _, same := range []string{"a", "a*", "**", "a/**/b*"} {
		g := compileGlob(same, foldNone)
		if !g.covers(&g) {
			t.Errorf("%q does not cover itself", same)
		}
	}
}

func TestLintUnused(t *testing.T) {
	found, _ := lintOf(t, shared+"rules: [{name: x, groups: shops, match: {runner_environment: github-hosted, event_name: push}, targets: database}]\n")
	if want := "$.targets.registry unused-target|$.groups.main unused-group|$.groups.tools unused-group"; strings.Join(found, "|") != want {
		t.Errorf("got %q", found)
	}
}

// Comparing all rules with each other stays cheap: a thousand of them are no more than a moment.
func BenchmarkLint(b *testing.B) {
	for _, n := range []int{100, 500, 1000} {
		sources := []Source{{Document: Document{Rules: manyRules(n)}}}
		p, faults := CompileAll(sources, Options{})
		if len(faults) > 0 {
			b.Fatal(faults)
		}
		b.Run(fmt.Sprintf("rules=%d", n), func(b *testing.B) {
			for b.Loop() {
				Lint(p, sources, today)
			}
		})
	}
}
