// Package yamlfile reads configuration files strictly: unknown keys, duplicate keys, a second document, anchors, aliases,
// tags and oversized files are refused with line and column.
//
// Aliases are refused altogether rather than bounded: they make a small file expand without end, and no file of Culvert
// is long enough to need them. Tags and directives are refused because nothing here gives them a meaning.
//
// A scalar decodes into a string only if the string is what the file shows. A plain 0123 or 1.10 would silently become
// 83 or 1.1, so such a value has to be quoted.
package yamlfile

import (
	"errors"
	"fmt"
	"reflect"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"

	"github.com/culvertnet/culvert/internal/problem"
)

// MaxSize is the largest file that is read, in bytes.
const MaxSize = 4 << 20

// Decode reads one YAML document into v, a pointer. The error is a *problem.Error with code bad-config that names file,
// line and column. After an error v holds nothing to rely on.
func Decode(file string, data []byte, v any) error {
	if f := read(data, v); f != nil {
		return f.problem(file)
	}
	return nil
}

func read(data []byte, v any) (f *fault) {
	defer recoverFault(&f)
	body, f := parse(data)
	if f != nil {
		return f
	}
	if f := check(body, reflect.TypeOf(v), ""); f != nil {
		return f
	}
	return decode(body, v)
}

// At gives "file:line:column" of the node at a YAML path such as "$.rules[2].match.ref", for errors found after
// decoding. Where the path leads nowhere it gives the nearest parent's place, and the file's name alone where there is
// none, or where data does not parse.
//
// A key that holds anything but ASCII letters, digits, '_' and '-' is written in single quotes: $.match.'a.b'. See
// [Key].
func At(file string, data []byte, path string) string {
	tk, _ := find(data, path)
	return place(file, tk)
}

func find(data []byte, path string) (tk *token.Token, f *fault) {
	defer recoverFault(&f)
	body, f := parse(data)
	if f != nil {
		return nil, f
	}
	return locate(body, splitPath(path)), nil
}

// Key writes a mapping key as a step of a YAML path, dot included.
func Key(name string) string {
	plain := name != "" && strings.IndexFunc(name, func(r rune) bool { return !isPlain(r) }) < 0
	if plain {
		return "." + name
	}
	return ".'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(name) + "'"
}

func isPlain(r rune) bool {
	return r == '_' || r == '-' || '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z'
}

// decode lets goccy/go-yaml set v, a pointer. What [check] has passed rarely fails here; what does is reported all the
// same.
func decode(node ast.Node, v any) *fault {
	dec := yaml.NewDecoder(strings.NewReader(""), yaml.Strict())
	if err := dec.DecodeFromNode(node, v); err != nil {
		return faultOf(err, first(node))
	}
	return nil
}

// fault is what is wrong with a file, and where. A nil token means the file as a whole.
type fault struct {
	token   *token.Token
	message string
	next    string
	err     error
}

func (f *fault) problem(file string) error {
	return problem.Wrap(f.err, problem.BadConfig, place(file, f.token)+": "+f.message, f.next)
}

// place gives file:line:column, both counted from 1, columns in characters.
func place(file string, tk *token.Token) string {
	if tk == nil || tk.Position == nil {
		return file
	}
	return fmt.Sprintf("%s:%d:%d", file, tk.Position.Line, tk.Position.Column)
}

// faultOf translates an error of goccy/go-yaml, whose text may hold several coloured lines of source, or of an
// UnmarshalYAML method, to one plain line. fallback is where the error belongs if it does not say.
func faultOf(err error, fallback *token.Token) *fault {
	f := &fault{token: fallback, err: err, next: "correct this line"}
	message := err.Error()
	if e, ok := errors.AsType[yaml.Error](err); ok {
		message = e.GetMessage()
		if tk := e.GetToken(); tk != nil && tk.Position != nil {
			f.token = tk
		}
	}
	message, _, _ = strings.Cut(strings.TrimSpace(message), "\n")
	f.message = lowerFirst(strings.TrimRight(message, ". "))
	return f
}

// lowerFirst lowers a first capital unless a second follows, as in an abbreviation.
func lowerFirst(s string) string {
	if len(s) < 2 || s[0] < 'A' || s[0] > 'Z' || 'A' <= s[1] && s[1] <= 'Z' {
		return s
	}
	return string(s[0]+'a'-'A') + s[1:]
}

// recoverFault turns a panic of the YAML library into a refusal: files are read again while a program runs, and a file
// that trips the parser must not end running sessions.
func recoverFault(f **fault) {
	if r := recover(); r != nil {
		*f = &fault{message: "cannot be parsed as YAML", next: "simplify the file's syntax", err: fmt.Errorf("panic: %v", r)}
	}
}
