package yamlfile

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

// FuzzDecode looks for panics, endless loops and errors that are not in the house's form.
func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		"url: x\nitems: [{dir: a}]\n", "a: &b [*b]", "---\n...\n---", "{", "[", "? a\n: b", "url: |\n  x\n  y", "%YAML 1.2",
		"url: 'x", "names:\n- a\n-\n- - b", "lease: 1h\nrange: ::/0", "any: {a: [b, {c: d}]}", "\ufeffurl: x", "url: 0x1F",
		"a: b\n---\n", "state: ~", "custom: |-\n\n", "\"url\": \"\\u0000\"", "url: >-\n a\n\n b\n#c", "!!map {}", "- \t- x",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		hung := time.AfterFunc(60*time.Second, func() { panic(fmt.Sprintf("no answer in a minute: %q", data)) })
		defer hung.Stop()
		var v document
		if err := Decode("c.yaml", data, &v); err != nil {
			e := problem.From(err)
			if e.Code != problem.BadConfig || e.Next == "" || strings.ContainsAny(e.Message, "\n\x1b") {
				t.Fatalf("%q: %#v", data, e)
			}
		}
		At("c.yaml", data, "$.items[0].dir")
	})
}

// FuzzAt looks for panics on any path.
func FuzzAt(f *testing.F) {
	for _, seed := range []string{"$", "$.a", "$.a[0].b", "$.'q.k'", "$..", "$[", "$.'\\"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		if got := At("f", []byte("a: [{b: c}]\nq.k: d\n"), path); !strings.HasPrefix(got, "f:") {
			t.Fatalf("At(%q) = %q", path, got)
		}
	})
}
