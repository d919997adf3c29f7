package config

import (
	"bytes"
	"encoding/json"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/invopop/jsonschema"
	validator "github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/culvertnet/culvert/internal/policy"
)

var update = flag.Bool("update", false, "write the generated schemas")

// generated are the schemas as the structs give them now.
func generated(t *testing.T) map[string][]byte {
	t.Helper()
	comments := jsonschema.Reflector{}
	t.Chdir("../..")
	for _, pkg := range []string{"./internal/policy", "./coordinator/config"} {
		if err := comments.AddGoComments("github.com/culvertnet/culvert", pkg, jsonschema.WithFullComment()); err != nil {
			t.Fatal(err)
		}
	}
	addPrivateComments(t, comments.CommentMap, "coordinator/config")
	for name, text := range comments.CommentMap {
		comments.CommentMap[name] = strings.Join(strings.Fields(text), " ")
	}
	out := map[string][]byte{}
	for name, root := range map[string]any{"config": document{}, "policy": policy.Document{}, "cases": policy.Cases{}, "relay": standaloneDoc{}} {
		r := &jsonschema.Reflector{Anonymous: true, ExpandedStruct: true, FieldNameTag: "yaml", RequiredFromJSONSchemaTags: true, CommentMap: comments.CommentMap}
		r.Mapper = func(t reflect.Type) *jsonschema.Schema { return custom(r, t) }
		s := r.Reflect(root)
		s.Title = map[string]string{"config": "culvert.yaml", "policy": "rules of Culvert", "cases": "cases for culvert-coordinator policy test", "relay": "relay.yaml"}[name]
		data, err := json.MarshalIndent(s, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		out[name] = append(data, '\n')
	}
	return out
}

// addPrivateComments adds what AddGoComments leaves out: the fields of types that are not exported, and those are the files' own.
func addPrivateComments(t *testing.T, to map[string]string, dir string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok || spec.Name.IsExported() {
				return true
			}
			if st, ok := spec.Type.(*ast.StructType); ok {
				for _, f := range st.Fields.List {
					for _, field := range f.Names {
						to["github.com/culvertnet/culvert/"+dir+"."+spec.Name.Name+"."+field.Name] = f.Doc.Text()
					}
				}
			}
			return false
		})
	}
}

// Editors show the schema's words beside a key. A key that only frames others has its words at these.
func TestSchemaDescribesEveryKey(t *testing.T) {
	for _, name := range []string{"config", "relay"} {
		text, _ := Schema(name)
		var doc map[string]any
		if err := json.Unmarshal(text, &doc); err != nil {
			t.Fatal(err)
		}
		described(t, name, doc)
	}
}

func described(t *testing.T, path string, schema any) {
	object, ok := schema.(map[string]any)
	if !ok {
		return
	}
	properties, _ := object["properties"].(map[string]any)
	for key, v := range properties {
		property, _ := v.(map[string]any)
		if property["description"] == nil && property["$ref"] == nil && property["anyOf"] == nil {
			t.Errorf("%s: nothing is said about %s", path, key)
		}
	}
	defs, _ := object["$defs"].(map[string]any)
	for key, v := range defs {
		described(t, path+" "+key, v)
	}
}

// custom gives the schema of types that are written otherwise than Go holds them.
func custom(r *jsonschema.Reflector, t reflect.Type) *jsonschema.Schema {
	scalar := &jsonschema.Schema{AnyOf: []*jsonschema.Schema{{Type: "string"}, {Type: "number"}, {Type: "boolean"}}}
	switch t {
	case reflect.TypeFor[time.Duration]():
		return &jsonschema.Schema{Type: "string", Pattern: `^([0-9]+(\.[0-9]+)?(ns|us|ms|s|m|h))+$`, Examples: []any{"90s", "10m", "2h"}}
	case reflect.TypeFor[policy.Date]():
		return &jsonschema.Schema{Type: "string", Format: "date", Pattern: `^[0-9]{4}-[0-9]{2}-[0-9]{2}$`}
	case reflect.TypeFor[policy.Values]():
		return &jsonschema.Schema{AnyOf: append(slices.Clone(scalar.AnyOf), &jsonschema.Schema{Type: "array", Items: scalar})}
	case reflect.TypeFor[policy.Claim]():
		return &jsonschema.Schema{AnyOf: append(slices.Clone(scalar.AnyOf), &jsonschema.Schema{Type: "null"})}
	}
	if strings.HasPrefix(t.Name(), "OrOff[") {
		inner := *r
		inner.DoNotReference, inner.ExpandedStruct = true, false
		value, _ := t.FieldByName("Value")
		s := inner.ReflectFromType(value.Type)
		s.Version = ""
		return &jsonschema.Schema{AnyOf: []*jsonschema.Schema{s, {Const: "off"}, {Const: false}}}
	}
	return nil
}

// The schema that the program prints is the one that its structs give.
func TestSchemaIsCurrent(t *testing.T) {
	for name, want := range generated(t) {
		file := filepath.Join("coordinator/config/schema", name+".json")
		if *update {
			if err := os.WriteFile(file, want, 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if got, ok := Schema(name); !ok || !bytes.Equal(got, want) {
			t.Errorf("%s is not what the structs give; run go test ./coordinator/config -run TestSchemaIsCurrent -update", file)
		}
	}
	if _, ok := Schema("other"); ok {
		t.Error("there is a schema of anything")
	}
}

// compiled gives a schema ready to validate.
func compiled(t *testing.T, name string) *validator.Schema {
	t.Helper()
	text, _ := Schema(name)
	doc, err := validator.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	c := validator.NewCompiler()
	if err := c.AddResource("schema.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// asJSON is a YAML file as an editor's validator sees it.
func asJSON(t *testing.T, text string) any {
	t.Helper()
	data, err := yaml.YAMLToJSON([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	v, err := validator.UnmarshalJSON(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestSchemaTakesWhatTheProgramTakes(t *testing.T) {
	s := compiled(t, "config")
	for name, text := range map[string]string{
		"whole": whole, "minimal": minimal, "off": minimal + "relay: off\nudp: off\n",
		"everything of a rule": without("include: rules.d\nexpires_never: 1\n"),
	} {
		err := s.Validate(asJSON(t, text))
		if _, perr := Parse("culvert.yaml", []byte(text)); (err == nil) != (perr == nil) {
			t.Errorf("%s: the schema says %v, the program %v", name, err, perr)
		}
	}
	whole := without(`targets: {db: ["tcp db.internal:5432"]}
groups: {shop: [{repository_id: [1, 2]}, {repository_owner_id: 9919, ref_protected: true}]}
rules: [{name: a, network: corp, groups: shop, match: {ref: [refs/heads/main]}, targets: [db], observe: [10.0.0.0/8], max_session: 1h30m, expires: 2031-01-31, accept: [observes]}]
`)
	if err := s.Validate(asJSON(t, whole)); err != nil {
		t.Error(err)
	}
	if _, err := Parse("culvert.yaml", []byte(whole)); err != nil {
		t.Error(err)
	}
}

func TestSchemaRefuses(t *testing.T) {
	s := compiled(t, "config")
	for _, c := range []struct{ old, new string }{
		{"lease: 5m", "lease: 5"}, {"lease: 5m", "leese: 5m"}, {"max_session: 2h", "max_session: soon"}, {"max_session: 2h", "expires: soon"},
		{"name: deploy", "nam: deploy"}, {"url: https://culvert.example.com/", "insecure_http: true"}, {"ref: [", "ref: [[a], "}, {"allow: [", "allow: [{}, "},
		{"state: {dir: data}", "state: data"}, {"gateways:", "gatewayz:"},
	} {
		if !strings.Contains(whole, c.old) {
			t.Fatalf("the test changes nothing: %s", c.old)
		}
		if s.Validate(asJSON(t, strings.Replace(whole, c.old, c.new, 1))) == nil {
			t.Errorf("%s is taken", c.new)
		}
	}
}
