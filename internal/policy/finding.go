package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// Severity says whether a finding keeps a file from being used.
type Severity string

// The severities.
const (
	Mistake Severity = "error"   // the file is refused
	Warning Severity = "warning" // the file is taken, but somebody should look
)

// Finding is something that is wrong with a file, or dangerous in it.
type Finding struct {
	Severity Severity `json:"severity"`
	Code     Code     `json:"code,omitempty"` // of a warning
	File     string   `json:"file"`
	Line     int      `json:"line,omitempty"` // from 1; 0 where the file as a whole is meant
	Column   int      `json:"column,omitempty"`
	Path     string   `json:"path,omitempty"` // YAML path
	Message  string   `json:"message"`
	Next     string   `json:"next"`
}

// Place gives file:line:column.
func (f *Finding) Place() string {
	if f.Line == 0 {
		return f.File
	}
	return fmt.Sprintf("%s:%d:%d", f.File, f.Line, f.Column)
}

// Problem gives the finding as an error with code bad-config.
func (f *Finding) Problem() error {
	message := f.Place() + ": " + f.Message
	if f.Line == 0 && strings.HasPrefix(f.Message, f.File) {
		message = f.Message
	}
	return problem.New(problem.BadConfig, message, f.Next)
}

// FromProblem gives an error that says for itself where it is.
func FromProblem(file string, err error) Finding {
	e := problem.From(err)
	f := Finding{Severity: Mistake, File: file, Message: e.Message, Next: e.Next}
	if rest, ok := strings.CutPrefix(e.Message, file+":"); ok {
		if n, _ := fmt.Sscanf(rest, "%d:%d:", &f.Line, &f.Column); n == 2 {
			_, f.Message, _ = strings.Cut(rest, ": ")
		} else {
			f.Message = strings.TrimSpace(rest)
		}
	}
	return f
}

// Locator collects the findings of one file and gives each its place.
type Locator struct {
	File     string
	Document *yamlfile.Document

	findings []Finding
	broken   []string // paths of what did not even decode
}

// Decode decodes the document into v and notes what does not fit. v holds what does.
func (l *Locator) Decode(v any) {
	for _, f := range l.Document.Decode(v) {
		l.findings = append(l.findings, Finding{
			Severity: Mistake, File: l.File, Line: f.Line, Column: f.Column, Path: f.Path, Message: f.Message, Next: f.Next,
		})
		l.broken = append(l.broken, unit(f.Path))
	}
}

// Add notes a finding at a path. What is only a consequence of something that did not decode, in the same part of the file,
// is left out.
func (l *Locator) Add(severity Severity, code Code, path, message, next string) {
	u := unit(path)
	for _, b := range l.broken {
		if b == "$" || inside(u, b) || inside(b, u) {
			return
		}
	}
	f := Finding{Severity: severity, Code: code, File: l.File, Path: path, Message: message, Next: next}
	f.Line, f.Column = l.Document.Place(path)
	l.findings = append(l.findings, f)
}

// inside tells whether the node at path lies in the one at outer.
func inside(path, outer string) bool {
	rest, ok := strings.CutPrefix(path, outer)
	return ok && (rest == "" || rest[0] == '.' || rest[0] == '[')
}

// Findings gives all of them, in the order of the file.
func (l *Locator) Findings() []Finding {
	slices.SortStableFunc(l.findings, func(a, b Finding) int { return cmp.Or(a.Line-b.Line, a.Column-b.Column) })
	return l.findings
}

// unit is the part of a file that makes sense by itself and that a path lies in: a rule, a network, a plain key.
func unit(path string) string {
	const steps = 2
	end := 1
	for range steps {
		if end >= len(path) {
			return path
		}
		rest := path[end:]
		switch {
		case strings.HasPrefix(rest, ".'"):
			n := strings.Index(rest[2:], "'")
			if n < 0 {
				return path
			}
			end += n + 3
		default:
			n := strings.IndexAny(rest[1:], ".[")
			if n < 0 {
				return path
			}
			end += n + 1
		}
	}
	return path[:end]
}
