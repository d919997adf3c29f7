package config

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/policy"
)

// block is one fenced block of the guide: its language, its kind, and the options behind it.
type block struct {
	line       int
	lang, kind string
	options    map[string]string
	text       string
}

var fence = regexp.MustCompile("(?ms)^```([a-z]*) ?([a-z]*) ?([^\n]*)\n(.*?)^```$")

func blocks(t *testing.T, doc []byte) []block {
	t.Helper()
	var out []block
	for _, m := range fence.FindAllSubmatchIndex(doc, -1) {
		part := func(i int) string { return string(doc[m[2*i]:m[2*i+1]]) }
		b := block{line: bytes.Count(doc[:m[0]], []byte("\n")) + 1, lang: part(1), kind: part(2), text: part(4), options: map[string]string{}}
		for _, o := range strings.Fields(part(3)) {
			name, value, _ := strings.Cut(o, "=")
			b.options[name] = value
		}
		out = append(out, b)
	}
	return out
}

// TestGuide checks every example of docs/policy.md: configurations and rules can be used and bring only the warnings that
// the block names, cases pass, what is said to be wrong is told as the guide shows, and all of it fits the schemas.
func TestGuide(t *testing.T) {
	doc, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	g := &guide{schemas: map[string]func(any) error{}}
	for _, name := range []string{"config", "policy", "cases"} {
		g.schemas[name] = compiled(t, name).Validate
	}
	kinds := map[string]int{}
	for _, b := range blocks(t, doc) {
		t.Run(fmt.Sprintf("line %d, %s %s", b.line, b.lang, b.kind), func(t *testing.T) { g.check(t, b) })
		kinds[b.kind]++
	}
	for _, kind := range []string{"rules", "config", "cases", "gateway", "wrong", "claims", "included"} {
		if kinds[kind] == 0 {
			t.Errorf("the guide shows no %s", kind)
		}
	}
	for code, about := range policy.Codes() {
		if !bytes.Contains(doc, fmt.Appendf(nil, "| `%s` | %s |\n", code, about)) {
			t.Errorf("the guide does not tell of %s: %s", code, about)
		}
	}
}

// guide is what the blocks so far have said.
type guide struct {
	schemas map[string]func(any) error
	config  *Config // of the last rules
	groups  string  // the last rules with groups, which an included file uses
	wrong   string  // what is to be told of the last wrong block
	include *block  // waits for the file that it includes
}

func (g *guide) check(t *testing.T, b block) {
	fits := func(schema string) {
		t.Helper()
		if err := g.schemas[schema](asJSON(t, b.text)); err != nil {
			t.Errorf("the schema of %s says %v", schema, err)
		}
	}
	switch b.kind {
	case "config":
		fits("config")
		g.usable(t, folder(t, map[string]string{"culvert.yaml": b.text}), b)
	case "rules":
		if g.include = nil; b.options["file"] != "" {
			g.include = &b
			return
		}
		if strings.Contains(b.text, "groups:") {
			g.groups = b.text
		}
		if err := g.schemas["config"](asJSON(t, without(b.text))); err != nil {
			t.Errorf("the schema says %v", err)
		}
		g.usable(t, folder(t, map[string]string{"culvert.yaml": without(b.text), "ghes-keys.json": "{}"}), b)
	case "included":
		fits("policy")
		shared, _, _ := strings.Cut(g.groups, "rules:")
		g.usable(t, folder(t, map[string]string{
			"culvert.yaml": without(g.include.text), "shared.yaml": shared, g.include.options["file"]: b.text,
		}), block{options: map[string]string{"warns": "unused-target,unused-group"}})
	case "cases":
		fits("cases")
		g.passes(t, b)
	case "gateway":
		fits("policy")
		r := CheckRules(folder(t, map[string]string{"culvert.yaml": b.text}))
		g.noteworthy(t, r.Findings, b)
	case "wrong":
		var out bytes.Buffer
		file := folder(t, map[string]string{"culvert.yaml": b.text})
		r := CheckRules(file)
		r.WriteText(&out)
		g.wrong = strings.ReplaceAll(out.String(), file, "rules.yaml")
	case "claims":
		if _, err := claims.Parse([]byte(b.text)); err != nil {
			t.Error(err)
		}
	default:
		if b.lang != "text" || g.wrong == "" {
			t.Fatalf("nothing checks this block")
		}
		if d := cmp.Diff(g.wrong, b.text); d != "" {
			t.Error(d)
		}
		g.wrong = ""
	}
}

func (g *guide) usable(t *testing.T, file string, b block) {
	t.Helper()
	c, findings := Check(file)
	g.noteworthy(t, findings, b)
	g.config = c
}

// noteworthy wants the warnings that a block names, and no mistake.
func (g *guide) noteworthy(t *testing.T, findings []policy.Finding, b block) {
	t.Helper()
	var got []string
	for _, f := range findings {
		if f.Severity == policy.Mistake {
			t.Errorf("%s: %s; %s", f.Place(), f.Message, f.Next)
		} else if !slices.Contains(got, string(f.Code)) {
			got = append(got, string(f.Code))
		}
	}
	slices.Sort(got)
	want := strings.FieldsFunc(b.options["warns"], func(r rune) bool { return r == ',' })
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("it brings the warnings %q, the guide says %q: %+v", got, want, findings)
	}
}

func (g *guide) passes(t *testing.T, b block) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "cases.yaml")
	if err := os.WriteFile(file, []byte(b.text), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := g.config.RunCases(file, time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range r.Results {
		for _, d := range c.Differences {
			t.Errorf("%s: %s", c.Name, d)
		}
	}
}
