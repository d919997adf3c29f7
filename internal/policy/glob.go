package policy

import "strings"

// glob is one compiled value of a match. The zero value matches nothing.
//
// Matching simulates all ways to match at once, so it takes at most len(pattern) × len(value) steps and cannot
// backtrack exponentially, whatever the pattern.
type glob struct {
	tokens  []globToken
	literal string // the whole pattern where it holds no wildcard
	fold    fold
}

type globToken struct {
	kind globKind
	char byte
}

type globKind uint8

const (
	globChar   globKind = iota
	globStar            // any run without '/'
	globDouble          // any run
)

// compileGlob compiles a pattern of at most [MaxPattern] bytes. Two or more stars in a row are one `**`.
func compileGlob(pattern string, f fold) glob {
	if !strings.Contains(pattern, "*") {
		return glob{literal: pattern, fold: f}
	}
	g := glob{fold: f}
	for i := 0; i < len(pattern); i++ {
		if pattern[i] != '*' {
			g.tokens = append(g.tokens, globToken{globChar, pattern[i]})
			continue
		}
		kind := globStar
		for i+1 < len(pattern) && pattern[i+1] == '*' {
			kind = globDouble
			i++
		}
		g.tokens = append(g.tokens, globToken{kind: kind})
	}
	return g
}

// match tells whether the whole value matches. An empty value never does.
func (g *glob) match(value string) bool {
	if value == "" {
		return false
	}
	folded := g.folded(value)
	if g.tokens == nil {
		return matchLiteral(g.literal, value, folded)
	}
	return len(value) <= MaxClaim && g.simulate(value, folded)
}

// folded gives how many of a value's first bytes compare without regard to case.
func (g *glob) folded(value string) int {
	switch g.fold {
	case foldAll:
		return len(value)
	case foldRepo:
		owner := strings.IndexByte(value, '/') + 1
		repo := strings.IndexByte(value[owner:], '/')
		if owner == 0 || repo < 0 {
			return 0
		}
		return owner + repo
	}
	return 0
}

func matchLiteral(pattern, value string, folded int) bool {
	if len(pattern) != len(value) {
		return false
	}
	for i := range len(value) {
		if !sameByte(pattern[i], value[i], i < folded) {
			return false
		}
	}
	return true
}

func sameByte(a, b byte, folded bool) bool {
	return a == b || folded && lower(a) == lower(b)
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// states holds for every j whether the first j tokens can match what has been read of the value.
type states [MaxPattern + 1]bool

func (g *glob) simulate(value string, folded int) bool {
	var now states
	now[0] = true
	g.skipStars(&now)
	for i := range len(value) {
		next, alive := g.step(&now, value[i], i < folded)
		if !alive {
			return false
		}
		g.skipStars(&next)
		now = next
	}
	return now[len(g.tokens)]
}

// step reads one byte of the value.
func (g *glob) step(now *states, c byte, folded bool) (next states, alive bool) {
	for j, t := range g.tokens {
		if !now[j] {
			continue
		}
		switch {
		case t.kind == globDouble, t.kind == globStar && c != '/':
			next[j] = true
			alive = true
		case t.kind == globChar && sameByte(t.char, c, folded):
			next[j+1] = true
			alive = true
		}
	}
	return next, alive
}

// skipStars lets wildcards match nothing. No two of them are neighbours.
func (g *glob) skipStars(s *states) {
	for j, t := range g.tokens {
		if s[j] && t.kind != globChar {
			s[j+1] = true
		}
	}
}
