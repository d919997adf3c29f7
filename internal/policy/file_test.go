package policy

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

const goodFile = `# a gateway's own policy
rules:
  - name: deploy
    match:
      repository_owner_id: 9919
      repository: acme/shop
      ref: ["refs/heads/main", "refs/tags/v*"]
    allow: ["tcp 10.0.0.5:5432", "icmp 10.0.0.0/24"]
    max_session: 2h
  - name: docs
    network: corp
    match: {repository_id: 42, environment: [staging]}
    allow:
      - tcp [fd00::/64]:443
`

func TestParseFile(t *testing.T) {
	p, err := ParseFile("p.yaml", []byte(goodFile), Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := p.Evaluate(today, "anything", github())
	if !cmp.Equal(d.Rules, []string{"deploy"}) || d.MaxSession != 2*time.Hour {
		t.Errorf("got %+v", d)
	}
	if d := p.Evaluate(today, "corp", github("environment", "staging")); !cmp.Equal(d.Rules, []string{"deploy", "docs"}) {
		t.Errorf("got %+v", d)
	}
}

func TestParseFileRefuses(t *testing.T) {
	tests := []struct{ name, text, message, next string }{
		{"empty", "", "p.yaml: the file is empty", ""},
		{"no rules", "rules: []\n", "p.yaml:1:1: the file holds no rule", ""},
		{"null rules", "rules:\n", "p.yaml:1:1: the file holds no rule", ""},
		{"another key", "rule: []\n", `p.yaml:1:1: unknown key "rule"`, `"rules"`},
		{"a coordinator's file", "url: x\nrules: []\n", `p.yaml:1:1: unknown key "url"`, ""},
		{"unknown key", edit("max_session", "max_sesion"), `p.yaml:9:5: unknown key "max_sesion"`, `"max_session"`},
		{"duplicate key", edit("network: corp", "name: again"), "p.yaml:11:5: ", ""},
		{"duplicate claim", edit("repository: acme/shop", "repository_owner_id: 1"), "p.yaml:6:7: ", ""},
		{"second document", goodFile + "---\nrules: []\n", "p.yaml:15:1: a second document", ""},
		{"unpinned", edit("repository_id: 42, ", ""), `p.yaml:12:5: rule "docs" pins neither`, "repository_owner_id"},
		{"bad allow", edit("icmp 10.0.0.0/24", "icmp 10.0.0.1/24"), "p.yaml:8:34: 10.0.0.1/24 has bits set", "10.0.0.0/24"},
		{"bad allow in a block", edit("tcp [fd00::/64]:443", "tcp db..internal:443"), "p.yaml:14:9: \"db..internal\" is no address", ""},
		{"bad claim", edit("environment:", "enviroment:"), `p.yaml:12:32: unknown claim "enviroment"`, `"environment"`},
		{"bad value in a list", edit("refs/tags/v*", "v*"), "p.yaml:7:32: a ref is a full name", ""},
		{"bad single value", edit("acme/shop", "shop"), "p.yaml:6:19: a repository is OWNER/REPO", ""},
		{"bad value in a list of one", edit("[staging]", `[""]`), "p.yaml:12:", ""},
		{"number with a sign", edit("9919", "+9919"), "p.yaml:5:28: repository_owner_id is a number", ""},
		{"mapping as a value", edit("acme/shop", "{a: b}"), "p.yaml:6:19: a value has to be a text", ""},
		{"list in a list", edit("[staging]", "[[staging]]"), "p.yaml:12:46: a value has to be a text", ""},
		{"null in a list", edit("[staging]", "[null]"), "p.yaml:12:46: a value has to be a text", ""},
		{"claim without a value", edit("ref: [\"refs/heads/main\", \"refs/tags/v*\"]", "ref:"), "p.yaml:7:7: ref has no value", ""},
		{"alias", edit("[staging]", "*x"), "p.yaml:12:45: aliases", ""},
		{"unquoted glob", edit("[staging]", "**"), "p.yaml:12:45: aliases", "quote"},
		{"duration without a unit", edit("2h", "7200"), `p.yaml:9:18: "max_session" has to be a duration`, ""},
		{"name missing", edit("name: docs", "network: lab"), "p.yaml:", ""},
		{"same name", edit("name: docs", "name: deploy"), `p.yaml:10:11: the name "deploy"`, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseFile("p.yaml", []byte(tt.text), Options{})
			if problem.CodeOf(err) != problem.BadConfig {
				t.Fatalf("got %v", err)
			}
			e := problem.From(err)
			if !strings.HasPrefix(e.Message, tt.message) || !strings.Contains(e.Next, tt.next) || e.Next == "" {
				t.Errorf("got %q, next %q", e.Message, e.Next)
			}
		})
	}
}

func edit(old, new string) string {
	if !strings.Contains(goodFile, old) {
		panic("nothing to replace: " + old)
	}
	return strings.Replace(goodFile, old, new, 1)
}

func TestValuesKeepTheirText(t *testing.T) {
	var v struct {
		A Values `yaml:"a"`
	}
	for text, want := range map[string]Values{
		"a: 0123": {"0123"}, "a: 9919": {"9919"}, "a: 1.10": {"1.10"}, "a: true": {"true"}, "a: [1, x, '2', \"3\"]": {"1", "x", "2", "3"},
		"a: 99999999999999999999": {"99999999999999999999"}, "a: []": {}, "a: |-\n  x": {"x"}, "a: 0x1F": {"0x1F"},
	} {
		if err := yamlfile.Decode("f", []byte(text), &v); err != nil || !cmp.Equal(v.A, want) {
			t.Errorf("%q: %q, %v", text, v.A, err)
		}
	}
}
