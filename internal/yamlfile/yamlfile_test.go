package yamlfile

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml/ast"
	"github.com/google/go-cmp/cmp"

	"github.com/culvertnet/culvert/internal/problem"
)

type document struct {
	URL      string            `yaml:"url"`
	Listen   string            `yaml:"listen,omitempty"`
	Debug    bool              `yaml:"debug"`
	Small    int8              `yaml:"small"`
	Count    uint              `yaml:"count"`
	Ratio    float64           `yaml:"ratio"`
	Lease    time.Duration     `yaml:"lease"`
	Range    netip.Prefix      `yaml:"range"`
	State    *state            `yaml:"state"`
	Networks map[string]state  `yaml:"networks"`
	Labels   map[string]string `yaml:"labels"`
	Names    []string          `yaml:"names"`
	Items    []state           `yaml:"items"`
	Custom   verbatim          `yaml:"custom"`
	Any      any               `yaml:"any"`
	Inlined  `yaml:",inline"`
	Hidden   string `yaml:"-"`
	NoTag    string
}

// Inlined is exported because the library cannot set fields of an unexported embedded struct.
type Inlined struct {
	Extra string `yaml:"extra"`
}

type state struct {
	Dir string `yaml:"dir"`
	Max int    `yaml:"max"`
}

type verbatim string

func (v *verbatim) UnmarshalYAML(node ast.Node) error {
	text, ok := Scalar(node)
	if !ok || text == "bad" {
		return errors.New("Not what is wanted.")
	}
	*v = verbatim(text)
	return nil
}

func TestDecode(t *testing.T) {
	const text = `# a comment
url: https://example.com
listen: ":443"
debug: true
small: -5
count: 7
ratio: 0.5
lease: 10m
range: 198.18.0.0/16
state: {dir: /var/lib, max: 3}
networks:
  corp: {dir: a}
  "lab net":
    dir: b
labels: {a: b}
names: [x, "12", '*']
items:
  - dir: one
  - {dir: two}
custom: 0123
any: [1, {a: b}]
extra: more
notag: yes
`
	var got document
	if err := Decode("c.yaml", []byte(text), &got); err != nil {
		t.Fatal(err)
	}
	want := document{
		URL: "https://example.com", Listen: ":443", Debug: true, Small: -5, Count: 7, Ratio: 0.5,
		Lease: 10 * time.Minute, Range: netip.MustParsePrefix("198.18.0.0/16"), State: &state{Dir: "/var/lib", Max: 3},
		Networks: map[string]state{"corp": {Dir: "a"}, "lab net": {Dir: "b"}},
		Labels:   map[string]string{"a": "b"}, Names: []string{"x", "12", "*"},
		Items: []state{{Dir: "one"}, {Dir: "two"}}, Custom: "0123",
		Any: []any{uint64(1), map[string]any{"a": "b"}}, Inlined: Inlined{Extra: "more"}, NoTag: "yes",
	}
	opts := cmp.Options{cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })}
	if diff := cmp.Diff(want, got, opts); diff != "" {
		t.Error(diff)
	}
}

func TestDecodeRefuses(t *testing.T) {
	tests := []struct {
		name, text string
		message    string // what the message begins with, place included
		next       string // what the next step holds
	}{
		{"empty", "", "c.yaml: the file is empty", ""},
		{"only a comment", "# nothing\n", "c.yaml: the file is empty", ""},
		{"not UTF-8", "url: \xff\n", "c.yaml: the file is not valid UTF-8", ""},
		{"a list as document", "- a\n", `c.yaml:1:1: the document has to be a mapping, not a list`, ""},
		{"a text as document", "hello\n", `c.yaml:1:1: the document has to be a mapping, not a text`, ""},
		{"unknown key", "url: x\nlistem: y\n", `c.yaml:2:1: unknown key "listem"`, `did you mean "listen"?`},
		{"unknown key in capitals", "URL: x\n", `c.yaml:1:1: unknown key "URL"`, `did you mean "url"?`},
		{"swapped letters", "rnage: x\n", `c.yaml:1:1: unknown key "rnage"`, `did you mean "range"?`},
		{"unknown key far from all", "zebra: x\n", `c.yaml:1:1: unknown key "zebra"`, "the keys here are any, "},
		{"unknown nested key", "state:\n  dir: x\n  dri: y\n", `c.yaml:3:3: unknown key "dri" in "state"`, `"dir"`},
		{"unknown key in flow", "state: {dir: x, dri: y}\n", `c.yaml:1:17: unknown key "dri" in "state"`, `"dir"`},
		{"unknown key in a list", "items:\n  - dir: a\n  - dor: b\n", `c.yaml:3:5: unknown key "dor" in "items[1]"`, `"dir"`},
		{"unknown key in a map", "networks:\n  corp:\n    dur: a\n", `c.yaml:3:5: unknown key "dur" in "corp"`, `"dir"`},
		{"ignored field", "hidden: x\n", `c.yaml:1:1: unknown key "hidden"`, ""},
		{"duplicate key", "url: a\nlease: 1s\nurl: b\n", `c.yaml:3:1: `, ""},
		{"duplicate key in a map", "labels:\n  a: b\n  a: c\n", `c.yaml:3:3: `, ""},
		{"duplicate key, one quoted", "labels: {a: b, \"a\": c}\n", `c.yaml:1:16: `, ""},
		{"second document", "url: a\n---\nurl: b\n", "c.yaml:2:1: a second document begins here", "one document"},
		{"empty second document", "url: a\n---\n", "c.yaml:2:1: a second document begins here", ""},
		{"document after its end", "url: a\n...\nurl: b\n", "c.yaml:3:1: a second document begins here", ""},
		{"two headers", "---\n---\nurl: b\n", "c.yaml:2:1: a second document begins here", ""},
		{"anchor", "url: &a x\n", "c.yaml:1:6: anchors (&) are not supported", ""},
		{"alias", "url: *a\n", "c.yaml:1:6: aliases (*) are not supported", "quote"},
		{"merge key", "state:\n  <<: {dir: a}\n", "c.yaml:2:3: merge keys (<<) are not supported", ""},
		{"tag", "url: !!binary aGk=\n", "c.yaml:1:6: tags (!) are not supported", ""},
		{"directive", "%YAML 1.2\n---\nurl: x\n", "c.yaml:1:1: directives (%) are not supported", ""},
		{"mapping for a text", "url: {a: b}\n", `c.yaml:1:6: "url" has to be a text, not a mapping`, ""},
		{"list for a text", "url: [a]\n", `c.yaml:1:6: "url" has to be a text, not a list`, ""},
		{"text for a mapping in a list", "items: [{dir: a}, b]\n", `c.yaml:1:19: "items[1]" has to be a mapping, not a text`, ""},
		{"text for a list", "names: a\n", `c.yaml:1:8: "names" has to be a list, not a text`, ""},
		{"text for a map", "labels: a\n", `c.yaml:1:9: "labels" has to be a mapping, not a text`, ""},
		{"text for a struct", "state: a\n", `c.yaml:1:8: "state" has to be a mapping, not a text`, ""},
		{"text for a number", "count: many\n", `c.yaml:1:8: "count" has to be a whole number, not a text`, ""},
		{"fraction for an integer", "count: 1.5\n", `c.yaml:1:8: "count" has to be a whole number, not a number`, ""},
		{"negative for unsigned", "count: -1\n", `c.yaml:1:8: "count" is out of range: -1`, ""},
		{"too large", "small: 200\n", `c.yaml:1:8: "small" is out of range: 200`, ""},
		{"far too large", "count: 99999999999999999999\n", `c.yaml:1:8: "count" `, ""},
		{"text for a boolean", "debug: yes\n", `c.yaml:1:8: "debug" has to be true or false, not a text`, ""},
		{"text for a fraction", "ratio: half\n", `c.yaml:1:8: "ratio" has to be a number, not a text`, ""},
		{"duration without a unit", "lease: 600\n", `c.yaml:1:8: "lease" has to be a duration with a unit, not "600"`, "10m"},
		{"duration of nonsense", "lease: soon\n", `c.yaml:1:8: "lease" has to be a duration with a unit, not "soon"`, ""},
		{"duration as a list", "lease: [1m]\n", `c.yaml:1:8: "lease" has to be a duration, not a list`, ""},
		{"bad prefix", "url: x\nrange: 198.18.0.0\n", `c.yaml:2:8: "range": `, ""},
		{"prefix as a mapping", "range: {a: b}\n", `c.yaml:1:8: "range" has to be a text, not a mapping`, ""},
		{"octal into text", "url: 0123\n", `c.yaml:1:6: "url" would be read as "83"`, "quotes"},
		{"exponent into text", "url: 1.5e3\n", `c.yaml:1:6: "url" would be read as`, "quotes"},
		{"trailing zero into text", "labels: {go: 1.10}\n", `c.yaml:1:14: "go" would be read as "1.1"`, "quotes"},
		{"custom type", "url: x\ncustom: bad\n", `c.yaml:2:9: not what is wanted`, ""},
		{"complex key", "labels:\n  ? [a]\n  : b\n", "c.yaml:3:3: ", ""},
		{"broken syntax", "url: [a\nlease: 1s\n", "c.yaml:", ""},
		{"tab indentation", "state:\n\tdir: a\n", "c.yaml:", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var v document
			err := Decode("c.yaml", []byte(tt.text), &v)
			mustBeBadConfig(t, err)
			e := problem.From(err)
			if !strings.HasPrefix(e.Message, tt.message) {
				t.Errorf("message %q, want it to begin with %q", e.Message, tt.message)
			}
			if !strings.Contains(e.Next, tt.next) {
				t.Errorf("next %q, want it to hold %q", e.Next, tt.next)
			}
		})
	}
}

// Every fault is told at once, and what is sound is there all the same.
func TestDecodeTellsAll(t *testing.T) {
	const text = `url: [a]
listem: x
lease: soon
url: again
state: {dri: a, max: 3}
networks:
  corp: {max: many, dir: c}
  lab: nothing
  ok: {dir: d}
items:
  - {dir: one}
  - two
  - {dir: three, dir: four, mox: 1}
labels: {a: 0123, b: c}
names: [x, [y], z]
count: 7
range: {only: one}
custom: bad
`
	d, err := Parse("c.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	var got document
	var told []string
	for _, f := range d.Decode(&got) {
		told = append(told, fmt.Sprintf("%d:%d %s", f.Line, f.Column, f.Path))
		if f.Message == "" || f.Next == "" {
			t.Errorf("a fault without words: %+v", f)
		}
	}
	want := []string{
		"1:6 $.url", "2:1 $.listem", "3:8 $.lease", "4:1 $.url", "5:9 $.state.dri", "7:15 $.networks.corp.max", "8:8 $.networks.lab",
		"12:5 $.items[1]", "13:18 $.items[2].dir", "13:29 $.items[2].mox", "14:13 $.labels.a", "15:12 $.names[1]", "17:8 $.range", "18:9 $.custom",
	}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Error(diff)
	}
	sound := document{
		State: &state{Max: 3}, Networks: map[string]state{"corp": {Dir: "c"}, "lab": {}, "ok": {Dir: "d"}},
		Items: []state{{Dir: "one"}, {}, {Dir: "three"}}, Labels: map[string]string{"a": "", "b": "c"}, Names: []string{"x", "", "z"}, Count: 7,
	}
	opts := cmp.Options{cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })}
	if diff := cmp.Diff(sound, got, opts); diff != "" {
		t.Error(diff)
	}
	if line, column := d.Place("$.items[2].dir"); line != 13 || column != 11 {
		t.Errorf("places are lost: %d:%d", line, column)
	}
}

// mustBeBadConfig holds an error against the house's form.
func mustBeBadConfig(t testing.TB, err error) {
	t.Helper()
	if problem.CodeOf(err) != problem.BadConfig {
		t.Fatalf("got %v, want a bad-config problem", err)
	}
	e := problem.From(err)
	if strings.ContainsAny(e.Message, "\n\x1b") || strings.HasSuffix(e.Message, ".") || e.Next == "" {
		t.Fatalf("message %q with next %q is not one plain line with a next step", e.Message, e.Next)
	}
}

// Inputs that would expand, recurse or run long have to be refused before they do.
func TestDecodeIsBounded(t *testing.T) {
	bomb := "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
	tests := map[string]string{
		"oversize":            "url: " + strings.Repeat("x", MaxSize),
		"alias bomb":          bomb,
		"open lists":          strings.Repeat("[", 1<<18),
		"open mappings":       strings.Repeat("{a: ", 1<<16),
		"nested entries":      strings.Repeat("- ", 1<<18) + "x",
		"nested complex keys": strings.Repeat("? ", 1<<18) + "x",
		"tags":                "any: " + strings.Repeat("!a ", 1<<16) + "x",
	}
	for name, text := range tests {
		t.Run(name, func(t *testing.T) {
			var v any
			mustBeBadConfig(t, Decode("c.yaml", []byte(text), &v))
		})
	}
}

func TestDecodeAllowsOneHeaderAndEnd(t *testing.T) {
	var v document
	if err := Decode("c.yaml", []byte("# c\n---\nurl: a\n...\n# end\n"), &v); err != nil || v.URL != "a" {
		t.Errorf("got %q, %v", v.URL, err)
	}
}

func TestAt(t *testing.T) {
	const text = `url: x
rules:
  - name: one
    match: {ref: [a, b], "odd.key": v}
    allow:
      - tcp 10.0.0.1:1
      - tcp 10.0.0.2:2
  - name: two
    allow: [x]
empty:
it's: here
`
	tests := []struct{ path, want string }{
		{"$", "f:1:1"},
		{"$.url", "f:1:6"},
		{"$.rules", "f:2:1"},
		{"$.rules[0]", "f:3:5"},
		{"$.rules[0].name", "f:3:11"},
		{"$.rules[0].match", "f:4:5"},
		{"$.rules[0].match.ref", "f:4:13"},
		{"$.rules[0].match.ref[1]", "f:4:22"},
		{"$.rules[0].match.'odd.key'", "f:4:37"},
		{"$.rules[0].allow[1]", "f:7:9"},
		{"$.rules[1]", "f:8:5"},
		{"$.rules[1].allow[0]", "f:9:13"},
		{"$.empty", "f:10:1"},
		{"$" + Key("it's"), "f:11:7"},
		// nearest parents
		{"$.rules[1].match.ref[0]", "f:8:5"},
		{"$.rules[7]", "f:2:1"},
		{"$.nothing", "f:1:1"},
		{"$.url[0].x", "f:1:6"},
		{"$.rules[0].name[0]", "f:3:11"},
		// paths that do not parse
		{"", "f:1:1"}, {"$.", "f:1:1"}, {"$.rules[", "f:2:1"}, {"$.rules[-1]", "f:2:1"}, {"$.rules[x]", "f:2:1"},
		{"$.'rules", "f:1:1"}, {"rules", "f:1:1"},
	}
	for _, tt := range tests {
		if got := At("f", []byte(text), tt.path); got != tt.want {
			t.Errorf("At(%q) = %s, want %s", tt.path, got, tt.want)
		}
	}
	for _, broken := range []string{"", "[", "a: b\n---\nc: d"} {
		if got := At("f", []byte(broken), "$.a"); got != "f" {
			t.Errorf("At in %q = %s, want the file's name alone", broken, got)
		}
	}
}

func TestKeyRoundTrip(t *testing.T) {
	for _, name := range []string{"a", "a_b-9", "a.b", "it's", `back\slash`, "[0]", "ü", " "} {
		steps := splitPath("$" + Key(name))
		if len(steps) != 1 || steps[0].key != name {
			t.Errorf("Key(%q) = %s reads back as %v", name, Key(name), steps)
		}
	}
}

func TestNearest(t *testing.T) {
	names := []string{"repository", "repository_id", "ref", "environment"}
	tests := []struct{ word, want string }{
		{"repositroy", "repository"}, {"Repository", "repository"}, {"repository-id", "repository_id"},
		{"reff", "ref"}, {"enviroment", "environment"}, {"rf", "ref"}, {"red", "ref"},
		{"runner", ""}, {"xx", ""}, {"", ""}, {strings.Repeat("x", 1000), ""},
	}
	for _, tt := range tests {
		if got := Nearest(tt.word, names); got != tt.want {
			t.Errorf("Nearest(%q) = %q, want %q", tt.word, got, tt.want)
		}
	}
}

// The form in which a list of servers is written on one line.
func TestURLsWithPortsInAFlowListInAFlowMapping(t *testing.T) {
	for _, text := range []string{
		"state: {nats: [tls://n1:4222, tls://n2:4222], credentials: FILE}",
		"state: {nats: [tls://n1:4222, 'tls://n2:4222'], credentials: FILE}",
		"state: {nats: [\"tls://n1:4222\", tls://n2:4222], credentials: FILE}",
		"state:\n  nats: [tls://n1:4222, tls://n2:4222]\n  credentials: FILE",
	} {
		var v struct {
			State struct {
				NATS        []string `yaml:"nats"`
				Credentials string   `yaml:"credentials"`
			} `yaml:"state"`
		}
		if err := Decode("f", []byte(text), &v); err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := strings.Join(v.State.NATS, " "); got != "tls://n1:4222 tls://n2:4222" || v.State.Credentials != "FILE" {
			t.Errorf("%s: read as %q and %q", text, v.State.NATS, v.State.Credentials)
		}
	}
	var v struct {
		List []string `yaml:"list"`
	}
	if err := Decode("f", []byte("list: [a: b]"), &v); err == nil {
		t.Errorf("a mapping in a list of texts is read as %q", v.List)
	}
}
