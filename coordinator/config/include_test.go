package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/culvertnet/culvert/internal/problem"
)

// folder writes files into a new folder and gives the path of culvert.yaml in it.
func folder(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "culvert.yaml")
}

// without is the minimal file without its rules, with more.
func without(add string) string {
	head, _, _ := strings.Cut(minimal, "rules:")
	return head + add
}

func TestInclude(t *testing.T) {
	file := folder(t, map[string]string{
		"culvert.yaml":         without("include: [rules.d, shared.yaml]\ngroups: {shop: [{repository_id: 1}]}\n"),
		"shared.yaml":          "targets: {db: [\"tcp db.internal:5432\"]}\n",
		"rules.d/20-b.yml":     "rules: [{name: b, groups: shop, targets: db}]\n",
		"rules.d/10-a.yaml":    "rules: [{name: a, groups: shop, targets: db}]\n",
		"rules.d/README.md":    "not rules",
		"rules.d/.hidden.yaml": "not: rules",
		"rules.d/c.yaml.bak":   "not: rules",
		"rules.d/sub/d.yaml":   "not: rules",
	})
	c, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(file)
	want := []string{filepath.Join(dir, "rules.d/10-a.yaml"), filepath.Join(dir, "rules.d/20-b.yml"), filepath.Join(dir, "shared.yaml")}
	if d := cmp.Diff(want, c.Included); d != "" {
		t.Error(d)
	}
	if len(c.Rules) != 2 || c.Rules[0].Name != "a" || c.Rules[1].Name != "b" {
		t.Errorf("rules %+v", c.Rules)
	}
}

// A mounted ConfigMap is a folder of links into a hidden one.
func TestIncludeThroughLinks(t *testing.T) {
	file := folder(t, map[string]string{
		"culvert.yaml":            without("include: rules.d\n"),
		"rules.d/..1/a.yaml":      "rules: [{name: a, match: {repository_id: 1}, allow: ['tcp 10.0.0.1:1']}]\n",
		"rules.d/..1/ignored.txt": "x",
	})
	dir := filepath.Join(filepath.Dir(file), "rules.d")
	for link, to := range map[string]string{"..data": "..1", "a.yaml": "..data/a.yaml"} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	if c, err := Load(file); err != nil || len(c.Rules) != 1 {
		t.Errorf("got %+v, %v", c, err)
	}
}

func TestIncludeRefuses(t *testing.T) {
	const sound = "rules: [{name: a, match: {repository_id: 1}, allow: ['tcp 10.0.0.1:1']}]\n"
	for _, tt := range []struct {
		name, include string
		files         map[string]string
		want          string
	}{
		{"no such folder", "rules.d", nil, "culvert.yaml:6:10: \"rules.d\" cannot be included: no such file or directory"},
		{"no such file, in a list", "[a.yaml, b.yaml]", map[string]string{"a.yaml": sound}, "culvert.yaml:6:19: \"b.yaml\" cannot be"},
		{"twice", "[x, x/a.yaml]", map[string]string{"x/a.yaml": sound}, "a.yaml is included twice"},
		{"nothing", "''", nil, "cannot be included"},
		{"other keys", "a.yaml", map[string]string{"a.yaml": "url: https://x.example\n"}, `a.yaml:1:1: unknown key "url"`},
		{"nested", "a.yaml", map[string]string{"a.yaml": "include: b.yaml\n"}, `a.yaml:1:1: unknown key "include"`},
		{"broken", "a.yaml", map[string]string{"a.yaml": "rules: ["}, "a.yaml:1:"},
		{"empty", "a.yaml", map[string]string{"a.yaml": ""}, "a.yaml: the file is empty"},
		{"mistake inside", "a.yaml", map[string]string{"a.yaml": strings.Replace(sound, "repository_id", "repositoryid", 1)}, "a.yaml:1:41: unknown claim"},
		{"name of another file's", "[a.yaml, b.yaml]", map[string]string{"a.yaml": sound, "b.yaml": sound}, "b.yaml:1:16: the name \"a\" is that of a rule in "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			files := map[string]string{"culvert.yaml": without("include: " + tt.include + "\n")}
			for name, text := range tt.files {
				files[name] = text
			}
			_, err := Load(folder(t, files))
			if problem.CodeOf(err) != problem.BadConfig || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v\nwant %s", err, tt.want)
			}
		})
	}
}

// Everything that is wrong is told at once, in the order of the files, and nothing twice.
func TestCheckTellsAll(t *testing.T) {
	file := folder(t, map[string]string{
		"culvert.yaml": `url: https://github.com/culvert
upd: ":3479"
tls: {cert: c.pem}
state: {dir: data, dri: x}
issuers: [{url: https://token.actions.githubusercontent.com, name: Git Hub}]
networks:
  corp: {gateways: [{enrol_sha256: 12}]}
  lab: {gateways: many}
include: rules.d
rules:
  - {name: a, network: crop, match: {repository_owner_id: acme, reff: x}, allow: ["tcp 10.0.0.1", "udp *:1"]}
  - {name: b, network: corp, match: [x], allow: ["tcp 10.0.0.1:1"]}
  - {name: a, network: lab, match: {ref: refs/heads/main}, targets: database, max_session: 9999h}
`,
		"rules.d/a.yaml": "targets: {database: [tcp]}\nrulez: []\n",
		"rules.d/b.yaml": "rules: [{name: z\n",
	})
	c, findings := Check(file)
	if c != nil {
		t.Error("a broken file is taken")
	}
	var got []string
	for _, f := range findings {
		got = append(got, fmt.Sprintf("%s:%d %s", filepath.Base(f.File), f.Line, f.Path))
		if f.Next == "" || f.Message == "" {
			t.Errorf("%+v says nothing", f)
		}
	}
	want := []string{
		"culvert.yaml:1 $.url", "culvert.yaml:2 $.upd", "culvert.yaml:3 $.tls", "culvert.yaml:4 $.state.dri",
		"culvert.yaml:5 $.issuers[0].name", "culvert.yaml:7 $.networks.corp.gateways[0].enrol_sha256", "culvert.yaml:8 $.networks.lab.gateways",
		"culvert.yaml:11 $.rules[0].network", "culvert.yaml:11 $.rules[0].match.repository_owner_id", "culvert.yaml:11 $.rules[0].match.reff",
		"culvert.yaml:11 $.rules[0].allow[0]", "culvert.yaml:11 $.rules[0].allow[1]", "culvert.yaml:12 $.rules[1].match",
		"culvert.yaml:13 $.rules[2].name", "culvert.yaml:13 $.rules[2].match", "culvert.yaml:13 $.rules[2].max_session",
		"a.yaml:1 $.targets.database[0]", "a.yaml:2 $.rulez", "b.yaml:1 ",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	_, err := Load(file)
	if p := problem.From(err); !strings.Contains(p.Next, fmt.Sprintf("%d more: culvert-coordinator check", len(want)-1)) {
		t.Errorf("loading tells %v", err)
	}
}
