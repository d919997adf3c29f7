//go:build linux

package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/lab/vm"
	"github.com/culvertnet/culvert/internal/stage"
)

// gateway6 is the address of every gateway inside the tunnel, in IPv6.
const gateway6 = "fd63:756c:7665:7274::c612:1"

// kernelEnv names a folder with a kernel that has WireGuard, its modules, the guest's program and the tests of client/kernel; make
// kernel fills it.
const kernelEnv = "CULVERT_E2E_KERNEL"

// The virtual machine's network on the runner.
var (
	guestNet  = netip.MustParsePrefix("10.99.0.1/30")
	guestAddr = netip.MustParseAddr("10.99.0.2")
)

// Mode kernel on a kernel of its own, in front of real coordinator and gateway: a session joins over the relay, moves bytes both ways,
// takes the direct path when there is one and the relay again when that is gone, without losing a connection. wg shows it. What
// ends, one way or the other, leaves nothing.
func TestKernelWireGuard(t *testing.T) {
	if os.Getenv(kernelEnv) == "" {
		t.Skip("see make kernel")
	}
	s := setup(t, stage.Options{})
	must(t, s.Net.Block(s.Runner.Public(), s.GatewayBox.Public()))
	job := newJob(t, s, stage.JobOptions{})
	m := boot(t, s, job)
	before := m.state(t)
	if r := m.run(t, "/bin/kernel.test", "-test.v", "-test.timeout=1m"); r.Code != 0 || strings.Contains(r.Stdout, "refused:") {
		t.Errorf("the kernel's own tests: %s", r)
	}
	m.unchanged(t, before)

	if r := m.up(t, "kernel"); r.Mode != "kernel" {
		t.Errorf("the mode is %q", r.Mode)
	}
	m.call(t, "fetch", map[string]any{"URL": "http://[" + gateway6 + "]/", "Limit": 1}, nil) // any answer will do
	m.wait(t, "relay")
	m.transfer(t)
	m.call(t, "hold", map[string]any{"Addr": s.Target(stage.PortHTTP)}, nil)
	must(t, s.Net.Unblock(s.Runner.Public(), s.GatewayBox.Public()))
	m.wait(t, "direct")
	m.transfer(t)
	m.shown(t, s.GatewayBox.Public().String())
	must(t, s.Net.Block(s.Runner.Public(), s.GatewayBox.Public()))
	m.wait(t, "relay")
	m.transfer(t)
	m.stillHeld(t)

	m.culvert(t, 0, "down")
	m.unchanged(t, before)

	m.byAction(t)
	m.unchanged(t, before)

	must(t, s.LaunchSecondGateway())
	m.up(t, "kernel")
	m.moved(t)
	socket := "file /run/wireguard/" + m.status(t).Interface + ".sock" // a file outlives who is killed
	m.call(t, "kill", map[string]any{"PID": m.status(t).PID}, nil)
	m.unchanged(t, before, "file /run/wireguard", socket)
	m.culvert(t, 1, "down")
	m.unchanged(t, before)
	m.up(t, "tun") // and nothing is in the way of the next; wg shows that one, too
	m.transfer(t)
	m.shown(t, "")
	m.culvert(t, 0, "down")
	m.unchanged(t, before)
}

// byAction has the action's own steps do it, with real Node: mode kernel comes up, and goes with the job.
func (m *guest) byAction(t *testing.T) {
	t.Helper()
	inputs := []string{"INPUT_COORDINATOR=" + m.stage.URL, "INPUT_MODE=kernel", "INPUT_BINARY=/bin/culvert", "INPUT_SUDO=true", "INPUT_TIMEOUT=60s",
		"GITHUB_ACTIONS=true", "RUNNER_ENVIRONMENT=github-hosted", "STATE_program=/bin/culvert", "STATE_name=culvert"}
	r := m.runWith(t, inputs, "/bin/node", "/action/main.mjs")
	if r.Code != 0 || !strings.Contains(r.Stdout, "culvert: up in network corp") {
		t.Fatalf("the action's step: %s", r)
	}
	if text := m.culvert(t, 0, "status", "--json").Stdout; !strings.Contains(text, `"mode":"kernel"`) && !strings.Contains(text, `"mode": "kernel"`) {
		t.Errorf("the status is %s", text)
	}
	m.shown(t, "")
	m.transfer(t)
	if r := m.runWith(t, inputs, "/bin/node", "/action/post.mjs"); r.Code != 0 || strings.Contains(r.Stdout, "::warning") {
		t.Errorf("the action's last step: %s", r)
	}
}

// guest is a virtual machine that plays the runner.
type guest struct {
	stage  *stage.Stage
	job    *stage.Job
	client *http.Client
}

// boot starts it and returns when it answers.
func boot(t *testing.T, s *stage.Stage, job *stage.Job) *guest {
	t.Helper()
	dir := os.Getenv(kernelEnv)
	must(t, s.Runner.ServeGuest(guestNet))
	image := filepath.Join(t.TempDir(), "initrd")
	must(t, os.WriteFile(image, initrd(t, dir, s), 0o600))
	kernel, err := vm.Kernel(dir)
	must(t, err)
	log, err := os.Create(filepath.Join(job.Home(), "console"))
	must(t, err)
	defer log.Close()
	proc, err := s.Runner.Start(lab.Program{
		Path: program(t, "qemu-system-x86_64"),
		Args: []string{"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024", "-nographic", "-nodefaults", "-no-reboot",
			"-serial", "stdio", "-kernel", kernel, "-initrd", image,
			"-append", fmt.Sprintf("console=ttyS0 quiet panic=-1 reboot=t guest.addr=%s/%d guest.via=%s", guestAddr, guestNet.Bits(), guestNet.Addr()),
			"-netdev", "tap,id=n0,ifname=" + lab.TapDevice + ",script=no,downscript=no", "-device", "virtio-net-pci,netdev=n0,romfile="},
		Stdout: log, Stderr: log,
	})
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			console, _ := os.ReadFile(log.Name())
			t.Logf("the machine's console:\n%s", console)
		}
		proc.Kill()
		<-proc.Done()
	})
	m := &guest{stage: s, job: job, client: s.Runner.Client(2 * time.Minute)}
	began := time.Now()
	eventually(t, 2*time.Minute, "the machine's answer", func() error {
		select {
		case <-proc.Done():
			t.Fatal("the machine has ended")
		default:
		}
		_, err := m.post(t.Context(), "state", nil)
		return err
	})
	t.Logf("the machine is there after %v", time.Since(began).Round(10*time.Millisecond))
	return m
}

// post asks the machine for something.
func (m *guest) post(ctx context.Context, what string, in any) ([]byte, error) {
	if in == nil {
		in = struct{}{}
	}
	body, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, fmt.Sprintf("http://%s:8080/%s", guestAddr, what), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := m.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", what, out)
	}
	return out, err
}

func (m *guest) call(t *testing.T, what string, in, out any) {
	t.Helper()
	text, err := m.post(t.Context(), what, in)
	must(t, err)
	if out != nil {
		must(t, json.Unmarshal(text, out))
	}
}

// run runs a program in the job's environment.
func (m *guest) run(t *testing.T, path string, args ...string) stage.Result {
	t.Helper()
	return m.runWith(t, nil, path, args...)
}

// runWith does so with more in the environment.
func (m *guest) runWith(t *testing.T, more []string, path string, args ...string) stage.Result {
	t.Helper()
	env := []string{"PATH=/bin", "HOME=/tmp", "XDG_RUNTIME_DIR=/tmp", "SSL_CERT_FILE=/ca.pem"}
	for _, e := range m.job.Environ() {
		for _, keep := range []string{"ACTIONS_", "CULVERT_COORDINATOR="} {
			if strings.HasPrefix(e, keep) {
				env = append(env, e)
			}
		}
	}
	var r stage.Result
	m.call(t, "run", map[string]any{"Path": path, "Args": args, "Env": append(env, more...)}, &r)
	return r
}

func (m *guest) culvert(t *testing.T, code int, args ...string) stage.Result {
	t.Helper()
	r := m.run(t, "/bin/culvert", args...)
	if r.Code != code {
		t.Fatalf("culvert %v: want exit %d, got %s", args, code, r)
	}
	return r
}

func (m *guest) up(t *testing.T, mode string) (r ready) {
	t.Helper()
	began := time.Now()
	decode(t, m.culvert(t, 0, "up", "--json", "--mode", mode, "--wait-for", m.stage.Target(stage.PortHTTP)).Stdout, &r)
	t.Logf("up after %v", time.Since(began).Round(10*time.Millisecond))
	return r
}

// kernelStatus is what status says of a session in mode kernel, as far as is looked at.
type kernelStatus struct {
	PID       int        `json:"pid"`
	Interface string     `json:"interface"`
	Handshake *time.Time `json:"handshake"`
	RxBytes   uint64     `json:"rx_bytes"`
	TxBytes   uint64     `json:"tx_bytes"`
	Path      path       `json:"path"`
}

func (m *guest) status(t *testing.T) (s kernelStatus) {
	t.Helper()
	decode(t, m.culvert(t, 0, "status", "--json").Stdout, &s)
	return s
}

// wait waits for a kind of path.
func (m *guest) wait(t *testing.T, kind string) {
	t.Helper()
	began := time.Now()
	eventually(t, time.Minute, "the path "+kind, func() error {
		if got := m.status(t).Path; got.String() != kind {
			return fmt.Errorf("it is %v", got)
		}
		return nil
	})
	t.Logf("%s after %v", kind, time.Since(began).Round(10*time.Millisecond))
}

// transfer moves some megabytes each way, and wants them whole.
func (m *guest) transfer(t *testing.T) {
	t.Helper()
	const size = 4 << 20
	head := sha256.New()
	_, _ = io.CopyN(head, download(), size)
	zeros := sha256.Sum256(make([]byte, size))
	was := m.status(t)
	var got struct {
		Bytes     int64
		Sum, Text string
	}
	began := time.Now()
	m.call(t, "fetch", map[string]any{"URL": "http://" + m.stage.Target(stage.PortHTTP) + "/download", "Limit": size}, &got)
	if got.Bytes != size || got.Sum != hex.EncodeToString(head.Sum(nil)) {
		t.Fatalf("the download gave %d bytes, or others than were sent", got.Bytes)
	}
	down := time.Since(began)
	began = time.Now()
	m.call(t, "fetch", map[string]any{"URL": "http://" + m.stage.Target(stage.PortHTTP) + "/upload", "Limit": 1 << 10, "Send": size}, &got)
	if got.Text != hex.EncodeToString(zeros[:]) {
		t.Fatalf("the upload's sum is %s", got.Text)
	}
	rate := func(d time.Duration) float64 { return size * 8 / d.Seconds() / 1e6 }
	up := time.Since(began)
	now := m.status(t)
	var memory int
	m.call(t, "memory", map[string]any{"PID": now.PID}, &memory)
	t.Logf("%.0f Mbit/s down, %.0f up, %d MB resident", rate(down), rate(up), memory>>20)
	if now.Handshake == nil || now.RxBytes-was.RxBytes < size || now.TxBytes-was.TxBytes < size {
		t.Errorf("status counts %d bytes in and %d out, handshake %v", now.RxBytes-was.RxBytes, now.TxBytes-was.TxBytes, now.Handshake)
	}
}

// moved has the gateway die that carries the session, and wants the other one to go on with it.
func (m *guest) moved(t *testing.T) {
	t.Helper()
	var first, now standing
	eventually(t, time.Minute, "a standby", func() error {
		if decode(t, m.culvert(t, 0, "status", "--json").Stdout, &first); first.Standby == "" {
			return errors.New("there is none")
		}
		return nil
	})
	dying, _ := carriers(m.stage, first)
	dying.Kill()
	eventually(t, time.Minute, "the standby carries the session", func() error {
		if decode(t, m.culvert(t, 0, "status", "--json").Stdout, &now); now.Gateway != first.Standby {
			return fmt.Errorf("it is %s", now.Gateway)
		}
		return nil
	})
	m.transfer(t)
}

// stillHeld wants the connection that was opened on the first path to be alive.
func (m *guest) stillHeld(t *testing.T) {
	t.Helper()
	type holdings struct {
		Bytes int
		Err   string
	}
	var first holdings
	m.call(t, "held", nil, &first)
	eventually(t, 30*time.Second, "more over the connection that was there first", func() error {
		var now holdings
		m.call(t, "held", nil, &now)
		if now.Err != "" {
			t.Fatalf("it has ended: %s", now.Err)
		}
		if now.Bytes <= first.Bytes {
			return fmt.Errorf("%d bytes, as before", now.Bytes)
		}
		return nil
	})
}

// shown wants wg to show the session and where its packets go, and nobody the key.
func (m *guest) shown(t *testing.T, endpoint string) {
	t.Helper()
	name := m.status(t).Interface
	r := m.run(t, "/bin/wg", "show", name)
	for _, want := range []string{"interface: " + name, "endpoint: " + endpoint, "latest handshake:", "transfer:", "allowed ips: 198.18."} {
		if !strings.Contains(r.Stdout, want) {
			t.Errorf("wg does not show %q: %s", want, r)
		}
	}
	if r := m.run(t, "/bin/wg", "show", "all", "dump"); !strings.HasPrefix(r.Stdout, name+"\t(none)\t") {
		t.Errorf("wg knows more than it should: %s", r)
	}
	if r := m.run(t, "/bin/wg", "showconf", name); r.Code != 0 || strings.Contains(r.Stdout, "PrivateKey") {
		t.Errorf("wg showconf gives %s", r)
	}
}

func (m *guest) state(t *testing.T) (lines []string) {
	t.Helper()
	m.call(t, "state", nil, &lines)
	return lines
}

func (m *guest) unchanged(t *testing.T, before []string, but ...string) {
	t.Helper()
	eventually(t, 30*time.Second, "nothing is left", func() error {
		now := slices.DeleteFunc(m.state(t), func(line string) bool { return slices.Contains(but, line) })
		if !slices.Equal(now, before) {
			return fmt.Errorf("before:\n%s\nnow:\n%s", strings.Join(before, "\n"), strings.Join(now, "\n"))
		}
		return nil
	})
}

// wantModules are the kernel modules of the machine; what they need comes along.
var wantModules = []string{"virtio_pci", "virtio_net", "wireguard", "veth", "nf_tables", "nft_ct", "tun", "tcp_diag"}

// initrd makes the machine's file system: modules, programs, and the files that they read.
func initrd(t *testing.T, dir string, s *stage.Stage) []byte {
	t.Helper()
	var a vm.Archive
	a.File("init", read(t, filepath.Join(dir, "guest")), 0o755)
	a.File("bin/kernel.test", read(t, filepath.Join(dir, "kernel.test")), 0o755)
	a.File("bin/culvert", read(t, s.Binary("culvert")), 0o755)
	addDynamic(t, &a, map[string]string{"wg": program(t, "wg"), "node": tool(t, nodeEnv, "node")})
	for _, name := range []string{"main.mjs", "post.mjs", "client.mjs", "runner.mjs", "release.json"} {
		a.File("action/"+name, read(t, filepath.Join("../../action", name)), 0o644)
	}
	a.File("ca.pem", read(t, s.CAFile()), 0o644)
	must(t, a.Modules(dir, wantModules...))
	return a.End()
}

// addDynamic adds programs with the libraries that they need.
func addDynamic(t *testing.T, a *vm.Archive, programs map[string]string) {
	t.Helper()
	added := map[string]bool{}
	for name, path := range programs {
		a.File("bin/"+name, read(t, path), 0o755)
		libraries, err := exec.CommandContext(t.Context(), "ldd", path).Output()
		must(t, err)
		for _, word := range strings.Fields(string(libraries)) {
			if strings.HasPrefix(word, "/") && !added[word] {
				added[word] = true
				a.File(word[1:], read(t, word), 0o755)
			}
		}
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	return data
}
