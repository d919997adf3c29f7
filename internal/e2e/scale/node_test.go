//go:build linux

package scale

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	natsserver "github.com/nats-io/nats-server/v2/server"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

const (
	binEnv  = "CULVERT_E2E_BIN"  // where the binaries are; built here where it is unset
	natsEnv = "CULVERT_E2E_NATS" // this process is to be a nats-server with this configuration
)

func TestMain(m *testing.M) {
	if config := os.Getenv(natsEnv); config != "" {
		runNATS(config)
	}
	dir, err := os.MkdirTemp("", "culvert-scale-")
	if err == nil && os.Getenv(binEnv) == "" {
		if err = stage.Build(context.Background(), "../../..", dir); err == nil {
			err = os.Setenv(binEnv, dir)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	_ = lab.EnterThen(func() { _ = os.RemoveAll(dir) }) // a test that needs it names the reason, through lab.Require
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// runNATS is what the nats-server program's main does.
func runNATS(config string) {
	opts, err := natsserver.ProcessConfigFile(config)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	srv, err := natsserver.NewServer(opts)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	srv.ConfigureLogger()
	srv.Start()
	srv.WaitForShutdown()
	os.Exit(0)
}

func binary() string { return filepath.Join(os.Getenv(binEnv), "culvert-coordinator") }

// machine is this machine itself, as a host to run programs on.
func machine(t testing.TB) *lab.Host {
	t.Helper()
	n := lab.Flat(context.Background())
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	h, err := n.Host("machine", lab.HostOptions{Flat: netip.MustParseAddr("127.0.0.1")})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// freeAddr gives an address of a host on which nobody listens now.
func freeAddr(t testing.TB, h *lab.Host) string {
	t.Helper()
	l, err := h.Listen(netip.AddrPortFrom(h.Addr(), 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// process is a program that ends with its test at the latest.
type process struct {
	*lab.Process
	log string
}

// start runs a program whose output goes to a file.
func start(t testing.TB, h *lab.Host, log string, env []string, path string, args ...string) *process {
	t.Helper()
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	proc, err := h.Start(lab.Program{Path: path, Args: args, Env: append(os.Environ(), env...), Stdout: out, Stderr: out})
	if err != nil {
		t.Fatal(err)
	}
	p := &process{proc, log}
	t.Cleanup(p.kill)
	return p
}

func (p *process) kill() {
	p.Kill()
	<-p.Done()
}

func (p *process) signal(s syscall.Signal) {
	_ = p.Signal(s) // an error says that it is dead
}

// tail gives the end of a log.
func tail(log string) string {
	data, _ := os.ReadFile(log)
	return string(data[max(0, len(data)-20_000):])
}

// node is one coordinator.
type node struct {
	*process
	t      testing.TB
	host   *lab.Host
	dir    string
	config string
	addr   string
	issuer string // URL of the one whose jobs it takes
	page   string // address of its metrics, if it has one
}

func (n *node) url() string { return "http://" + n.addr }

// newNode writes a configuration; more are lines of it, state among them.
func newNode(t testing.TB, h *lab.Host, issuer, url, more string) *node {
	t.Helper()
	n := &node{t: t, host: h, dir: t.TempDir(), addr: freeAddr(t, h), issuer: issuer}
	n.config = filepath.Join(n.dir, "culvert.yaml")
	if url == "" {
		url = n.url()
	}
	doc := fmt.Sprintf(`
url: %s
listen: %s
udp: off
probe: off
insecure_http: true
trusted_proxies: [127.0.0.1/32, 198.51.100.0/24, 203.0.113.0/24]
limits: {owner: 100000, repository: 100000, total: 100000}
issuers: [{url: %q}]
networks: {load: {sessions: 10.64.0.0/12, gateways: [{issuer: %q, subject: culvert-load}]}}
rules: [{name: load, network: load, match: {repository_owner_id: 1, repository_id: 2}, allow: ["tcp 10.20.0.5:5432"]}]
%s`, url, n.addr, issuer, issuer, more)
	if err := os.WriteFile(n.config, []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	return n
}

// serve starts the coordinator; ready waits for it.
func (n *node) serve() {
	n.t.Helper()
	n.process = start(n.t, n.host, filepath.Join(n.dir, "log"), nil, binary(), "serve", "--config", n.config, "--log-level", "warn")
}

func (n *node) ready() {
	n.t.Helper()
	client := n.host.Client(5 * time.Second)
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		resp, err := client.Get(n.url() + "/readyz")
		if err != nil {
			continue
		}
		_ = resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return
		}
	}
	n.t.Fatalf("the coordinator is never ready; log:\n%s", tail(n.log))
}

// sessions is how many sessions the coordinator knows of, on all nodes; 0 where it does not answer.
func (n *node) sessions() int {
	resp, err := n.host.Client(5 * time.Second).Get("http://" + n.page + "/metrics")
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), `culvert_coordinator_sessions{network="load"} `); ok {
			count, err := strconv.ParseFloat(rest, 64)
			if err != nil {
				return 0
			}
			return int(count)
		}
	}
	return 0
}

// memory is a line of the process's status in bytes, such as VmRSS (proc(5)).
func (n *node) memory(name string) float64 {
	n.t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", n.Pid()))
	if err != nil {
		n.t.Fatal(err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), name+":"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			if err != nil {
				n.t.Fatal(err)
			}
			return kb * 1024
		}
	}
	n.t.Fatalf("no %s", name)
	return 0
}

// processor is the time that the process has had, in seconds.
func (n *node) processor() float64 {
	n.t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n.Pid()))
	if err != nil {
		n.t.Fatal(err)
	}
	f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100 // USER_HZ
}

// report is what the generator says, as far as tests look at it.
type report struct {
	Phases []struct {
		Name   string         `json:"name"`
		Joins  int            `json:"joins"`
		Secs   float64        `json:"seconds"`
		Rate   float64        `json:"joins_per_second"`
		P50    float64        `json:"p50_ms"`
		P99    float64        `json:"p99_ms"`
		Max    float64        `json:"max_ms"`
		Gap    float64        `json:"gap_ms"`
		Errors map[string]int `json:"errors"`
	} `json:"phases"`
	Sessions      int            `json:"sessions"`
	Renewals      int            `json:"renewals"`
	RenewalErrors map[string]int `json:"renewal_errors"`
	Lost          int            `json:"lost"`
	Clashes       int            `json:"clashes"`
	Sampled       int            `json:"sampled"`
	Missing       int            `json:"missing"`
	KeyFetches    int            `json:"key_fetches"`
}

// generator is a run of `culvert-coordinator load`.
type generator struct {
	t        testing.TB
	proc     *lab.Process
	out, log bytes.Buffer
}

// play starts the generator on a host against nodes.
func play(t testing.TB, h *lab.Host, nodes []*node, url string, args ...string) *generator {
	t.Helper()
	args = append([]string{"load", "--json", "--log-level", "warn", "--insecure-http", "--issuer", nodes[0].issuer}, args...)
	if url != "" {
		args = append(args, "--url", url)
	}
	for _, n := range nodes {
		args = append(args, "--coordinator", n.url())
	}
	g := &generator{t: t}
	var err error
	if g.proc, err = h.Start(lab.Program{Path: binary(), Args: args, Stdout: &g.out, Stderr: &g.log}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.proc.Kill()
		<-g.proc.Done()
	})
	return g
}

// report waits for the run's end. The generator fails where anything went wrong; what is for the caller to judge.
func (g *generator) report() (r report) {
	g.t.Helper()
	code, err := g.proc.Wait(context.Background())
	if err == nil && code != 0 {
		err = fmt.Errorf("exit code %d", code)
	}
	if jerr := json.Unmarshal(g.out.Bytes(), &r); jerr != nil {
		g.t.Fatalf("the generator: %v, %v\n%s", err, jerr, g.log.String())
	}
	if err != nil {
		g.t.Logf("the generator: %v\n%s\n%s", err, g.out.String(), g.log.String()[max(0, g.log.Len()-4000):])
	}
	return r
}

// clean fails the test unless everything went well.
func (r report) clean(t testing.TB) {
	t.Helper()
	for _, p := range r.Phases {
		if len(p.Errors) > 0 {
			t.Errorf("%s: %v", p.Name, p.Errors)
		}
	}
	if r.Lost+r.Clashes+r.Missing+len(r.RenewalErrors) > 0 || r.Sampled == 0 {
		t.Errorf("lost %d, clashes %d, missing %d of %d, renewals refused %v", r.Lost, r.Clashes, r.Missing, r.Sampled, r.RenewalErrors)
	}
}
