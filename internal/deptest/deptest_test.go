// Package deptest states which package may import which, and why. It has no code besides its test.
package deptest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/culvertnet/culvert"

// rule forbids packages to depend on others. Patterns are paths below the module; "x/..." means x and all below it, and
// "std:x" a package of the standard library.
type rule struct {
	from   []string
	except []string // packages of from that the rule does not hold for
	never  []string
	only   []string // instead of never: everything but these is forbidden; "std" is the whole standard library
	direct bool     // only what the package itself imports; else also what it reaches through others
	why    string
}

// assemblies put whole programs together for tests and the demo; no program imports them.
var assemblies = []string{"internal/e2e/...", "internal/demo/...", "internal/lab/...", "internal/stage/...", "internal/snippets"}

var rules = []rule{
	{
		from: []string{"coordinator/..."}, never: []string{"gateway/...", "client/..."},
		why: "the programs trust each other only as far as the wire shows: what they share is in internal",
	},
	{
		from: []string{"gateway/..."}, never: []string{"coordinator/...", "client/..."},
		why: "the gateway judges for itself: it must not run the coordinator's code to do so",
	},
	{
		from: []string{"client/..."}, never: []string{"coordinator/...", "gateway/..."},
		why: "the client runs on strangers' machines and holds no code that it does not need",
	},
	{
		from: []string{"client/..."}, never: []string{"internal/claims", "internal/policy"},
		why: "the client never judges: it hands its token over and takes the answer",
	},
	{
		from: []string{"coordinator/..."}, never: []string{"internal/tunnel", "internal/netstack"},
		why: "the coordinator never holds a tunnel key and never sees a packet in the clear",
	},
	{
		from: []string{"internal/cores"}, only: []string{"std"},
		why: "how many processors a process takes is decided from what it uses, whatever it is",
	},
	{
		from: []string{"internal/health"}, only: []string{"std", "internal/problem", "internal/wire"},
		why: "a health check asks over HTTP: it must not need what it judges",
	},
	{
		from: []string{"internal/requirements"}, only: []string{"std", "internal/wire"},
		why: "what is needed of a network is a list: programs and documentation read it, and nothing in it depends on how it is tested",
	},
	{
		from: []string{"client/...", "coordinator/..."}, never: []string{"internal/portmap"},
		why: "only a gateway asks its router for a port: a job has no router of its own, and a coordinator stands in the open",
	},
	{
		from: []string{"coordinator/...", "gateway/..."}, never: []string{"mod:golang.zx2c4.com/wireguard/wgctrl"},
		why: "no server has an interface of its own or the right to make one",
	},
	{
		from: []string{"internal/cork"}, only: []string{"std"},
		why: "it stands below TLS on every connection, where nothing that knows sessions has business",
	},
	{
		from: []string{"..."}, never: []string{"mod:github.com/pion"},
		why: "pion/stun checks our STUN messages in tests; what it requires (dtls, with a finding that has no fix) stays out of every program, as SECURITY.md and deploy/vex.json say",
	},
	{
		from: []string{"internal/repair"}, only: []string{"std"},
		why: "rebuilding packets is arithmetic on what came: whoever tests it needs neither sockets nor keys",
	},
	{
		from: []string{"internal/wire", "internal/problem"}, only: []string{"std"},
		why: "everything stands on these two, and a second program in another place has to be able to build on them alone",
	},
	{
		from: []string{"internal/..."}, except: assemblies, never: []string{"coordinator/...", "gateway/...", "client/..."},
		why: "imports point down: from programs to features, never back",
	},
	{
		from: []string{"..."}, except: assemblies, never: assemblies,
		why: "what puts programs together for tests and the demo does not end up in a program",
	},
	{
		from: []string{"..."}, except: append([]string{"internal/claims/claimstest"}, assemblies...), never: []string{"internal/claims/claimstest"},
		why: "an issuer that signs whatever it is asked to has no place in a program",
	},
	{
		from: []string{"..."}, except: append([]string{"internal/egress/egresstest"}, assemblies...), never: []string{"internal/egress/egresstest"},
		why: "a proxy that leads wherever it is asked to has no place in a program",
	},
	{
		from: []string{"coordinator/downloads"}, only: []string{"std", "internal/problem"},
		why: "what serves files to strangers knows no sessions, keys or rules",
	},
	{
		from: []string{"coordinator/audit"}, never: []string{"coordinator/session", "coordinator/api", "coordinator/server"},
		why: "whoever decides writes records; the log knows nothing of how decisions come about",
	},
	{
		from: []string{"coordinator/load"}, never: []string{"coordinator/session", "coordinator/api", "coordinator/state", "coordinator/server"},
		why: "what measures a coordinator knows of it what a gateway and a job know: the wire",
	},
	{
		from: []string{"internal/policy"}, direct: true, never: []string{"std:net", "std:net/http", "std:os", "std:context", "internal/claims"},
		why: "policy is pure: a decision can be reproduced from a file and verified claims alone",
	},
	{
		from: []string{"..."}, never: []string{"mod:github.com/invopop/jsonschema", "mod:github.com/santhosh-tekuri/jsonschema"},
		why: "schemas are generated and checked by tests; programs carry them as text",
	},
	{
		from: []string{"internal/claims"}, never: []string{"internal/policy", "internal/tunnel"},
		why: "verifying a token and judging its claims are two things that are trusted separately",
	},
	{
		from: []string{"gateway/trace"}, only: []string{"std", "internal/wire"},
		why: "what is told of flows is counted and kept, never judged",
	},
	{
		from: []string{"gateway/names"}, never: []string{"internal/tunnel", "internal/netstack", "internal/claims", "gateway/forward"},
		why: "what parses DNS from jobs and from the private network holds no packets, no keys and no tokens",
	},
	{
		from: []string{"..."}, except: append([]string{"gateway/names/namestest"}, assemblies...), never: []string{"gateway/names/namestest"},
		why: "a DNS server that says whatever it is told has no place in a program",
	},
	{
		from: []string{"internal/relay", "internal/udpconn"}, never: []string{"internal/tunnel", "internal/netstack", "internal/claims", "internal/policy"},
		why: "a relay moves ciphertext for whoever has a ticket: it holds no tunnel and judges nobody",
	},
}

// graph holds what each package imports, by import path.
type graph map[string][]string

// pkg is what is read of go list's output.
type pkg struct {
	ImportPath string
	Imports    []string
	Error      *struct{ Err string }
}

func (p *pkg) problem() error {
	if p.Error != nil && !strings.Contains(p.Error.Err, "build constraints exclude all Go files") {
		return fmt.Errorf("%s: %s", p.ImportPath, p.Error.Err)
	}
	return nil
}

// load asks the go command for the module's packages and all that they depend on, tests left out.
func load(goos string) (graph, error) {
	cmd := exec.Command("go", "list", "-e", "-deps", "-json=ImportPath,Imports,Error", "./...")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "GOOS="+goos, "CGO_ENABLED=0", "GOFLAGS=-mod=readonly")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list packages for %s: %w", goos, err)
	}
	g := graph{}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return g, nil
		} else if err != nil {
			return nil, fmt.Errorf("read the package list: %w", err)
		}
		if err := p.problem(); err != nil {
			return nil, err
		}
		g[p.ImportPath] = p.Imports
	}
}

// matches tells whether an import path fits a pattern.
func matches(path, pattern string) bool {
	if std, ok := strings.CutPrefix(pattern, "std:"); ok {
		return path == std
	}
	if mod, ok := strings.CutPrefix(pattern, "mod:"); ok {
		return path == mod || strings.HasPrefix(path, mod+"/")
	}
	if pattern == "std" {
		first, _, _ := strings.Cut(path, "/")
		return !strings.Contains(first, ".")
	}
	below, ours := strings.CutPrefix(path, module+"/")
	if !ours {
		return false
	}
	if tree, ok := strings.CutSuffix(pattern, "..."); ok {
		return tree == "" || strings.HasPrefix(below+"/", tree)
	}
	return below == pattern
}

func matchesAny(path string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(path, p) })
}

func (r *rule) forbids(path string) bool {
	if r.only != nil {
		return !matchesAny(path, r.only)
	}
	return matchesAny(path, r.never)
}

// check gives a line for every package that breaks a rule: the shortest chain of imports that does.
func check(g graph, rules []rule) []string {
	var broken []string
	for _, r := range rules {
		for from := range g {
			if !matchesAny(from, r.from) || matchesAny(from, r.except) {
				continue
			}
			if chain := g.chain(from, &r); chain != nil {
				broken = append(broken, strings.Join(chain, " → ")+": "+r.why)
			}
		}
	}
	slices.Sort(broken)
	return broken
}

// chain searches breadth first for an import that r forbids.
func (g graph) chain(from string, r *rule) []string {
	parent := map[string]string{from: ""}
	for queue := []string{from}; len(queue) > 0; queue = queue[1:] {
		for _, to := range g[queue[0]] {
			if _, seen := parent[to]; seen {
				continue
			}
			parent[to] = queue[0]
			if r.forbids(to) {
				return path(parent, to)
			}
			if !r.direct {
				queue = append(queue, to)
			}
		}
	}
	return nil
}

func path(parent map[string]string, to string) []string {
	var chain []string
	for at := to; at != ""; at = parent[at] {
		chain = append(chain, strings.TrimPrefix(at, module+"/"))
	}
	slices.Reverse(chain)
	return chain
}

// banned are names that say nothing of what a package owns.
var banned = []string{"util", "utils", "common", "types", "helpers", "misc", "shared"}

func badNames(g graph) []string {
	var bad []string
	for p := range g {
		if matches(p, "...") && slices.Contains(banned, p[strings.LastIndex(p, "/")+1:]) {
			bad = append(bad, p)
		}
	}
	return bad
}

// TestImports holds the module against the rules on every platform that it is built for, because files differ.
func TestImports(t *testing.T) {
	for _, goos := range []string{"linux", "darwin", "windows"} {
		t.Run(goos, func(t *testing.T) {
			t.Parallel()
			g, err := load(goos)
			if err != nil {
				t.Fatal(err)
			}
			for _, line := range check(g, rules) {
				t.Error(line)
			}
			for _, p := range badNames(g) {
				t.Errorf("package %s: the name does not say what it owns", p)
			}
		})
	}
}

// TestRulesMeetPackages keeps the rules from going stale: each has to speak of packages that exist. The assemblies may
// come and go.
func TestRulesMeetPackages(t *testing.T) {
	g, err := load("linux")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		for _, pattern := range slices.Concat(r.from, r.never) {
			if strings.HasPrefix(pattern, "std") || strings.HasPrefix(pattern, "mod:") || slices.Contains(assemblies, pattern) {
				continue
			}
			found := false
			for p := range g {
				found = found || matches(p, pattern)
			}
			if !found {
				t.Errorf("no package is %s any more, of which a rule says: %s", pattern, r.why)
			}
		}
	}
}

// TestViolationsAreFound proves on a made-up module that every rule can fail.
func TestViolationsAreFound(t *testing.T) {
	our := func(path string) string { return module + "/" + path }
	clean := func() graph {
		return graph{
			our("coordinator/api"): {our("internal/wire"), our("internal/claims")}, our("gateway/agent"): {our("internal/policy"), our("internal/tunnel")},
			our("client/agent"): {our("internal/tunnel"), "net/http"}, our("internal/wire"): {"encoding/json"}, our("internal/problem"): nil,
			our("internal/policy"): {our("internal/wire"), "net/netip"}, our("internal/claims"): {"example.com/oidc"}, our("internal/tunnel"): {our("internal/wire")},
			our("internal/e2e"): {our("coordinator/api"), our("gateway/agent"), our("client/agent"), our("internal/claims/claimstest")},
			"encoding/json":     {"os"}, our("internal/claims/claimstest"): {our("internal/claims")}, our("internal/netstack"): nil, our("internal/relay"): {our("internal/wire")},
		}
	}
	if broken := check(clean(), rules); broken != nil {
		t.Fatalf("a clean graph breaks %q", broken)
	}
	tests := []struct{ from, to, want string }{
		{"coordinator/api", "gateway/agent", "coordinator/api → gateway/agent: the programs trust"},
		{"coordinator/api", "client/agent", "coordinator/api → client/agent: the programs trust"},
		{"coordinator/api", "internal/tunnel", "coordinator/api → internal/tunnel: the coordinator never"},
		{"internal/claims", "internal/netstack", "coordinator/api → internal/claims → internal/netstack: the coordinator never"},
		{"gateway/agent", "coordinator/api", "gateway/agent → coordinator/api: the gateway judges"},
		{"gateway/agent", "client", "gateway/agent → client: the gateway judges"},
		{"client/agent", "coordinator/state", "client/agent → coordinator/state: the client runs"},
		{"client/agent", "internal/policy", "client/agent → internal/policy: the client never judges"},
		{"internal/tunnel", "internal/claims", "client/agent → internal/tunnel → internal/claims: the client never judges"},
		{"internal/requirements", "internal/problem", "internal/requirements → internal/problem: what is needed"},
		{"client/agent", "internal/portmap", "client/agent → internal/portmap: only a gateway"},
		{"internal/wire", "internal/problem", "internal/wire → internal/problem: everything stands"},
		{"internal/problem", "example.com/x", "internal/problem → example.com/x: everything stands"},
		{"internal/policy", "gateway/agent", "internal/policy → gateway/agent: imports point down"},
		{"gateway/agent", "internal/e2e", "gateway/agent → internal/e2e: what puts programs"},
		{"gateway/agent", "internal/claims/claimstest", "gateway/agent → internal/claims/claimstest: an issuer"},
		{"gateway/agent", "internal/egress/egresstest", "gateway/agent → internal/egress/egresstest: a proxy"},
		{"coordinator/audit", "coordinator/session", "coordinator/audit → coordinator/session: whoever decides"},
		{"coordinator/load", "coordinator/api", "coordinator/load → coordinator/api: what measures"},
		{"internal/policy", "net/http", "internal/policy → net/http: policy is pure"},
		{"internal/claims", "internal/policy", "internal/claims → internal/policy: verifying"},
		{"internal/policy", "github.com/invopop/jsonschema", "internal/policy → github.com/invopop/jsonschema: schemas"},
		{"internal/repair", "internal/wire", "internal/repair → internal/wire: rebuilding"},
		{"gateway/agent", "golang.zx2c4.com/wireguard/wgctrl", "gateway/agent → golang.zx2c4.com/wireguard/wgctrl: no server"},
		{"internal/relay", "internal/policy", "internal/relay → internal/policy: a relay moves"},
	}
	for _, tt := range tests {
		g := clean()
		to := tt.to
		if !strings.HasPrefix(to, "example.com") && !strings.HasPrefix(to, "net/") && !strings.HasPrefix(to, "github.com/") && !strings.HasPrefix(to, "golang.") {
			to = our(to)
		}
		g[our(tt.from)] = append(g[our(tt.from)], to)
		broken := check(g, rules)
		if !slices.ContainsFunc(broken, func(s string) bool { return strings.HasPrefix(s, tt.want) }) {
			t.Errorf("%s importing %s: got %q", tt.from, tt.to, broken)
		}
	}
	if bad := badNames(graph{our("internal/util"): nil, our("internal/wire"): nil, "example.com/util": nil}); len(bad) != 1 {
		t.Errorf("names: got %q", bad)
	}
}
