package yamlfile

import (
	"encoding"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
)

var (
	durationType = reflect.TypeFor[time.Duration]()
	timeType     = reflect.TypeFor[time.Time]()
	textType     = reflect.TypeFor[encoding.TextUnmarshaler]()
	customTypes  = []reflect.Type{
		reflect.TypeFor[yaml.NodeUnmarshaler](),
		reflect.TypeFor[yaml.NodeUnmarshalerContext](),
		reflect.TypeFor[yaml.BytesUnmarshaler](),
		reflect.TypeFor[yaml.BytesUnmarshalerContext](),
		reflect.TypeFor[yaml.InterfaceUnmarshaler](),
		reflect.TypeFor[yaml.InterfaceUnmarshalerContext](),
	}
)

// check holds a node against the type that it will be decoded into. It comes before decoding because the library's own
// errors lack a place (durations, text unmarshalers), leak Go's type names, or are no errors at all (0123 as a string).
// name is the key that holds the node, for messages.
func check(node ast.Node, t reflect.Type, name string) *fault {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if node == nil || node.Type() == ast.NullType {
		return nil // the zero value; whether it may be missing is the caller's rule
	}
	if o, ok := reflect.New(t).Interface().(offable); ok {
		return checkOff(node, o, name)
	}
	switch pt := reflect.PointerTo(t); {
	case slices.ContainsFunc(customTypes, pt.Implements), t == timeType:
		return decode(node, reflect.New(t).Interface())
	case t == durationType:
		return checkDuration(node, name)
	case pt.Implements(textType):
		return checkText(node, t, name)
	}
	switch t.Kind() {
	case reflect.Struct:
		return checkStruct(node, t, name)
	case reflect.Map:
		return checkMap(node, t, name)
	case reflect.Slice, reflect.Array:
		return checkList(node, t, name)
	case reflect.Interface:
		return nil
	default:
		return checkScalar(node, t, name)
	}
}

// wrong says what a node should have been.
func wrong(node ast.Node, name, want string) *fault {
	subject := "the document"
	if name != "" {
		subject = fmt.Sprintf("%q", name)
	}
	return &fault{
		token:   first(node),
		message: fmt.Sprintf("%s has to be %s, not %s", subject, want, kindOf(node)),
		next:    "write " + want + " here",
	}
}

func kindOf(node ast.Node) string {
	switch node.Type() {
	case ast.MappingType, ast.MappingValueType:
		return "a mapping"
	case ast.SequenceType:
		return "a list"
	case ast.BoolType:
		return "true or false"
	case ast.IntegerType, ast.FloatType, ast.InfinityType, ast.NanType:
		return "a number"
	default:
		return "a text"
	}
}

func checkStruct(node ast.Node, t reflect.Type, name string) *fault {
	mapping, ok := node.(ast.MapNode)
	if !ok {
		return wrong(node, name, "a mapping")
	}
	fields := map[string]reflect.Type{}
	collectFields(t, fields)
	seen := map[string]bool{}
	for it := mapping.MapRange(); it.Next(); {
		key := keyText(it.Key())
		ft, known := fields[key]
		if !known {
			return unknownKey(it.Key(), name, fields)
		}
		if f := checkDuplicate(it.Key(), seen); f != nil {
			return f
		}
		if f := check(it.Value(), ft, key); f != nil {
			return f
		}
	}
	return nil
}

// collectFields lists a struct's keys as goccy/go-yaml names them: the tag's name, else the field's in lower case.
func collectFields(t reflect.Type, into map[string]reflect.Type) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return
	}
	for f := range t.Fields() {
		tag, options, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		inline := slices.Contains(strings.Split(options, ","), "inline")
		switch {
		case tag == "-", !f.IsExported() && !f.Anonymous:
		case inline:
			collectFields(f.Type, into)
		case tag == "":
			into[strings.ToLower(f.Name)] = f.Type
		default:
			into[tag] = f.Type
		}
	}
}

func unknownKey(key ast.MapKeyNode, parent string, fields map[string]reflect.Type) *fault {
	names := make([]string, 0, len(fields))
	for name := range fields {
		names = append(names, name)
	}
	slices.Sort(names)
	text := keyText(key)
	f := &fault{token: key.GetToken(), message: fmt.Sprintf("unknown key %q", text)}
	if parent != "" {
		f.message += fmt.Sprintf(" in %q", parent)
	}
	if near := Nearest(text, names); near != "" {
		f.next = fmt.Sprintf("did you mean %q?", near)
	} else {
		f.next = "the keys here are " + strings.Join(names, ", ")
	}
	return f
}

func checkDuplicate(key ast.MapKeyNode, seen map[string]bool) *fault {
	text := keyText(key)
	if seen[text] {
		return &fault{token: key.GetToken(), message: fmt.Sprintf("duplicate key %q", text), next: "keep one of them"}
	}
	seen[text] = true
	return nil
}

func checkMap(node ast.Node, t reflect.Type, name string) *fault {
	mapping, ok := node.(ast.MapNode)
	if !ok {
		return wrong(node, name, "a mapping")
	}
	seen := map[string]bool{}
	for it := mapping.MapRange(); it.Next(); {
		if _, scalar := it.Key().(ast.ScalarNode); !scalar {
			return &fault{token: it.Key().GetToken(), message: "a key has to be a plain text", next: "write the key as a text"}
		}
		if f := checkDuplicate(it.Key(), seen); f != nil {
			return f
		}
		if f := check(it.Key(), t.Key(), keyText(it.Key())); f != nil {
			return f
		}
		if f := check(it.Value(), t.Elem(), keyText(it.Key())); f != nil {
			return f
		}
	}
	return nil
}

func checkList(node ast.Node, t reflect.Type, name string) *fault {
	list, ok := node.(*ast.SequenceNode)
	if !ok {
		return wrong(node, name, "a list")
	}
	for i, item := range list.Values {
		if f := check(item, t.Elem(), fmt.Sprintf("%s[%d]", name, i)); f != nil {
			return f
		}
	}
	return nil
}
