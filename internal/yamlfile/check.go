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

// checker holds a document against the type that it will be decoded into, and takes out of it what does not fit. It
// comes before decoding because the library stops at the first error, and because its errors lack a place (durations,
// text unmarshalers), leak Go's type names, or are none at all (0123 as a string).
type checker struct {
	faults []fault
}

// fail notes a fault and gives what takes the node's place: nothing, which decodes to the zero value.
func (c *checker) fail(f *fault, path string, node ast.Node) ast.Node {
	if f.path == "" {
		f.path = path
	}
	c.faults = append(c.faults, *f)
	return ast.Null(first(node))
}

// check gives the node, or what takes its place. name is the key that holds it, for messages.
func (c *checker) check(node ast.Node, t reflect.Type, name, path string) ast.Node {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if node == nil || node.Type() == ast.NullType {
		return node // the zero value; whether it may be missing is the caller's rule
	}
	if o, ok := reflect.New(t).Interface().(offable); ok {
		return c.checkOff(node, o, name, path)
	}
	var f *fault
	switch pt := reflect.PointerTo(t); {
	case slices.ContainsFunc(customTypes, pt.Implements), t == timeType:
		f = decode(node, reflect.New(t).Interface())
	case t == durationType:
		f = checkDuration(node, name)
	case pt.Implements(textType):
		f = checkText(node, t, name)
	case t.Kind() == reflect.Struct:
		return c.checkStruct(node, t, name, path)
	case t.Kind() == reflect.Map:
		return c.checkMap(node, t, name, path)
	case t.Kind() == reflect.Slice, t.Kind() == reflect.Array:
		return c.checkList(node, t, name, path)
	case t.Kind() != reflect.Interface:
		f = checkScalar(node, t, name)
	}
	if f != nil {
		return c.fail(f, path, node)
	}
	return node
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

func (c *checker) checkStruct(node ast.Node, t reflect.Type, name, path string) ast.Node {
	fields := map[string]reflect.Type{}
	collectFields(t, fields)
	return c.checkEntries(node, name, path, func(entry *ast.MappingValueNode) (ast.Node, *fault) {
		key := keyText(entry.Key)
		ft, known := fields[key]
		if !known {
			return nil, unknownKey(entry.Key, name, fields)
		}
		return c.check(entry.Value, ft, key, path+Key(key)), nil
	})
}

// checkEntries holds every entry of a mapping against judge, which gives its value or why the entry is left out.
func (c *checker) checkEntries(node ast.Node, name, path string, judge func(*ast.MappingValueNode) (ast.Node, *fault)) ast.Node {
	mapping, ok := node.(ast.MapNode)
	if !ok {
		return c.fail(wrong(node, name, "a mapping"), path, node)
	}
	var kept []*ast.MappingValueNode
	seen := map[string]bool{}
	for it := mapping.MapRange(); it.Next(); {
		entry := it.KeyValue()
		f := checkDuplicate(entry.Key, seen)
		var value ast.Node
		if f == nil {
			value, f = judge(entry)
		}
		if f != nil {
			f.path = path + Key(keyText(entry.Key))
			c.faults = append(c.faults, *f)
			continue
		}
		entry.Value = value
		kept = append(kept, entry)
	}
	if whole, ok := node.(*ast.MappingNode); ok {
		whole.Values = kept
		return whole
	}
	if len(kept) == 0 {
		return ast.Null(first(node))
	}
	return node
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

func (c *checker) checkMap(node ast.Node, t reflect.Type, name, path string) ast.Node {
	return c.checkEntries(node, name, path, func(entry *ast.MappingValueNode) (ast.Node, *fault) {
		if _, scalar := entry.Key.(ast.ScalarNode); !scalar {
			return nil, &fault{token: entry.Key.GetToken(), message: "a key has to be a plain text", next: "write the key as a text"}
		}
		key := keyText(entry.Key)
		before := len(c.faults)
		if c.check(entry.Key, t.Key(), key, path+Key(key)); len(c.faults) > before {
			last := c.faults[before]
			c.faults = c.faults[:before]
			return nil, &last
		}
		return c.check(entry.Value, t.Elem(), key, path+Key(key)), nil
	})
}

func (c *checker) checkList(node ast.Node, t reflect.Type, name, path string) ast.Node {
	list, ok := node.(*ast.SequenceNode)
	if !ok {
		return c.fail(wrong(node, name, "a list"), path, node)
	}
	for i, item := range list.Values {
		list.Values[i] = c.check(item, t.Elem(), fmt.Sprintf("%s[%d]", name, i), fmt.Sprintf("%s[%d]", path, i))
	}
	return list
}
