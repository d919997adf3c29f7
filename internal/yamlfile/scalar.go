package yamlfile

import (
	"encoding"
	"fmt"
	"reflect"
	"time"

	"github.com/goccy/go-yaml/ast"
)

// Scalar gives a scalar's text as the file shows it, without quotes: 0123 stays 0123. It is for UnmarshalYAML methods.
// False for anything but one scalar, null included.
func Scalar(node ast.Node) (string, bool) {
	switch n := node.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		return n.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, true
	}
	return "", false
}

func checkDuration(node ast.Node, name string) *fault {
	text, ok := Scalar(node)
	if !ok {
		return wrong(node, name, "a duration")
	}
	if _, isText := node.(*ast.StringNode); isText {
		if _, err := time.ParseDuration(text); err == nil {
			return nil
		}
	}
	return &fault{
		token:   node.GetToken(),
		message: fmt.Sprintf("%q has to be a duration with a unit, not %q", name, text),
		next:    "write a duration such as 90s, 10m or 2h",
	}
}

func checkText(node ast.Node, t reflect.Type, name string) *fault {
	text, ok := Scalar(node)
	if !ok {
		return wrong(node, name, "a text")
	}
	u, ok := reflect.New(t).Interface().(encoding.TextUnmarshaler)
	if !ok {
		return nil
	}
	if err := u.UnmarshalText([]byte(text)); err != nil {
		f := faultOf(err, node.GetToken())
		f.message = fmt.Sprintf("%q: %s", name, f.message)
		return f
	}
	return nil
}

// checkScalar covers strings, booleans and numbers.
func checkScalar(node ast.Node, t reflect.Type, name string) *fault {
	text, ok := Scalar(node)
	want := wanted(t.Kind())
	if !ok {
		return wrong(node, name, want)
	}
	v := reflect.New(t).Elem()
	switch t.Kind() {
	case reflect.String:
		return checkString(node, name, text)
	case reflect.Bool:
		if _, is := node.(*ast.BoolNode); !is {
			return wrong(node, name, want)
		}
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		n, is := node.(*ast.IntegerNode)
		if !is {
			return wrong(node, name, want)
		}
		if !fits(v, n.Value) {
			return &fault{token: node.GetToken(), message: fmt.Sprintf("%q is out of range: %s", name, text), next: "write a number that fits"}
		}
	case reflect.Float32, reflect.Float64:
		if _, isText := node.(*ast.StringNode); isText {
			return wrong(node, name, want)
		}
	}
	return nil
}

func wanted(k reflect.Kind) string {
	switch k {
	case reflect.String:
		return "a text"
	case reflect.Bool:
		return "true or false"
	case reflect.Float32, reflect.Float64:
		return "a number"
	default:
		return "a whole number"
	}
}

// fits tells whether an integer as goccy/go-yaml parses it (int64 or uint64) can be held by v.
func fits(v reflect.Value, n any) bool {
	switch x := n.(type) {
	case int64:
		if v.CanInt() {
			return !v.OverflowInt(x)
		}
		return x >= 0 && !v.OverflowUint(uint64(x))
	case uint64:
		if v.CanInt() {
			return x <= 1<<63-1 && !v.OverflowInt(int64(x))
		}
		return !v.OverflowUint(x)
	}
	return false
}

// checkString accepts a plain number or boolean as a string only where decoding gives back what the file shows.
func checkString(node ast.Node, name, text string) *fault {
	var decoded string
	if f := decode(node, &decoded); f != nil || decoded == text {
		return f
	}
	return &fault{
		token:   node.GetToken(),
		message: fmt.Sprintf("%q would be read as %q, not as the %q that stands here", name, decoded, text),
		next:    "put quotes around it",
	}
}
