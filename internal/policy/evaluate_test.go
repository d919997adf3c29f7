package policy

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// today is when the tests' policies are asked.
var today = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// claimSet is a token's claims.
type claimSet map[string]string

func (c claimSet) Get(name string) (string, bool) {
	v, ok := c[name]
	return v, ok
}

// github gives the claims of a push to main of acme/shop, with changes; "-" takes a claim away.
func github(changes ...string) claimSet {
	c := claimSet{
		"iss": GitHub, "aud": "https://culvert.example/wg/x", "sub": "repo:acme/shop:environment:production",
		"repository": "acme/shop", "repository_id": "42", "repository_owner": "acme", "repository_owner_id": "9919",
		"repository_visibility": "private", "actor": "alice", "actor_id": "7", "event_name": "push",
		"ref": "refs/heads/main", "ref_type": "branch", "base_ref": "", "head_ref": "", "environment": "production",
		"workflow": "Deploy", "workflow_ref": "acme/shop/.github/workflows/Deploy.yml@refs/heads/main",
		"job_workflow_ref":   "acme/shared/.github/workflows/job.yml@refs/tags/v1",
		"runner_environment": "github-hosted", "run_id": "1", "run_number": "2", "run_attempt": "1", "sha": "abc",
	}
	for i := 0; i < len(changes); i += 2 {
		if changes[i+1] == "-" {
			delete(c, changes[i])
			continue
		}
		c[changes[i]] = changes[i+1]
	}
	return c
}

func policyOf(t testing.TB, opts Options, rules ...Rule) *Policy {
	t.Helper()
	p, err := Compile(rules, opts)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// A rule pinned to acme's id, with more to match on.
func acme(pairs ...string) Rule {
	r := sound()
	r.Match = match(append([]string{"repository_owner_id", "9919"}, pairs...)...)
	return r
}

func TestEvaluateMatches(t *testing.T) {
	const (
		wf  = "acme/shop/.github/workflows/Deploy.yml@refs/heads/main"
		jwf = "acme/shared/.github/workflows/job.yml@refs/tags/v1"
	)
	tests := []struct {
		name    string
		match   []string
		claims  claimSet
		allowed bool
	}{
		{"owner id", nil, github(), true},
		{"another owner id", nil, github("repository_owner_id", "9918"), false},
		{"owner id as a prefix", nil, github("repository_owner_id", "99190"), false},
		{"owner id missing", nil, github("repository_owner_id", "-"), false},
		{"owner id empty", nil, github("repository_owner_id", ""), false},
		{"owner id with space", nil, github("repository_owner_id", " 9919"), false},
		{"recycled owner name", []string{"repository", "acme/shop"}, github("repository_owner_id", "666"), false},
		{"recycled repository name", []string{"repository_id", "42"}, github("repository_id", "43"), false},

		// names fold, and only ASCII
		{"repository in other case", []string{"repository", "ACME/Shop"}, github(), true},
		{"token in other case", []string{"repository", "acme/shop"}, github("repository", "Acme/SHOP"), true},
		{"owner in other case", []string{"repository_owner", "AcMe"}, github(), true},
		{"actor in other case", []string{"actor", "Alice"}, github(), true},
		{"environment in other case", []string{"environment", "Production"}, github(), true},
		{"Kelvin sign for k", []string{"actor", "kim"}, github("actor", "\u212aim"), false},
		{"long s for s", []string{"repository", "acme/shop"}, github("repository", "acme/\u017fhop"), false},

		// everything else is exact
		{"ref in other case", []string{"ref", "refs/heads/Main"}, github(), false},
		{"token's ref in other case", []string{"ref", "refs/heads/main"}, github("ref", "refs/heads/MAIN"), false},
		{"visibility in other case", []string{"repository_visibility", "Private"}, github(), false},
		{"workflow in other case", []string{"workflow", "deploy"}, github(), false},
		{"event in other case", []string{"event_name", "Push"}, github(), false},
		{"custom property in other case", []string{"repo_property_tier", "Gold"}, github("repo_property_tier", "gold"), false},
		{"custom property", []string{"repo_property_tier", "gold"}, github("repo_property_tier", "gold"), true},

		// workflow refs: the repository folds, path and ref do not
		{"workflow ref", []string{"workflow_ref", wf}, github(), true},
		{"workflow ref, owner in other case", []string{"workflow_ref", "ACME/Shop/.github/workflows/Deploy.yml@refs/heads/main"}, github(), true},
		{"workflow ref, file in other case", []string{"workflow_ref", strings.ToLower(wf)}, github(), false},
		{"workflow ref, branch in other case", []string{"workflow_ref", strings.Replace(wf, "main", "Main", 1)}, github(), false},
		{"workflow ref, any branch", []string{"workflow_ref", "acme/shop/.github/workflows/Deploy.yml@**"}, github(), true},
		{"workflow ref, one star for a ref", []string{"workflow_ref", "acme/shop/.github/workflows/Deploy.yml@*"}, github(), false},
		{"workflow ref, any repository", []string{"workflow_ref", "acme/*/.github/workflows/Deploy.yml@refs/heads/main"}, github(), true},
		{"workflow ref, star in folded part", []string{"workflow_ref", "ACME/S*p/.github/workflows/*.yml@refs/heads/*"}, github(), true},
		{"workflow ref, double star over the fold", []string{"workflow_ref", "ACME/**@refs/heads/main"}, github(), true},
		{"workflow ref, double star keeps refs exact", []string{"workflow_ref", "ACME/**@refs/heads/Main"}, github(), false},
		{"workflow ref without a path", []string{"workflow_ref", "acme/shop"}, github("workflow_ref", "ACME/shop"), false},
		{"reusable workflow", []string{"job_workflow_ref", jwf}, github(), true},
		{"reusable workflow at another tag", []string{"job_workflow_ref", jwf}, github("job_workflow_ref", jwf+"0"), false},

		// anchoring
		{"branch with the ref as prefix", []string{"ref", "refs/heads/main"}, github("ref", "refs/heads/main-attacker"), false},
		{"branch with the ref as suffix", []string{"ref", "refs/heads/main"}, github("ref", "refs/heads/x/refs/heads/main"), false},
		{"alternation is literal", []string{"environment", "main|develop"}, github("environment", "main-attacker"), false},
		{"alternation's own branch", []string{"environment", "main|develop"}, github("environment", "develop"), false},
		{"star at the end", []string{"ref", "refs/tags/v*"}, github("ref", "refs/tags/v1.2"), true},
		{"star does not cross a slash", []string{"ref", "refs/heads/release*"}, github("ref", "refs/heads/release/1"), false},
		{"double star does", []string{"ref", "refs/heads/release**"}, github("ref", "refs/heads/release/1"), true},
		{"star matches nothing at all", []string{"ref", "refs/heads/main*"}, github(), true},
		{"star for the repository", []string{"repository", "acme/*"}, github("repository", "acme/other"), true},
		{"star stays in the owner", []string{"repository", "acme/*"}, github("repository", "acme-evil/shop"), false},
		{"question mark is literal", []string{"environment", "produc?ion"}, github(), false},
		{"dot is literal", []string{"environment", "prod.ction"}, github(), false},
		{"newline does not end a value", []string{"ref", "refs/heads/main"}, github("ref", "refs/heads/main\n"), false},
		{"nul does not end a value", []string{"ref", "refs/heads/main"}, github("ref", "refs/heads/main\x00x"), false},
		{"wildcard against a huge value", []string{"workflow", "**"}, github("workflow", strings.Repeat("x", MaxClaim+1)), false},

		// missing and empty
		{"claim missing", []string{"environment", "production"}, github("environment", "-"), false},
		{"claim missing, any value", []string{"environment", "**"}, github("environment", "-"), false},
		{"claim empty, any value", []string{"base_ref", "**"}, github(), false},
		{"unknown claim missing", []string{"branch", "main"}, github(), false},

		// several keys and values
		{"any of a list", []string{"ref", "refs/heads/x", "ref", "refs/heads/main"}, github(), true},
		{"none of a list", []string{"ref", "refs/heads/x", "ref", "refs/heads/y"}, github(), false},
		{"all keys", []string{"ref", "refs/heads/main", "environment", "production"}, github(), true},
		{"all keys but one", []string{"ref", "refs/heads/main", "environment", "staging"}, github(), false},

		// the subject's two formats make no difference to rules that match on claims
		{"subject with ids", []string{"repository", "acme/shop", "environment", "production"},
			github("sub", "repo:acme@9919/shop@42:environment:production"), true},
		{"subject that lies about the repository", []string{"repository", "acme/shop"},
			github("sub", "repo:acme/shop:ref:refs/heads/main", "repository", "acme/other"), false},
		{"subject missing", []string{"repository", "acme/shop"}, github("sub", "-"), true},
		{"subject matched literally", []string{"sub", "repo:acme/shop:environment:production"}, github(), true},
		{"subject matched in the old format only", []string{"sub", "repo:acme/shop:environment:production"},
			github("sub", "repo:acme@9919/shop@42:environment:production"), false},

		// events with a stranger's input
		{"pull_request", nil, github("event_name", "pull_request"), true},
		{"pull_request_target unnamed", nil, github("event_name", "pull_request_target"), false},
		{"workflow_run unnamed", nil, github("event_name", "workflow_run"), false},
		{"pull_request_target by name", []string{"event_name", "pull_request_target"}, github("event_name", "pull_request_target"), true},
		{"pull_request_target in a list", []string{"event_name", "push", "event_name", "pull_request_target"}, github("event_name", "pull_request_target"), true},
		{"workflow_run by name", []string{"event_name", "workflow_run"}, github("event_name", "workflow_run"), true},
		{"pull_request_target by star", []string{"event_name", "*"}, github("event_name", "pull_request_target"), false},
		{"pull_request_target by glob", []string{"event_name", "pull_request*"}, github("event_name", "pull_request_target"), false},
		{"pull_request by glob", []string{"event_name", "pull_request*"}, github("event_name", "pull_request"), true},
		{"workflow_run by double star", []string{"event_name", "**"}, github("event_name", "workflow_run"), false},
		{"the one does not name the other", []string{"event_name", "workflow_run", "event_name", "**"}, github("event_name", "pull_request_target"), false},
		{"pull_request_target in capitals", nil, github("event_name", "PULL_REQUEST_TARGET"), false},
		{"pull_request_target in capitals, named", []string{"event_name", "pull_request_target"}, github("event_name", "Pull_Request_Target"), false},
		{"pull_request_target with space", nil, github("event_name", " pull_request_target "), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := policyOf(t, Options{}, acme(tt.match...))
			if d := p.Evaluate(today, "corp", tt.claims); d.Allowed != tt.allowed {
				t.Errorf("got %+v", d)
			}
		})
	}
}

func TestEvaluateIssuers(t *testing.T) {
	const ghes = "https://ghes.example/_services/token"
	opts := Options{Issuers: []string{GitHub, ghes}}
	named := acme("iss", ghes)
	both := acme("iss", ghes, "iss", GitHub)
	tests := []struct {
		name    string
		opts    Options
		rule    Rule
		iss     string
		allowed bool
	}{
		{"default is GitHub", Options{}, acme(), GitHub, true},
		{"default is GitHub alone", Options{}, acme(), ghes, false},
		{"first of several", opts, acme(), GitHub, true},
		{"second has to be named", opts, acme(), ghes, false},
		{"named", opts, named, ghes, true},
		{"named alone", opts, named, GitHub, false},
		{"both named, one", opts, both, GitHub, true},
		{"both named, other", opts, both, ghes, true},
		{"slash at the end", opts, acme(), GitHub + "/", false},
		{"other case", opts, acme(), strings.ToUpper(GitHub), false},
		{"enterprise path", opts, acme(), GitHub + "/acme", false},
		{"missing", opts, acme(), "-", false},
		{"empty", opts, acme(), "", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := policyOf(t, tt.opts, tt.rule).Evaluate(today, "corp", github("iss", tt.iss))
			if d.Allowed != tt.allowed || !d.Allowed && d.Denial != nil {
				t.Errorf("got %+v", d)
			}
		})
	}
}

func TestEvaluateAddsUp(t *testing.T) {
	named := func(name, network string, d time.Duration, r Rule) Rule {
		r.Name, r.Network, r.MaxSession, r.Allow = name, network, d, []string{" tcp 10.0.0.1:1 ", "udp 10.0.0.1:" + name}
		return r
	}
	p := policyOf(t, Options{},
		named("1", "corp", 2*time.Hour, acme()),
		named("2", "corp", 0, acme("environment", "staging")),
		named("3", "lab", time.Minute, acme()),
		named("4", "", 3*time.Hour, acme()),
		named("5", "corp", 0, acme()),
	)
	want := Decision{
		Allowed: true, Rules: []string{"1", "4", "5"}, MaxSession: 2 * time.Hour,
		Grants: []wire.Grant{
			{Rule: "1", Allow: "tcp 10.0.0.1:1"}, {Rule: "1", Allow: "udp 10.0.0.1:1"},
			{Rule: "4", Allow: "udp 10.0.0.1:4"}, {Rule: "5", Allow: "udp 10.0.0.1:5"}, // what they share stands with the first
		},
	}
	if diff := cmp.Diff(want, p.Evaluate(today, "corp", github())); diff != "" {
		t.Error(diff)
	}
	if got := p.Evaluate(today, "lab", github()); got.MaxSession != time.Minute || !slices.Equal(got.Rules, []string{"3", "4"}) {
		t.Errorf("lab: %+v", got)
	}
	if got := p.Evaluate(today, "elsewhere", github()); !slices.Equal(got.Rules, []string{"4"}) {
		t.Errorf("a network that only the general rule covers: %+v", got)
	}
	silent := policyOf(t, Options{}, named("1", "corp", 0, acme()))
	if got := silent.Evaluate(today, "corp", github()); got.MaxSession != DefaultMaxSession {
		t.Errorf("no rule says: %s", got.MaxSession)
	}
	long := policyOf(t, Options{}, named("1", "corp", 48*time.Hour, acme()), named("2", "corp", 0, acme()))
	if got := long.Evaluate(today, "corp", github()); got.MaxSession != 48*time.Hour {
		t.Errorf("one rule says more than the default: %s", got.MaxSession)
	}
	if d := policyOf(t, Options{}).Evaluate(today, "corp", github()); d.Allowed || d.Denial != nil {
		t.Errorf("no rules: %+v", d)
	}
}

func TestEvaluateDenial(t *testing.T) {
	rule := func(name string, pairs ...string) Rule {
		r := sound()
		r.Name, r.Match = name, match(pairs...)
		return r
	}
	byID := rule("by-id", "repository_owner_id", "9919", "repository", "acme/shop", "ref", "refs/heads/main", "environment", "production")
	staging := rule("staging", "repository_owner_id", "9919", "repository", "acme/shop", "environment", "staging", "environment", "dev")
	byName := rule("by-name", "repository_owner", "Acme", "ref", "refs/tags/v*")
	byRepo := rule("by-repo", "repository", "acme/shop", "ref", "refs/heads/main")
	byRepoID := rule("by-repo-id", "repository_id", "42", "ref", "refs/tags/v1")
	other := rule("other", "repository_owner_id", "1", "repository", "other/secret")
	elsewhere := rule("elsewhere", "repository_owner_id", "9919", "ref", "refs/heads/x")
	elsewhere.Network = "lab"
	denial := func(rule, claim, got string, expected ...string) *problem.Denial {
		return &problem.Denial{Rule: rule, Claim: claim, Expected: expected, Got: got}
	}
	const events = "any event but pull_request_target and workflow_run, which a rule has to name"
	tests := []struct {
		name   string
		rules  []Rule
		claims claimSet
		want   *problem.Denial
	}{
		{"one claim differs", []Rule{byID}, github("environment", "test"), denial("by-id", "environment", "test", "production")},
		{"claim missing", []Rule{byID}, github("environment", "-"), denial("by-id", "environment", "", "production")},
		{"another repository", []Rule{byID}, github("repository", "acme/other"), denial("by-id", "repository", "acme/other", "acme/shop")},
		{"identity before the rest", []Rule{byID}, github("repository", "acme/x", "ref", "refs/heads/y"), denial("by-id", "repository", "acme/x", "acme/shop")},
		{"most claims matched", []Rule{staging, byID}, github("environment", "test"), denial("by-id", "environment", "test", "production")},
		{"tie goes to the first", []Rule{staging, renamed("copy", byID)}, github("environment", "test", "ref", "refs/heads/z"),
			denial("staging", "environment", "test", "staging", "dev")},
		{"owner by name, any case", []Rule{byName}, github(), denial("by-name", "ref", "refs/heads/main", "refs/tags/v*")},
		{"owner by repository", []Rule{byRepo}, github("repository", "acme/other"), denial("by-repo", "repository", "acme/other", "acme/shop")},
		{"owner by repository, owner claim missing", []Rule{byRepo}, github("repository", "acme/other", "repository_owner", "-"),
			denial("by-repo", "repository", "acme/other", "acme/shop")},
		{"repository by id", []Rule{byRepoID}, github(), denial("by-repo-id", "ref", "refs/heads/main", "refs/tags/v1")},
		{"another repository than the id", []Rule{byRepoID}, github("repository_id", "43"), nil},
		{"event not named", []Rule{byID}, github("event_name", "workflow_run"), denial("by-id", "event_name", "workflow_run", events)},
		{"event named by a glob", []Rule{rule("glob", "repository_owner_id", "9919", "event_name", "*")}, github("event_name", "workflow_run"),
			denial("glob", "event_name", "workflow_run", "*")},

		{"stranger", []Rule{byID, byName, byRepo}, github("repository_owner_id", "666", "repository_owner", "evil", "repository", "evil/shop"), nil},
		{"recycled name against an id", []Rule{byID}, github("repository_owner_id", "666"), nil},
		{"owner claims missing", []Rule{byID, byName, byRepo}, claimSet{"iss": GitHub}, nil},
		{"no claims", []Rule{byID}, claimSet{}, nil},
		{"another owner's rule is not shown", []Rule{other, byRepoID}, github("ref", "refs/heads/x"), denial("by-repo-id", "ref", "refs/heads/x", "refs/tags/v1")},
		{"only another owner's rule", []Rule{other}, github(), nil},
		{"only a rule of another network", []Rule{elsewhere}, github(), nil},
		{"long claim is shortened", []Rule{byRepo}, github("ref", "refs/heads/"+strings.Repeat("é", 500)),
			denial("by-repo", "ref", "refs/heads/"+strings.Repeat("é", 122)+"…", "refs/heads/main")},
		{"broken UTF-8 is replaced", []Rule{byRepo}, github("ref", "refs/heads/\xff"), denial("by-repo", "ref", "refs/heads/\ufffd", "refs/heads/main")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := policyOf(t, Options{}, tt.rules...).Evaluate(today, "corp", tt.claims)
			if d.Allowed || d.MaxSession != 0 || d.Grants != nil {
				t.Fatalf("got %+v", d)
			}
			if diff := cmp.Diff(tt.want, d.Denial); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// renamed gives a copy of a rule under another name.
func renamed(name string, r Rule) Rule {
	r.Name = name
	return r
}

func TestExplain(t *testing.T) {
	lab := acme()
	lab.Name, lab.Network = "lab", "lab"
	ghes := acme("iss", "https://ghes.example")
	ghes.Name = "ghes"
	glob := acme("event_name", "*")
	glob.Name = "glob"
	plain := acme("environment", "staging")
	plain.Name = "plain"
	p := policyOf(t, Options{Issuers: []string{GitHub, "https://ghes.example"}}, sound(), lab, ghes, glob, plain)
	got := p.Explain(today, "corp", github("event_name", "workflow_run", "environment", "-"))
	id := ClaimResult{Claim: "repository_owner_id", Matched: true, Expected: []string{"9919"}, Got: "9919", Present: true}
	event := ClaimResult{Claim: "event_name", Got: "workflow_run", Present: true}
	unnamed, star := event, event
	unnamed.Expected = []string{"any event but pull_request_target and workflow_run, which a rule has to name"}
	star.Expected = []string{"*"}
	want := []RuleResult{
		{Rule: "deploy", Claims: []ClaimResult{id,
			{Claim: "repository", Matched: true, Expected: []string{"acme/shop"}, Got: "acme/shop", Present: true}, unnamed}},
		{Rule: "lab", Skipped: "it is for network lab"},
		{Rule: "ghes", Skipped: "it is for tokens of https://ghes.example"},
		{Rule: "glob", Claims: []ClaimResult{id, star}},
		{Rule: "plain", Claims: []ClaimResult{id, {Claim: "environment", Expected: []string{"staging"}}, unnamed}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if all := p.Explain(today, "corp", github()); !all[0].Matched || !all[3].Matched || all[4].Matched {
		t.Errorf("matches: %+v", all)
	}
}
