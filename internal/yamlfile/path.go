package yamlfile

import (
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"
)

// step is one step of a YAML path: a key, or an index where key is "".
type step struct {
	key   string
	index int
}

// splitPath reads as many steps as make sense and leaves the rest out.
func splitPath(path string) []step {
	var steps []step
	rest := strings.TrimPrefix(path, "$")
	for rest != "" {
		var (
			s  step
			ok bool
		)
		switch {
		case strings.HasPrefix(rest, ".'"):
			s.key, rest, ok = cutQuoted(rest[2:])
		case rest[0] == '.':
			s.key, rest = cutPlain(rest[1:])
			ok = s.key != ""
		case rest[0] == '[':
			var number string
			number, rest, ok = strings.Cut(rest[1:], "]")
			n, err := strconv.Atoi(number)
			s.index, ok = n, ok && err == nil && n >= 0
		}
		if !ok {
			return steps
		}
		steps = append(steps, s)
	}
	return steps
}

func cutPlain(s string) (key, rest string) {
	if i := strings.IndexAny(s, ".["); i >= 0 {
		return s[:i], s[i:]
	}
	return s, ""
}

// cutQuoted reads up to the closing single quote; a backslash takes the next character as it is.
func cutQuoted(s string) (key, rest string, ok bool) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\'':
			return b.String(), s[i+1:], b.Len() > 0
		case s[i] == '\\' && i+1 < len(s):
			i++
		}
		b.WriteByte(s[i])
	}
	return "", "", false
}

// locate follows steps from root and gives the token where the last node that exists begins.
func locate(root ast.Node, steps []step) *token.Token {
	node, at := root, first(root)
	for _, s := range steps {
		child, tk := descend(node, s)
		if tk == nil {
			return at
		}
		node, at = child, tk
	}
	return at
}

// descend gives a child and where it begins: a scalar at itself, a block or a missing value at its key.
func descend(node ast.Node, s step) (ast.Node, *token.Token) {
	if s.key == "" {
		list, ok := node.(*ast.SequenceNode)
		if !ok || s.index >= len(list.Values) {
			return nil, nil
		}
		return list.Values[s.index], first(list.Values[s.index])
	}
	mapping, ok := node.(ast.MapNode)
	if !ok {
		return nil, nil
	}
	for it := mapping.MapRange(); it.Next(); {
		if keyText(it.Key()) != s.key {
			continue
		}
		if _, scalar := it.Value().(ast.ScalarNode); scalar && it.Value().Type() != ast.NullType {
			return it.Value(), it.Value().GetToken()
		}
		return it.Value(), it.Key().GetToken()
	}
	return nil, nil
}

// first is where a node begins: a block mapping at its first key, not at the ":" that goccy/go-yaml gives.
func first(node ast.Node) *token.Token {
	if node == nil {
		return nil
	}
	if m, ok := node.(*ast.MappingNode); ok && !m.IsFlowStyle && len(m.Values) > 0 {
		return m.Values[0].Key.GetToken()
	}
	if m, ok := node.(*ast.MappingValueNode); ok {
		return m.Key.GetToken()
	}
	return node.GetToken()
}

// keyText is a key as decoding sees it.
func keyText(key ast.MapKeyNode) string {
	if tk := key.GetToken(); tk != nil {
		return tk.Value
	}
	return ""
}
