package policy

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// sound is a rule that compiles; tests break one thing of it.
func sound() Rule {
	return Rule{
		Name: "deploy", Network: "corp",
		Match: map[string]Values{"repository_owner_id": {"9919"}, "repository": {"acme/shop"}},
		Allow: []string{"tcp 10.0.0.5:5432"},
	}
}

// compileError compiles one rule and gives the error, which has to be an *Error in the house's form.
func compileError(t *testing.T, opts Options, rules ...Rule) *Error {
	t.Helper()
	_, err := Compile(rules, opts)
	if err == nil {
		t.Fatal("compiles")
	}
	e, ok := errors.AsType[*Error](err)
	if !ok {
		t.Fatalf("%T is no *Error", err)
	}
	if e.Message == "" || e.Next == "" || !strings.HasPrefix(e.Path, "$.rules") || strings.Contains(e.Error(), "\n") {
		t.Fatalf("error %+v is incomplete", e)
	}
	return e
}

func match(pairs ...string) map[string]Values {
	m := map[string]Values{}
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = append(m[pairs[i]], pairs[i+1])
	}
	return m
}

func TestCompilePins(t *testing.T) {
	tests := []struct {
		name  string
		match map[string]Values
		pins  bool
	}{
		{"owner id", match("repository_owner_id", "9919"), true},
		{"owner name", match("repository_owner", "acme"), true},
		{"repository id", match("repository_id", "42"), true},
		{"repository", match("repository", "acme/shop"), true},
		{"all repositories of an owner", match("repository", "acme/*"), true},
		{"all repositories of an owner, deep", match("repository", "acme/**"), true},
		{"several owners", match("repository", "acme/*", "repository", "other/shop"), true},
		{"wildcard but owner id beside", match("repository", "*/shop", "repository_owner_id", "9919"), true},
		{"wildcard owner but repository id", match("repository_owner", "*", "repository_id", "42"), true},

		{"nothing", nil, false},
		{"any repository", match("repository", "**"), false},
		{"any owner", match("repository", "*/*"), false},
		{"any owner's shop", match("repository", "*/shop"), false},
		{"owner with a suffix", match("repository", "acme*/shop"), false},
		{"owner with a prefix", match("repository", "*acme/shop"), false},
		{"owner swallowed", match("repository", "**/shop"), false},
		{"one of several is wild", match("repository", "acme/shop", "repository", "*/shop"), false},
		{"no repository name", match("repository", "acme/"), false},
		{"owner glob", match("repository_owner", "acme*"), false},
		{"owner star", match("repository_owner", "*"), false},
		{"one of several owners is wild", match("repository_owner", "acme", "repository_owner", "*"), false},
		{"ref only", match("ref", "refs/heads/main"), false},
		{"environment only", match("environment", "production"), false},
		{"subject only", match("sub", "repo:acme/shop:ref:refs/heads/main"), false},
		{"actor only", match("actor", "alice"), false},
		{"actor id only", match("actor_id", "1"), false},
		{"workflow only", match("workflow_ref", "acme/shop/.github/workflows/x.yml@refs/heads/main"), false},
		{"reusable workflow only", match("job_workflow_ref", "acme/shop/.github/workflows/x.yml@refs/heads/main"), false},
		{"enterprise only", match("enterprise_id", "7"), false},
		{"issuer only", match("iss", GitHub), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := sound()
			r.Match = tt.match
			if tt.pins {
				if _, err := Compile([]Rule{r}, Options{}); err != nil {
					t.Fatal(err)
				}
				return
			}
			if e := compileError(t, Options{}, r); !strings.Contains(e.Message, "pins neither") {
				t.Errorf("refused for another reason: %v", e)
			}
		})
	}
}

func TestCompileRefusesMatch(t *testing.T) {
	long := strings.Repeat("x", MaxPattern+1)
	tests := []struct{ claim, value, path, message, next string }{
		{"ref", "", ".ref", "an empty value never matches", ""},
		{"ref", long, ".ref", "longer than", "wildcard"},
		{"workflow", "a\nb", ".workflow", "control characters", ""},
		{"workflow", " a", ".workflow", "begins or ends with space", ""},
		{"repository_id", "42*", ".repository_id", "is a number", "gh api"},
		{"repository_owner_id", "acme", ".repository_owner_id", "is a number", ""},
		{"repository_owner_id", "0x10", ".repository_owner_id", "is a number", ""},
		{"actor_id", "*", ".actor_id", "is a number", ""},
		{"ref", "main", ".ref", "full name", "refs/heads/main"},
		{"ref", "v*", ".ref", "full name", "refs/tags/v*"},
		{"ref", "heads/main", ".ref", "full name", ""},
		{"ref", "Refs/heads/main", ".ref", "full name", ""},
		{"ref", "^refs/heads/main$", ".ref", "no ref holds", "not regular expressions"},
		{"ref", "refs/heads/v[0-9]", ".ref", "no ref holds", ""},
		{"ref", "refs/heads/v?", ".ref", "no ref holds", ""},
		{"repository", "shop", ".repository", "OWNER/REPO", "OWNER/shop"},
		{"repository_owner", "acme/shop", ".repository_owner", "an owner is one name", "repository"},
		{"iss", "https://other.example", ".iss", "not an issuer that is configured", "without wildcards"},
		{"iss", "**", ".iss", "not an issuer that is configured", ""},
		{"exp", "1", ".exp", "no rule can match", "remove"},
		{"aud", "x", ".aud", "no rule can match", ""},
		{"jti", "x", ".jti", "no rule can match", ""},
		{"repositroy", "acme/shop", ".repositroy", "unknown claim", `"repository"`},
		{"Repository", "acme/shop", ".Repository", "unknown claim", `"repository"`},
		{"repository-id", "42", ".repository-id", "unknown claim", `"repository_id"`},
		{"enviroment", "prod", ".enviroment", "unknown claim", `"environment"`},
		{"refs", "refs/heads/main", ".refs", "unknown claim", `"ref"`},
		{"event", "push", "", "", ""},
		{"", "x", ".''", "no claim's name", ""},
		{"repo_property_*", "x", ".'repo_property_*'", "no claim's name", ""},
		{"a claim", "x", ".'a claim'", "no claim's name", ""},
		{strings.Repeat("n", MaxName+1), "x", "." + strings.Repeat("n", MaxName+1), "no claim's name", ""},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%.20s %.20q", tt.claim, tt.value), func(t *testing.T) {
			r := sound()
			r.Match[tt.claim] = Values{tt.value}
			if tt.message == "" {
				if _, err := Compile([]Rule{r}, Options{}); err != nil {
					t.Errorf("an unknown claim is refused: %v", err)
				}
				return
			}
			e := compileError(t, Options{}, r)
			if e.Path != "$.rules[0].match"+tt.path || !strings.Contains(e.Message, tt.message) || !strings.Contains(e.Next, tt.next) {
				t.Errorf("got %+v", e)
			}
		})
	}
}

func TestCompileAccepts(t *testing.T) {
	tests := []map[string]Values{
		match("ref", "refs/heads/main", "ref", "refs/tags/v*", "ref", "**", "ref", "ref*/heads/x", "ref", "refs/pull/*/merge"),
		match("repo_property_tier", "gold"), match("repo_property_ref", "x"), match("my_claim", "x"), match("https://x.example/claim", "y"),
		match("sub", "repo:acme/shop:*"), match("event_name", "pull_request_target"), match("iss", GitHub),
		match("environment", "prod (eu)"), match("workflow", "Build & test?"), match("repository", "acme/shop.git_x-1"),
	}
	for _, m := range tests {
		m["repository_owner_id"] = Values{"9919"}
		r := sound()
		r.Match = m
		if _, err := Compile([]Rule{r}, Options{}); err != nil {
			t.Errorf("%v: %v", m, err)
		}
	}
}

func TestCompileRefusesRules(t *testing.T) {
	tests := []struct {
		name    string
		change  func(*Rule)
		opts    Options
		path    string
		message string
		next    string
	}{
		{"no name", func(r *Rule) { r.Name = "" }, Options{}, "$.rules[0]", "has no name", ""},
		{"long name", func(r *Rule) { r.Name = strings.Repeat("n", MaxName+1) }, Options{}, "$.rules[0].name", "too long", ""},
		{"name with a line break", func(r *Rule) { r.Name = "a\nb" }, Options{}, "$.rules[0].name", "not plain text", ""},
		{"unknown network", func(*Rule) {}, Options{Networks: []string{"corq", "lab"}}, "$.rules[0].network", "no network", `"corq"`},
		{"network far from all", func(*Rule) {}, Options{Networks: []string{"lab"}}, "$.rules[0].network", "no network", "the networks are"},
		{"no networks at all", func(*Rule) {}, Options{Networks: []string{}}, "$.rules[0].network", "no network", ""},
		{"network missing", func(r *Rule) { r.Network = "" }, Options{Networks: []string{"corp", "lab"}}, "$.rules[0]", "which network", `"corp", "lab"`},
		{"network not printable", func(r *Rule) { r.Network = "c\tp" }, Options{}, "$.rules[0].network", "no network's name", ""},
		{"max_session without unit", func(r *Rule) { r.MaxSession = 7200 }, Options{}, "$.rules[0].max_session", "not between", "2h"},
		{"max_session negative", func(r *Rule) { r.MaxSession = -time.Hour }, Options{}, "$.rules[0].max_session", "not between", ""},
		{"max_session too long", func(r *Rule) { r.MaxSession = 1000 * time.Hour }, Options{}, "$.rules[0].max_session", "not between", ""},
		{"no allow", func(r *Rule) { r.Allow = nil }, Options{}, "$.rules[0]", "allows nothing", "tcp "},
		{"bad allow", func(r *Rule) { r.Allow = append(r.Allow, "tcp x!:1") }, Options{}, "$.rules[0].allow[1]", "", ""},
		{"range that is closed", func(r *Rule) { r.Allow = []string{"tcp 169.254.0.0/17:80"} }, Options{}, "$.rules[0].allow[0]", "no range opens", "exact"},
		{"loopback range", func(r *Rule) { r.Allow = []string{"tcp 127.0.0.0/8:80"} }, Options{}, "$.rules[0].allow[0]", "no range opens", ""},
		{"localhost", func(r *Rule) { r.Allow = []string{"tcp localhost:80"} }, Options{}, "$.rules[0].allow[0]", "the gateway itself", "10.20.0.2"},
		{"all of localhost", func(r *Rule) { r.Allow = []string{"tcp *.localhost:80"} }, Options{}, "$.rules[0].allow[0]", "the gateway itself", ""},
		{"multicast range", func(r *Rule) { r.Allow = []string{"udp [ff02::/16]:80"} }, Options{}, "$.rules[0].allow[0]", "no range opens", ""},
		{"too many lines", func(r *Rule) { r.Allow = make([]string, MaxLines+1) }, Options{}, "$.rules[0].allow", "more than", ""},
		{"too many values", func(r *Rule) { r.Match["ref"] = make(Values, MaxValues+1) }, Options{}, "$.rules[0].match.ref", "more than", ""},
		{"no value", func(r *Rule) { r.Match["ref"] = nil }, Options{}, "$.rules[0].match.ref", "no value", ""},
		{"second of several values", func(r *Rule) { r.Match["ref"] = Values{"**", ""} }, Options{}, "$.rules[0].match.ref[1]", "empty", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := sound()
			tt.change(&r)
			e := compileError(t, tt.opts, r)
			if e.Path != tt.path || !strings.Contains(e.Message, tt.message) || !strings.Contains(e.Next, tt.next) {
				t.Errorf("got %+v", e)
			}
		})
	}
}

func TestCompileRefusesFiles(t *testing.T) {
	if e := compileError(t, Options{}, sound(), sound()); e.Path != "$.rules[1].name" || !strings.Contains(e.Message, "rule 1") {
		t.Errorf("two rules of one name: %+v", e)
	}
	if e := compileError(t, Options{}, make([]Rule, MaxRules+1)...); e.Path != "$.rules" {
		t.Errorf("too many rules: %+v", e)
	}
	many := sound()
	many.Match = match("repository_id", "1")
	for i := range MaxMatch {
		many.Match[fmt.Sprintf("custom%02d", i)] = Values{"x"}
	}
	if e := compileError(t, Options{}, many); e.Path != "$.rules[0].match" {
		t.Errorf("too many claims: %+v", e)
	}
	var rules []Rule // the bound is on different lines of the whole file, so that what Evaluate gives always passes ParseGrant
	for i := range 3 {
		r := sound()
		r.Name, r.Allow = fmt.Sprint(i), nil
		for n := range MaxLines / 2 {
			r.Allow = append(r.Allow, fmt.Sprintf("tcp 10.0.0.5:%d", i*MaxLines+n+1))
		}
		rules = append(rules, r)
	}
	if _, err := Compile(rules[:2], Options{}); err != nil {
		t.Error(err)
	}
	if e := compileError(t, Options{}, rules...); e.Path != "$.rules" || !strings.Contains(e.Message, "allow lines") {
		t.Errorf("too many lines: %+v", e)
	}
}

func TestCompileNetworks(t *testing.T) {
	r := sound()
	if _, err := Compile([]Rule{r}, Options{Networks: []string{"lab", "corp"}}); err != nil {
		t.Error(err)
	}
	r.Network = ""
	for _, opts := range []Options{{}, {Networks: []string{"corp"}}} {
		if _, err := Compile([]Rule{r}, opts); err != nil {
			t.Errorf("%v: %v", opts, err)
		}
	}
}

func TestCompileDoesNotKeepItsInput(t *testing.T) {
	r := sound()
	p, err := Compile([]Rule{r}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	r.Match["repository"][0], r.Allow[0] = "**", "tcp 0.0.0.0/0:*"
	if d := p.Evaluate(today, "corp", github("repository", "acme/other")); d.Allowed {
		t.Error("the policy changed with the rule it was compiled from")
	}
}

// TestSuggestsNothingOfNothing: where no name of a kind is defined, the next step does not list none.
func TestSuggestsNothingOfNothing(t *testing.T) {
	for want, names := range map[string][]string{
		"there are none; define it, or take it out": nil, `did you mean "corp"?`: {"corp", "lab"}, `the networks are "a", "b"`: {"a", "b"},
	} {
		if got := suggest("crop", names, "the networks are"); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
