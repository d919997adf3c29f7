package policy

import (
	"errors"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// ParseFile reads a gateway's own policy file: a document with the one key `rules`. The error is a *problem.Error with
// line and column. A file without a rule is refused: it would admit nobody.
func ParseFile(file string, data []byte, opts Options) (*Policy, error) {
	var doc struct {
		Rules []Rule `yaml:"rules"`
	}
	if err := yamlfile.Decode(file, data, &doc); err != nil {
		return nil, err
	}
	if len(doc.Rules) == 0 {
		return nil, problem.New(problem.BadConfig, yamlfile.At(file, data, "$.rules")+": the file holds no rule, so it would admit nobody",
			"write at least one rule under rules")
	}
	p, err := Compile(doc.Rules, opts)
	if err != nil {
		return nil, Locate(file, data, err)
	}
	return p, nil
}

// Locate turns an error of [Compile] into a *problem.Error that names line and column, for rules that were decoded from
// data under the key `rules`.
func Locate(file string, data []byte, err error) error {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return err
	}
	return problem.New(problem.BadConfig, yamlfile.At(file, data, e.Path)+": "+e.Message, e.Next)
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
