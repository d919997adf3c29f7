package api

import (
	"bytes"
	"encoding/json"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/invopop/jsonschema"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/downloads"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

var update = flag.Bool("update", false, "write the generated document")

// endpoint is one operation as a reader needs to know it.
type endpoint struct {
	method, path, id, summary string
	secured                   string // name of a security scheme; "" for none
	in, out                   any    // bodies; nil for none
	status                    int    // of success
	media                     string // of out, where it is not JSON
	codes                     []problem.Code
}

var (
	anybody    = []problem.Code{problem.RateLimited, problem.Failed}
	body       = append([]problem.Code{problem.BadRequest, problem.TooLarge}, anybody...)
	tokenCodes = []problem.Code{problem.TokenInvalid, problem.TokenExpired, problem.TokenEarly, problem.TokenIssuer, problem.TokenAudience,
		problem.TokenUnknownKey, problem.IssuerAway, problem.Cancelled, problem.Timeout}
	gatewayCodes = []problem.Code{problem.GatewayRefused, problem.GatewayTimeout, problem.Incompatible, problem.Unreachable, problem.Denied}
	sessionCodes = []problem.Code{problem.SessionUnknown, problem.SessionOver}
)

var endpoints = []endpoint{
	{method: "GET", path: "/healthz", id: "health", summary: "Whether the process runs.", status: 200, media: "text/plain"},
	{method: "GET", path: "/readyz", id: "ready", summary: "Whether joins can be served: state and audit log are within reach, and this node is not on its way out.",
		status: 200, media: "text/plain", codes: []problem.Code{problem.Unreachable, problem.Failed}},
	{method: "GET", path: "/openapi.json", id: "document", summary: "This document.", status: 200, out: map[string]any{}, codes: anybody},
	{method: "GET", path: downloads.Path, id: "download", summary: "A file of a release, such as v1.2.3/culvert-linux-amd64.gz, where the operator has put some; its ETag is its SHA-256.",
		status: 200, media: "application/gzip", codes: append([]problem.Code{problem.NotFound, problem.Unreachable}, anybody...)},
	{method: "GET", path: wire.PathInfo, id: "info", summary: "What a client may know before it has proven anything.", status: 200, out: wire.Info{}, codes: anybody},
	{method: "POST", path: wire.PathSessions, id: "join", summary: "Asks for a session. The token in the body is the credential; its audience names this coordinator and the key. " +
		"Whoever accepts " + wire.MediaEvents + " gets a line as soon as policy has said yes, and a second one with the session or the problem; others get the session alone.",
		in: wire.JoinRequest{}, out: wire.Session{}, status: 200, codes: slices.Concat(body, tokenCodes, gatewayCodes, []problem.Code{
			problem.KeyInUse, problem.NoNetwork, problem.NoGateway, problem.NoAddress, problem.SessionOver})},
	{method: "PATCH", path: wire.PathSessions + "/{id}", id: "update", summary: "Brings candidates that were found later, renews with a fresh token, or asks how long the lease lasts.", secured: "session",
		in: wire.Update{}, out: wire.Lease{}, status: 200, codes: slices.Concat(body, tokenCodes, gatewayCodes, sessionCodes)},
	{method: "DELETE", path: wire.PathSessions + "/{id}", id: "end", summary: "Ends a session.", secured: "session", status: 204,
		codes: slices.Concat(anybody, sessionCodes, []problem.Code{problem.Unreachable})},
	{method: "POST", path: wire.PathSessions + "/{id}" + wire.PathStandby, id: "standby", summary: "Has a second gateway hold a running session.", secured: "session",
		in: wire.StandbyRequest{}, out: wire.Standby{}, status: 200, codes: slices.Concat(body, tokenCodes, gatewayCodes, sessionCodes, []problem.Code{problem.NoGateway})},
	{method: "GET", path: wire.PathGateway, id: "gateway", summary: "A gateway's control stream: a WebSocket of text messages, each a Frame; Hello and Welcome open it.", secured: "gateway",
		status: 101, codes: slices.Concat(body, tokenCodes, []problem.Code{problem.Unauthorized, problem.Unreachable})},
	{method: "GET", path: wire.PathRelay, id: "relay", summary: "A side's way to this node's relay where UDP is blocked: a WebSocket with the subprotocol culvert-relay.v1.", status: 101,
		codes: slices.Concat(anybody, []problem.Code{problem.Unreachable})},
}

// elsewhere are codes that stand in the packages below and never reach an HTTP client.
var elsewhere = []problem.Code{problem.NotFound, problem.WrongMethod} // any path: no operation's own

// frames are what the gateways' stream carries.
var frames = []any{wire.Frame{}, wire.Hello{}, wire.Welcome{}, wire.Offer{}, wire.Answer{}, wire.Renewed{}, wire.End{}, wire.Trickle{}, wire.Credential{},
	wire.Flows{}, wire.FlowsAck{}, wire.Taken{}, wire.JoinEvent{}}

type object = map[string]any

// generator makes schemas of the wire's types, with the comments of their source.
type generator struct {
	t       *testing.T
	reflect jsonschema.Reflector
	schemas object
}

func newGenerator(t *testing.T) *generator {
	g := &generator{t: t, schemas: object{}}
	t.Chdir("../..") // comments are filed by the folder's path
	for _, dir := range []string{"./internal/wire", "./internal/problem"} {
		if err := g.reflect.AddGoComments("github.com/culvertnet/culvert", dir, jsonschema.WithFullComment()); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range g.reflect.CommentMap {
		g.reflect.CommentMap[name] = strings.Join(strings.Fields(text), " ")
	}
	g.reflect.Anonymous, g.reflect.AllowAdditionalProperties = true, true
	g.reflect.Mapper = text
	return g
}

// text gives the schema of types that JSON carries as text, or as anything.
func text(t reflect.Type) *jsonschema.Schema {
	s := &jsonschema.Schema{Type: "string"}
	switch t {
	case reflect.TypeFor[wire.Key]():
		s.Pattern = "^[A-Za-z0-9_-]{43}$"
	case reflect.TypeFor[wire.Duration]():
		s.Examples = []any{"10m0s"}
	case reflect.TypeFor[time.Time]():
		s.Format = "date-time"
	case reflect.TypeFor[json.RawMessage]():
		return &jsonschema.Schema{}
	default:
		if t.PkgPath() != "net/netip" {
			return nil
		}
	}
	return s
}

// ref files a type's schema and gives a reference to it.
func (g *generator) ref(v any) object {
	t := reflect.TypeOf(v)
	if t.Kind() == reflect.Map {
		return object{"type": "object"}
	}
	data, err := json.Marshal(g.reflect.ReflectFromType(t))
	if err != nil {
		g.t.Fatal(err)
	}
	var s object
	if err := json.Unmarshal(bytes.ReplaceAll(data, []byte("#/$defs/"), []byte("#/components/schemas/")), &s); err != nil {
		g.t.Fatal(err)
	}
	for name, def := range s["$defs"].(object) {
		g.schemas[name] = def
	}
	return object{"$ref": "#/components/schemas/" + t.Name()}
}

func (g *generator) operation(e endpoint) object {
	success := object{"description": http.StatusText(e.status)}
	switch {
	case e.media != "":
		success["content"] = object{e.media: object{"schema": object{"type": "string"}}}
	case e.out != nil:
		success["content"] = object{"application/json": object{"schema": g.ref(e.out)}}
	}
	if e.id == "join" {
		success["content"].(object)[wire.MediaEvents] = object{"schema": g.ref(wire.JoinEvent{})}
	}
	answers := object{strconv.Itoa(e.status): success}
	byStatus := map[int][]string{}
	for _, c := range e.codes {
		if !slices.Contains(byStatus[c.Status()], string(c)) {
			byStatus[c.Status()] = append(byStatus[c.Status()], string(c))
		}
	}
	for status, codes := range byStatus {
		slices.Sort(codes)
		answers[strconv.Itoa(status)] = object{"description": strings.Join(codes, ", "), "content": object{problem.MediaType: object{"schema": object{
			"allOf": []object{{"$ref": "#/components/schemas/Problem"}, {"properties": object{"code": object{"enum": codes}}}}}}}}
	}
	op := object{"operationId": e.id, "summary": e.summary, "responses": answers}
	if e.in != nil {
		op["requestBody"] = object{"required": true, "content": object{"application/json": object{"schema": g.ref(e.in)}}}
	}
	if e.secured != "" {
		op["security"] = []object{{e.secured: []string{}}}
	}
	var parameters []object
	for _, p := range []struct{ name, means string }{{"id", "The session's id."}, {"release", "A version, such as v1.2.3."}, {"file", "A file of that release."}} {
		if strings.Contains(e.path, "{"+p.name+"}") {
			parameters = append(parameters, object{"name": p.name, "in": "path", "required": true, "description": p.means, "schema": object{"type": "string"}})
		}
	}
	if parameters != nil {
		op["parameters"] = parameters
	}
	return op
}

// generate makes the whole document.
func generate(t *testing.T) []byte {
	g := newGenerator(t)
	paths := map[string]object{}
	for _, e := range endpoints {
		if paths[e.path] == nil {
			paths[e.path] = object{}
		}
		paths[e.path][strings.ToLower(e.method)] = g.operation(e)
	}
	for _, f := range frames {
		g.ref(f)
	}
	g.ref(problem.Denial{})
	g.schemas["Problem"] = object{
		"type": "object", "description": "What went wrong (RFC 9457): code is stable, detail says what happened, next what to do.",
		"required":   []string{"type", "title", "status", "detail", "code"},
		"properties": object{"type": object{"type": "string"}, "title": object{"type": "string"}, "status": object{"type": "integer"}, "detail": object{"type": "string"}, "code": object{"type": "string"}, "next": object{"type": "string"}, "denial": object{"$ref": "#/components/schemas/Denial"}},
	}
	out, err := json.MarshalIndent(object{
		"openapi": "3.1.0",
		"info": object{"title": "Culvert coordinator", "version": strconv.Itoa(wire.Version),
			"description": "Brings CI jobs and private networks together, by who the job is. A path that is not there is not-found, a method that a path does not take is wrong-method."},
		"paths": paths,
		"components": object{"schemas": g.schemas, "securitySchemes": object{
			"session": object{"type": "http", "scheme": "bearer", "description": "The session's secret, from the answer to the join."},
			"gateway": object{"type": "http", "scheme": "bearer", "description": "A workload identity token whose audience is the coordinator's URL; or the scheme Enrol with an enrolment secret. The header Culvert-Network names the network."},
		}},
	}, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return append(out, '\n')
}

// The document is the one that the wire's types give, here and in docs.
func TestOpenAPIIsCurrent(t *testing.T) {
	want := generate(t) // goes to the project's root
	for _, file := range []string{"coordinator/api/openapi.json", "docs/openapi.json"} {
		if *update {
			if err := os.WriteFile(file, want, 0o644); err != nil { //nolint:gosec // documentation
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(file)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what the types give now (%v): go test ./coordinator/api -run OpenAPI -update", file, err)
		}
	}
}

// Every route is described, and nothing else is.
func TestOpenAPIHasEveryRoute(t *testing.T) {
	a := &API{}
	a.rules.Store(&Rules{Config: &config.Config{}})
	a.opts.Relay = http.NotFoundHandler()
	routed := map[string]bool{}
	err := chi.Walk(a.routes().(chi.Routes), func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		routed[method+" "+route] = true
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	described := map[string]bool{}
	for _, e := range endpoints {
		described[e.method+" "+e.path] = true
	}
	if !maps.Equal(routed, described) {
		t.Errorf("routes %v\ndescribed %v", slices.Sorted(maps.Keys(routed)), slices.Sorted(maps.Keys(described)))
	}
}

// Every error code that the packages behind the API can give is described, and each described one is known.
func TestOpenAPIHasEveryCode(t *testing.T) {
	described := map[string]bool{}
	for _, e := range endpoints {
		for _, c := range e.codes {
			described[string(c)] = true
			if c.Status() == http.StatusInternalServerError && c != problem.Failed {
				t.Errorf("%s: %s has no status", e.path, c)
			}
		}
	}
	for _, c := range elsewhere {
		described[string(c)] = true
	}
	names := codeNames(t)
	for _, dir := range []string{".", "../session", "../limit", "../../internal/claims"} {
		for _, name := range used(t, dir) {
			if value, isCode := names[name]; isCode && value != string(problem.BadConfig) && !described[value] { // a configuration is refused before anything is served
				t.Errorf("%s gives problem.%s, which no operation names", dir, name)
			}
		}
	}
}

// codeNames reads the constants of type Code from their source.
func codeNames(t *testing.T) map[string]string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "../../internal/problem/codes.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	ast.Inspect(f, func(n ast.Node) bool {
		if v, ok := n.(*ast.ValueSpec); ok && len(v.Values) == 1 {
			if id, ok := v.Type.(*ast.Ident); ok && id.Name == "Code" {
				out[v.Names[0].Name], _ = strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
			}
		}
		return true
	})
	if len(out) < 20 {
		t.Fatalf("found %d codes", len(out))
	}
	return out
}

// used gives what a package names of package problem, its tests left out.
func used(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".go") || strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), dir+"/"+e.Name(), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok {
				if x, ok := s.X.(*ast.Ident); ok && x.Name == "problem" {
					names = append(names, s.Sel.Name)
				}
			}
			return true
		})
	}
	return names
}

func TestOpenAPIIsServed(t *testing.T) {
	w := httptest.NewRecorder()
	(&API{}).document(w, httptest.NewRequest(http.MethodGet, "/openapi.json", nil))
	var d struct {
		OpenAPI string                    `json:"openapi"`
		Paths   map[string]map[string]any `json:"paths"`
	}
	if err := json.Unmarshal(w.Body.Bytes(), &d); err != nil || d.OpenAPI != "3.1.0" || d.Paths[wire.PathSessions]["post"] == nil || w.Header().Get("Content-Type") != "application/json" {
		t.Errorf("%v %+v", err, d.OpenAPI)
	}
}
