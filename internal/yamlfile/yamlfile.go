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
	"cmp"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"

	"github.com/culvertnet/culvert/internal/problem"
)

// MaxSize is the largest file that is read, in bytes.
const MaxSize = 4 << 20

// Decode reads one YAML document into v, a pointer. The error is a *problem.Error with code bad-config that names file,
// line and column of the first fault. After an error v holds nothing to rely on.
func Decode(file string, data []byte, v any) error {
	d, err := Parse(file, data)
	if err != nil {
		return err
	}
	if faults := d.Decode(v); len(faults) > 0 {
		return faults[0].Problem(file)
	}
	return nil
}

// Document is a file that parses as one YAML document.
type Document struct {
	file string
	body ast.Node
}

// Parse reads a file's syntax. The error is a *problem.Error with code bad-config; of mistakes in the syntax itself only
// the first is known.
func Parse(file string, data []byte) (*Document, error) {
	body, f := parseGuarded(data)
	if f != nil {
		return nil, f.exported().Problem(file)
	}
	return &Document{file: file, body: body}, nil
}

func parseGuarded(data []byte) (body ast.Node, f *fault) {
	defer recoverFault(&f)
	return parse(data)
}

// Decode reads the document into v, a pointer, and gives every fault in the order of the file. What is sound is in v all
// the same, so that its meaning can be checked too: a value at fault is left zero, an element of a list keeps its place,
// and a key that is unknown or stands twice is left out. A document can be decoded once.
func (d *Document) Decode(v any) []Fault {
	var c checker
	if f := d.decode(&c, v); f != nil {
		c.faults = append(c.faults, *f)
	}
	out := make([]Fault, len(c.faults))
	for i := range c.faults {
		out[i] = c.faults[i].exported()
	}
	slices.SortStableFunc(out, func(a, b Fault) int { return cmp.Or(a.Line-b.Line, a.Column-b.Column) })
	return out
}

func (d *Document) decode(c *checker, v any) (f *fault) {
	defer recoverFault(&f)
	d.body = c.check(d.body, reflect.TypeOf(v), "", "$")
	return decode(d.body, v)
}

// Place gives line and column of the node at a YAML path such as "$.rules[2].match.ref", for errors found after decoding.
// Where the path leads nowhere it gives the nearest parent's place.
//
// A key that holds anything but ASCII letters, digits, '_' and '-' is written in single quotes: $.match.'a.b'. See
// [Key].
func (d *Document) Place(path string) (line, column int) {
	return position(locate(d.body, splitPath(path)))
}

// At gives "file:line:column" of the node at a YAML path, see [Document.Place], and the file's name alone where data does
// not parse.
func At(file string, data []byte, path string) string {
	d, err := Parse(file, data)
	if err != nil {
		return file
	}
	f := Fault{}
	f.Line, f.Column = d.Place(path)
	return f.place(file)
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

// decode lets goccy/go-yaml set v, a pointer. What [checker.check] has passed rarely fails here; what does is reported all the
// same.
func decode(node ast.Node, v any) *fault {
	dec := yaml.NewDecoder(strings.NewReader(""), yaml.Strict())
	if err := dec.DecodeFromNode(node, v); err != nil {
		return faultOf(err, first(node))
	}
	return nil
}

// Fault is one thing that is wrong with a file.
type Fault struct {
	Path    string // YAML path of the value that is at fault, "" where the whole file is
	Line    int    // from 1; 0 means the file as a whole
	Column  int    // in characters, from 1
	Message string
	Next    string
	Err     error // the cause, where there is one
}

// Problem gives the fault as an error with code bad-config that names file, line and column.
func (f Fault) Problem(file string) error {
	return problem.Wrap(f.Err, problem.BadConfig, f.place(file)+": "+f.Message, f.Next)
}

// place gives file:line:column.
func (f Fault) place(file string) string {
	if f.Line == 0 {
		return file
	}
	return fmt.Sprintf("%s:%d:%d", file, f.Line, f.Column)
}

// fault is what is wrong with a file, and where. A nil token means the file as a whole.
type fault struct {
	token   *token.Token
	path    string
	message string
	next    string
	err     error
}

func (f *fault) exported() Fault {
	out := Fault{Path: f.path, Message: f.message, Next: f.next, Err: f.err}
	out.Line, out.Column = position(f.token)
	return out
}

func position(tk *token.Token) (line, column int) {
	if tk == nil || tk.Position == nil {
		return 0, 0
	}
	return tk.Position.Line, tk.Position.Column
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
