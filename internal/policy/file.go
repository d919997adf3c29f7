package policy

import (
	"errors"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"

	"github.com/culvertnet/culvert/internal/yamlfile"
)

// ParseFile reads a gateway's own policy file: a document with the keys of [Document]. The error is a *problem.Error with
// line and column, the first of possibly several. A file without a rule is refused: it would admit nobody.
func ParseFile(file string, data []byte, opts Options) (*Policy, error) {
	p, findings := CheckFile(file, data, opts)
	for _, f := range findings {
		if f.Severity == Mistake {
			return nil, f.Problem()
		}
	}
	return p, nil
}

// CheckFile is [ParseFile] that tells everything that is wrong. The policy holds nothing to rely on if any of it is an
// error.
func CheckFile(file string, data []byte, opts Options) (*Policy, []Finding) {
	p, _, l, err := readFile(file, data, opts)
	if err != nil {
		return nil, []Finding{FromProblem(file, err)}
	}
	return p, l.Findings()
}

// LintFile is CheckFile that also warns, and gives the number of rules.
func LintFile(file string, data []byte, opts Options, now time.Time) (rules int, found []Finding) {
	p, sources, l, err := readFile(file, data, opts)
	if err != nil {
		return 0, []Finding{FromProblem(file, err)}
	}
	if p != nil {
		for _, w := range Lint(p, sources, now) {
			l.Add(Warning, w.Code, w.Path, w.Message, w.Next)
		}
	}
	return len(sources[0].Rules), l.Findings()
}

// readFile reads a file of rules alone; the policy is nil where there are far too many.
func readFile(file string, data []byte, opts Options) (*Policy, []Source, *Locator, error) {
	parsed, err := yamlfile.Parse(file, data)
	if err != nil {
		return nil, nil, nil, err
	}
	var doc Document
	l := &Locator{File: file, Document: parsed}
	l.Decode(&doc)
	sources := []Source{{File: file, Document: doc}}
	p, faults := CompileAll(sources, opts)
	for _, f := range faults {
		l.Add(Mistake, "", f.Path, f.Message, f.Next)
	}
	if len(doc.Rules) == 0 {
		l.Add(Mistake, "", "$.rules", "the file holds no rule, so it would admit nobody", "write at least one rule under rules")
	}
	return p, sources, l, nil
}

// UnmarshalYAML takes one scalar or a list of them, each as the text that the file shows: an id stays as it is written.
func (v *Values) UnmarshalYAML(node ast.Node) error {
	if text, ok := yamlfile.Scalar(node); ok {
		*v = Values{text}
		return nil
	}
	list, ok := node.(*ast.SequenceNode)
	if !ok {
		return valueError(node)
	}
	out := make(Values, 0, len(list.Values))
	for _, item := range list.Values {
		text, ok := yamlfile.Scalar(item)
		if !ok {
			return valueError(item)
		}
		out = append(out, text)
	}
	*v = out
	return nil
}

func valueError(node ast.Node) error {
	if node == nil {
		return errors.New("a value is missing")
	}
	return &yaml.SyntaxError{Message: "a value has to be a text or a list of texts", Token: node.GetToken()}
}
