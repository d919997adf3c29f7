//go:build unix

package stage

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
)

// programs maps the binaries' names to their folders.
var programs = map[string]string{
	"culvert-coordinator": "./coordinator",
	"culvert-gateway":     "./gateway",
	"culvert":             "./client",
}

// Build builds the three programs from the module at root into dir, with further flags of go build. It needs Go's cache,
// so call it before [lab.Enter].
func Build(ctx context.Context, root, dir string, flags ...string) error {
	for name, folder := range programs {
		args := append([]string{"build", "-trimpath", "-o", filepath.Join(dir, name)}, flags...)
		cmd := exec.CommandContext(ctx, "go", append(args, folder)...)
		cmd.Dir, cmd.Env = root, os.Environ()
		if len(flags) == 0 {
			cmd.Env = append(cmd.Env, "CGO_ENABLED=0")
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", name, err, out)
		}
	}
	return nil
}

func (s *Stage) file(name string) string { return filepath.Join(s.opts.Dir, name) }

// writeFiles writes what the programs read.
func (s *Stage) writeFiles() error {
	secret, sum := newEnrolment()
	s.enrolment = s.file("enrolment")
	if err := os.WriteFile(s.enrolment, []byte(secret+"\n"), 0o600); err != nil {
		return err
	}
	if os.Getuid() == 0 {
		// Refused where only one user exists, inside lab.Enter; there the file is readable by the gateway anyway.
		_ = os.Chown(s.enrolment, lab.UnprivilegedID, lab.UnprivilegedID)
	}
	if s.opts.Policy != nil {
		if err := os.WriteFile(s.file("policy.yaml"), []byte(s.opts.Policy(s)), 0o644); err != nil {
			return err
		}
	}
	rules := s.DefaultRules()
	if s.opts.Rules != nil {
		rules = s.opts.Rules(s)
	}
	return s.WriteConfig(rules, sum)
}

// WriteConfig writes the coordinator's file with these rules. sum is the enrolment secret's; "" keeps the one in force.
func (s *Stage) WriteConfig(rules, sum string) error {
	if sum == "" {
		old, err := os.ReadFile(s.ConfigFile())
		if err != nil {
			return err
		}
		head, _, _ := strings.Cut(string(old), "\nrules:\n")
		return s.replaceConfig(head + "\nrules:\n" + rules)
	}
	return s.replaceConfig(fmt.Sprintf(`url: %s
%s
state: {dir: %q}
issuers: [{url: %s}]
networks: {%s}
%s
rules:
%s`, s.URL, s.listeners(), s.file("state"), s.Issuer.URL(), s.networks(sum), s.opts.Coordinator, rules))
}

// networks lists the networks as YAML; their gateways enrol with the secret of this sum.
func (s *Stage) networks(sum string) string {
	var list []string
	for _, name := range []string{Network, s.opts.Other} {
		if name != "" {
			list = append(list, fmt.Sprintf("%s: {gateways: [{enrol_sha256: %s}]}", name, sum))
		}
	}
	return strings.Join(list, ", ")
}

// listeners says where the coordinator listens, and to whom it sends clients and gateways for what it does not do itself.
func (s *Stage) listeners() string {
	if s.opts.Flat {
		// The port after STUN's may be anybody's.
		return fmt.Sprintf("listen: %q\nudp: %q\nprobe: off", netip.AddrPortFrom(s.Cloud.Addr(), s.ports.coordinator),
			netip.AddrPortFrom(s.Cloud.Addr(), s.ports.stun))
	}
	lines := []string{
		fmt.Sprintf("listen: %q", netip.AddrPortFrom(s.Cloud.Addr(), 443)),
		fmt.Sprintf("tls: {cert: %q, key: %q}", s.ca.certFile(), s.ca.keyFile()),
		fmt.Sprintf("udp: %q", netip.AddrPortFrom(s.Cloud.Addr(), PortSTUN)),
	}
	if s.opts.NoUDP {
		lines[2] = "udp: off"
	}
	return strings.Join(append(lines, s.listRelays()...), "\n")
}

// replaceConfig changes the file in one step, as an operator's tool does, so that no half of it is ever read.
func (s *Stage) replaceConfig(text string) error {
	next := s.ConfigFile() + ".next"
	if err := os.WriteFile(next, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(next, s.ConfigFile())
}

// ConfigFile is the coordinator's configuration file.
func (s *Stage) ConfigFile() string { return s.file("culvert.yaml") }

// environ is what every program on a host gets.
func (s *Stage) environ(h *lab.Host, more ...string) []string {
	env := []string{"PATH=" + os.Getenv("PATH"), "TMPDIR=" + os.TempDir(), "NO_COLOR=1"}
	if !s.opts.Flat {
		env = append(env, "SSL_CERT_FILE="+s.ca.caFile())
	}
	if proxy := s.proxies[h]; proxy != nil {
		env = append(env, "HTTPS_PROXY="+proxy.String())
	}
	return append(env, more...)
}

// daemon starts a program whose output goes to name.log, appended.
func (s *Stage) daemon(h *lab.Host, name string, p lab.Program) (*lab.Process, error) {
	log, err := os.OpenFile(s.file(name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.Stdout, p.Stderr = log, log
	return h.Start(p)
}

// StartCoordinator starts the coordinator, on the state that it left, and returns when it is ready.
func (s *Stage) StartCoordinator(ctx context.Context) error {
	program, err := s.coordinatorProgram(lab.Program{
		Path: s.Binary("culvert-coordinator"),
		Args: []string{"serve", "--config", s.ConfigFile()},
		Env:  s.environ(s.Cloud),
	})
	if err != nil {
		return err
	}
	proc, err := s.daemon(s.Cloud, "coordinator", program)
	if err != nil {
		return err
	}
	s.coordinator = proc
	if err := poll(ctx, proc.Done(), func() error { return s.ready(ctx) }); err != nil {
		return fmt.Errorf("wait for the coordinator: %w\n%s", err, s.Logs())
	}
	return nil
}

func (s *Stage) ready(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL+"/readyz", nil)
	if err != nil {
		return err
	}
	client := s.Client(s.Cloud, 2*time.Second)
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the coordinator answers %s", resp.Status)
	}
	return nil
}

// Binary is the path of one of the three programs.
func (s *Stage) Binary(name string) string { return s.binaries[name] }

// Publish gives a path under which every user can run a program: its own, or that of a copy where a folder on the way is
// closed to others, as root's home is.
func (s *Stage) Publish(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if open(path) {
		return path, nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("copy a program for other users: %w", err)
	}
	published := s.file(filepath.Base(path))
	_ = os.Remove(published) // what runs from it goes on; writing to it would be refused
	return published, os.WriteFile(published, data, 0o755)
}

// Use has one of the three programs started from this path from now on, as an upgrade does. What runs goes on.
func (s *Stage) Use(name, path string) error {
	published, err := s.Publish(path)
	if err != nil {
		return err
	}
	s.binaries[name] = published
	return nil
}

// open reports whether others may enter every folder on the way to a file and run it.
func open(path string) bool {
	for {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm()&0o001 == 0 {
			return false
		}
		parent := filepath.Dir(path)
		if parent == path {
			return true
		}
		path = parent
	}
}

func (s *Stage) publishBinaries() error {
	s.binaries = make(map[string]string, len(programs))
	for name := range programs {
		if err := s.Use(name, cmp.Or(s.opts.Programs[name], filepath.Join(s.opts.Binaries, name))); err != nil {
			return err
		}
	}
	return nil
}

// StartGateway starts the gateway, without any privilege, and returns when it takes sessions.
func (s *Stage) StartGateway(ctx context.Context) error {
	if err := s.LaunchGateway(); err != nil {
		return err
	}
	if err := poll(ctx, s.gateway.Done(), func() error { return s.tryJoin(ctx) }); err != nil {
		return fmt.Errorf("wait for the gateway: %w\n%s", err, s.Logs())
	}
	if s.opts.Other == "" || s.other != nil {
		return nil
	}
	var err error
	if s.other, err = s.launchGateway("other", 0, "--network", s.opts.Other); err != nil {
		return err
	}
	log := s.file("other.log")
	if err := poll(ctx, s.other.Done(), func() error { return says(log, `"msg":"stream to the coordinator is up"`) }); err != nil {
		return fmt.Errorf("wait for the other network's gateway: %w\n%s", err, s.Logs())
	}
	return nil
}

// says reports whether a log holds a text yet.
func says(log, text string) error {
	data, err := os.ReadFile(log)
	if err == nil && !strings.Contains(string(data), text) {
		err = fmt.Errorf("%s does not say %s", log, text)
	}
	return err
}

// LaunchGateway starts the gateway and does not wait.
func (s *Stage) LaunchGateway() (err error) {
	s.gateway, err = s.launchGateway("gateway", s.ports.gateway)
	return err
}

// LaunchSecondGateway starts another gateway of the network on the same host, which calls itself "second", and does not wait.
func (s *Stage) LaunchSecondGateway() (err error) {
	s.second, err = s.launchGateway("second", 0, "--name", "second")
	return err
}

// SecondGateway is the process of [Stage.LaunchSecondGateway].
func (s *Stage) SecondGateway() *lab.Process { return s.second }

// metricsAt is where a gateway shows its metrics, on its own host.
func metricsAt(log string) string {
	return map[string]string{"gateway": "127.0.0.1:9091", "second": "127.0.0.1:9092", "other": "127.0.0.1:9093"}[log]
}

// GatewayMetric reads a series off the page of a gateway, of the second one if so asked; not on a flat stage or where the gateway is an image.
func (s *Stage) GatewayMetric(second bool, series string) (float64, error) {
	log := "gateway"
	if second {
		log = "second"
	}
	client := s.GatewayBox.Client(20 * time.Second)
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://" + metricsAt(log) + "/metrics")
	if err != nil {
		return 0, fmt.Errorf("read the gateway's metrics: %w", err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), series+" "); ok {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, fmt.Errorf("the gateway has no series %s: %w", series, errors.Join(lines.Err(), errNoSeries))
}

var errNoSeries = errors.New("not on its page")

func (s *Stage) launchGateway(log string, port uint16, args ...string) (*lab.Process, error) {
	args = append([]string{"run", "--coordinator", s.URL, "--network", Network, "--enrol-token-file", s.enrolment,
		"--issuer", s.Issuer.URL(), "--listen", fmt.Sprintf(":%d", port)}, args...)
	if s.opts.Flat { // the router there is this machine's own
		args = append(args, "--port-mapping", "off")
	}
	if !s.opts.Flat && s.opts.Images == nil { // an image says itself where they are
		args = append(args, "--metrics", metricsAt(log))
	}
	if len(s.opts.Names) > 0 {
		args = append(args, "--resolver", s.resolver())
	}
	if s.opts.Policy != nil {
		args = append(args, "--policy", s.file("policy.yaml"))
	} else {
		args = append(args, "--owner", OwnerID)
	}
	program, err := s.gatewayProgram(log, lab.Program{
		Path: s.Binary("culvert-gateway"), Args: args, Unprivileged: true,
		Env: s.environ(s.GatewayBox, "CULVERT_DRAIN="+s.opts.Drain.String()), // a flag that the last release may not have
	})
	if err != nil {
		return nil, err
	}
	return s.daemon(s.GatewayBox, log, program)
}

// Gateway is the gateway's process.
func (s *Stage) Gateway() *lab.Process { return s.gateway }

// Coordinator is the coordinator's process.
func (s *Stage) Coordinator() *lab.Process { return s.coordinator }

// KillGateway kills the gateway with -9 and waits.
func (s *Stage) KillGateway() { kill(s.gateway) }

// KillCoordinator kills the coordinator with -9 and waits.
func (s *Stage) KillCoordinator() { kill(s.coordinator) }

// StopGateway asks the gateway to end, as an orchestrator does, and gives its exit code.
func (s *Stage) StopGateway(ctx context.Context) (int, error) { return stop(ctx, s.gateway) }

// StopCoordinator asks the coordinator to end and gives its exit code.
func (s *Stage) StopCoordinator(ctx context.Context) (int, error) { return stop(ctx, s.coordinator) }

func kill(p *lab.Process) {
	p.Kill()
	<-p.Done()
}

func stop(ctx context.Context, p *lab.Process) (int, error) {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return -1, err
	}
	return p.Wait(ctx)
}
