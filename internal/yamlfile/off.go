package yamlfile

import (
	"reflect"

	"github.com/goccy/go-yaml/ast"
)

// OrOff is a value that a file may also write as the word off.
type OrOff[T any] struct {
	Off   bool
	Value T
}

// UnmarshalYAML takes the word off, or what T takes.
func (o *OrOff[T]) UnmarshalYAML(node ast.Node) error {
	if isOff(node) {
		*o = OrOff[T]{Off: true}
		return nil
	}
	if f := decode(node, &o.Value); f != nil {
		return f.err
	}
	return nil
}

// value is the type of what else a file may write.
func (*OrOff[T]) value() reflect.Type { return reflect.TypeFor[T]() }

// offable is every [OrOff].
type offable interface{ value() reflect.Type }

func isOff(node ast.Node) bool {
	text, ok := Scalar(node)
	return ok && text == "off"
}

// checkOff holds a node against the value that may be off, so that its own faults have their own place.
func (c *checker) checkOff(node ast.Node, o offable, name, path string) ast.Node {
	if isOff(node) {
		return node
	}
	if _, scalar := Scalar(node); scalar && o.value().Kind() == reflect.Struct {
		f := wrong(node, name, "a mapping")
		f.next += ", or off"
		return c.fail(f, path, node)
	}
	return c.check(node, o.value(), name, path)
}
