package policy

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestGlob(t *testing.T) {
	tests := []struct {
		pattern, value string
		want           bool
	}{
		{"a", "a", true}, {"a", "b", false}, {"a", "ab", false}, {"ab", "a", false}, {"", "", false}, {"", "a", false}, {"*", "", false}, {"**", "", false},
		{"*", "a", true}, {"*", "a/b", false}, {"*", "/", false}, {"**", "/", true}, {"**", "a/b/c", true},
		{"a*", "a", true}, {"*a", "a", true}, {"a*c", "abc", true}, {"a*c", "ac", true}, {"a*c", "a/c", false}, {"a**c", "a/c", true},
		{"a*/c", "ab/c", true}, {"a/*/c", "a/b/c", true}, {"a/*/c", "a//c", true}, {"a/*/c", "a/b/b/c", false}, {"a/**/c", "a/b/b/c", true},
		{"a/**/c", "a/c", false}, {"***", "a/b", true}, {"a****b", "a/b", true}, {"*a*b*", "xaxbx", true}, {"*a*b*", "xbxax", false},
		{"*/*", "a/b", true}, {"*/*", "ab", false}, {"**/x/*", "a/b/x/y", true}, {"**/x/*", "a/x/y/x/z", true}, {"**/x/*", "a/x/y/z", false},
		{"*ab*/**c", "aab/xc", true}, {"a?", "ab", false}, {"a?", "a?", true}, {"[ab]", "a", false}, {"[ab]", "[ab]", true}, {`a\*`, `a\x`, true},
		{"a.c", "abc", false}, {"a|b", "a", false}, {"^a$", "a", false}, {"*é", "é", true}, {"a*", "A", false},
	}
	for _, tt := range tests {
		g := compileGlob(tt.pattern, foldNone)
		if got := g.match(tt.value); got != tt.want {
			t.Errorf("%q against %q: %v", tt.pattern, tt.value, got)
		}
	}
}

// reference translates a glob to a regular expression that was checked by hand.
func reference(pattern string, folded bool) *regexp.Regexp {
	var b strings.Builder
	b.WriteString(`(?s)`)
	if folded {
		b.WriteString(`(?i)`)
	}
	b.WriteString(`\A(?:`)
	for i := 0; i < len(pattern); i++ {
		switch {
		case strings.HasPrefix(pattern[i:], "**"):
			b.WriteString(`.*`)
			i += len(pattern[i:]) - len(strings.TrimLeft(pattern[i:], "*")) - 1
		case pattern[i] == '*':
			b.WriteString(`[^/]*`)
		default:
			b.WriteString(regexp.QuoteMeta(pattern[i : i+1]))
		}
	}
	b.WriteString(`)\z`)
	return regexp.MustCompile(b.String())
}

// A small alphabet makes near misses frequent.
func TestGlobAgreesWithReference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pattern := rapid.StringMatching(`[aAb/*]{1,12}`).Draw(t, "pattern")
		value := rapid.StringMatching(`[aAb/]{1,14}`).Draw(t, "value")
		f := rapid.SampledFrom([]fold{foldNone, foldAll}).Draw(t, "fold")
		g := compileGlob(pattern, f)
		if got, want := g.match(value), reference(pattern, f == foldAll).MatchString(value); got != want {
			t.Fatalf("%q against %q: %v, the reference says %v", pattern, value, got, want)
		}
	})
}

// Folding OWNER/REPO is matching with that part of both in lower case, for patterns that spell it out.
func TestGlobFoldsRepositoryOnly(t *testing.T) {
	part := rapid.StringMatching(`[aAbB]{1,3}`)
	rest := rapid.StringMatching(`[aAbB/@]{1,6}`)
	rapid.Check(t, func(t *rapid.T) {
		pattern := []string{part.Draw(t, "owner"), part.Draw(t, "repo"), rest.Draw(t, "rest")}
		value := []string{part.Draw(t, "owner'"), part.Draw(t, "repo'"), rest.Draw(t, "rest'")}
		g := compileGlob(strings.Join(pattern, "/"), foldRepo)
		want := strings.EqualFold(pattern[0], value[0]) && strings.EqualFold(pattern[1], value[1]) && pattern[2] == value[2]
		if got := g.match(strings.Join(value, "/")); got != want {
			t.Fatalf("%q against %q: %v", pattern, value, got)
		}
	})
}

// The patterns that make backtracking matchers exponential take a few milliseconds.
func TestGlobIsBounded(t *testing.T) {
	value := strings.Repeat("a", MaxClaim)
	for _, pattern := range []string{
		strings.Repeat("*a", MaxPattern/2-1) + "b", strings.Repeat("**a", MaxPattern/3-1) + "b", strings.Repeat("a*", MaxPattern/2-1) + "b",
		strings.Repeat("*a**a", MaxPattern/5-1) + "b", "**" + strings.Repeat("a", MaxPattern-3) + "b",
	} {
		if len(pattern) > MaxPattern {
			t.Fatal("the pattern is longer than a file may hold")
		}
		g := compileGlob(pattern, foldAll)
		start := time.Now()
		if g.match(value) {
			t.Errorf("%.10s… matches", pattern)
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("%.10s… took %s", pattern, took)
		}
	}
}

func BenchmarkGlob(b *testing.B) {
	for name, tt := range map[string]struct{ pattern, value string }{
		"literal": {"refs/heads/main", "refs/heads/main"},
		"star":    {"refs/tags/v*", "refs/tags/v1.22.333"},
		"worst":   {strings.Repeat("*a", MaxPattern/2-1) + "b", strings.Repeat("a", MaxClaim)},
	} {
		g := compileGlob(tt.pattern, foldNone)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				g.match(tt.value)
			}
		})
	}
}
