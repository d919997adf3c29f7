//go:build linux

package scale

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/lab/vm"
)

// kernelEnv names a folder with a kernel, its modules, and the program that is all of the machine's system; make power fills it.
const kernelEnv = "CULVERT_E2E_KERNEL"

const (
	diskSize = 256 << 20 // bytes
	guestAPI = 8080      // where the machine's own program is asked
	joinPort = 8088
)

// The machine's network.
var (
	hostEnd  = netip.MustParsePrefix("10.99.0.1/30")
	guestEnd = netip.MustParseAddr("10.99.0.2")
)

// plug is a coordinator with embedded state, or the nats-servers of one, in a virtual machine, and the plug to pull.
type plug struct {
	t       testing.TB
	host    *lab.Host // where jobs and gateways are played
	dir     string
	disk    *vm.Disk
	socket  string
	image   string // of the first file system
	console string
	machine *process
	node    *node       // as the generator sees it
	up      func() bool // what is in the machine answers
	random  *rand.Rand
}

// newPlug makes the machine and its disk.
func newPlug(t testing.TB) *plug {
	t.Helper()
	lab.Require(t)
	p := &plug{t: t, dir: t.TempDir()}
	p.socket, p.image, p.console = filepath.Join(p.dir, "disk.sock"), filepath.Join(p.dir, "initrd"), filepath.Join(p.dir, "console")
	seed := uint64(time.Now().UnixNano())
	p.random = rand.New(rand.NewPCG(seed, 0))
	t.Logf("which sectors are lost follows from %d", seed)
	net, err := lab.New(context.Background())
	p.must(err)
	t.Cleanup(func() {
		if err := net.Close(); err != nil {
			t.Error(err)
		}
	})
	p.host, err = net.Host("jobs", lab.HostOptions{})
	p.must(err)
	p.must(p.host.ServeGuest(hostEnd))
	p.makeDisk()
	return p
}

// embedded puts a coordinator with embedded state into the machine.
func (p *plug) embedded() {
	p.t.Helper()
	p.node = &node{t: p.t, host: p.host, addr: netip.AddrPortFrom(guestEnd, joinPort).String(), issuer: "http://" + freeAddr(p.t, p.host)}
	client := p.host.Client(5 * time.Second)
	p.up = func() bool {
		resp, err := client.Get(p.node.url() + "/readyz")
		if err != nil {
			return false
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	}
	p.packCoordinator()
}

func (p *plug) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// makeDisk makes a disk with an empty ext4.
func (p *plug) makeDisk() {
	p.t.Helper()
	file := filepath.Join(p.dir, "disk")
	f, err := os.Create(file)
	p.must(err)
	p.must(f.Truncate(diskSize))
	p.must(f.Close())
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		mkfs = "/sbin/mkfs.ext4"
	}
	out, err := exec.CommandContext(p.t.Context(), mkfs, "-q", file).CombinedOutput()
	if err != nil {
		p.t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	p.disk, err = vm.NewDisk(file, p.socket)
	p.must(err)
	p.t.Cleanup(func() {
		if err := p.disk.Close(); err != nil {
			p.t.Error(err)
		}
	})
}

// packCoordinator writes a first file system with the coordinator and its configuration.
func (p *plug) packCoordinator() {
	p.t.Helper()
	// The range is small, so that an address that is given while another session has it is met soon.
	config := fmt.Sprintf(`
url: %[1]s
listen: %[2]s
udp: off
probe: off
insecure_http: true
trusted_proxies: [%[3]s]
state: {dir: /disk/culvert}
audit: {max_size: 64MiB, log: off}
limits: {owner: 100000, repository: 100000, total: 100000}
issuers: [{url: %[4]q}]
networks: {load: {sessions: 10.64.0.0/22, gateways: [{issuer: %[4]q, subject: culvert-load}]}}
rules: [{name: load, network: load, match: {repository_owner_id: 1, repository_id: 2}, allow: ["tcp 10.20.0.5:5432"]}]
`, p.node.url(), p.node.addr, hostEnd.Masked(), p.node.issuer)
	var a vm.Archive
	a.File("bin/culvert-coordinator", p.read(binary()), 0o755)
	a.File("culvert.yaml", []byte(config), 0o600)
	a.File("begin", []byte("/bin/culvert-coordinator\nserve\n--config\n/culvert.yaml\n--log-level\nwarn\n"), 0o644)
	p.pack(&a)
}

func (p *plug) read(path string) []byte {
	p.t.Helper()
	data, err := os.ReadFile(path)
	p.must(err)
	return data
}

// pack writes the machine's first file system: what it is given, and the machine's own program and modules.
func (p *plug) pack(a *vm.Archive) {
	p.t.Helper()
	dir := os.Getenv(kernelEnv)
	a.File("init", p.read(filepath.Join(dir, "guest")), 0o755)
	p.must(a.Modules(dir, "virtio_pci", "virtio_net", "virtio_blk"))
	p.must(os.WriteFile(p.image, a.End(), 0o600))
}

// on boots the machine, which starts what it has by itself, and gives how long it takes until that is ready.
func (p *plug) on() time.Duration {
	p.t.Helper()
	kernel, err := vm.Kernel(os.Getenv(kernelEnv))
	p.must(err)
	began := time.Now()
	p.machine = start(p.t, p.host, p.console, nil, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "768", "-nographic", "-nodefaults", "-no-reboot", "-serial", "stdio",
		"-kernel", kernel, "-initrd", p.image,
		"-append", fmt.Sprintf("console=ttyS0 quiet panic=-1 reboot=t guest.addr=%s/%d guest.via=%s guest.disk=/dev/vda:/disk", guestEnd, hostEnd.Bits(), hostEnd.Addr()),
		"-blockdev", "driver=nbd,node-name=disk,server.type=unix,server.path="+p.socket, "-device", "virtio-blk-pci,drive=disk",
		"-netdev", "tap,id=n0,ifname="+lab.TapDevice+",script=no,downscript=no", "-device", "virtio-net-pci,netdev=n0,romfile=")
	for deadline := began.Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		select {
		case <-p.machine.Done():
			p.t.Fatalf("the machine has ended:\n%s", tail(p.console))
		default:
		}
		if p.up() {
			return time.Since(began)
		}
	}
	p.t.Fatalf("what is in the machine is never ready:\n%s", tail(p.console))
	return 0
}

// off pulls the plug: the machine dies at once, with what its kernel has not written, and the disk loses what it was not told to make safe.
func (p *plug) off() {
	p.t.Helper()
	p.machine.kill()
	kept, lost, err := p.disk.PowerLoss(p.random)
	p.must(err)
	p.t.Logf("of the sectors that were written and not flushed, %d were kept and %d lost; %d flushes so far", kept, lost, p.disk.Flushes())
}

// run runs the coordinator's program in the machine.
func (p *plug) run(args ...string) (out []byte) {
	p.t.Helper()
	body, err := json.Marshal(map[string]any{"Path": "/bin/culvert-coordinator", "Args": append(args, "--config", "/culvert.yaml"), "Env": []string{"PATH=/bin"}})
	p.must(err)
	resp, err := p.host.Client(2*time.Minute).Post(fmt.Sprintf("http://%s/run", netip.AddrPortFrom(guestEnd, guestAPI)), "application/json", bytes.NewReader(body))
	p.must(err)
	defer resp.Body.Close()
	var r struct {
		Code           int
		Stdout, Stderr string
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, 256<<20))
	p.must(err)
	if err := json.Unmarshal(text, &r); err != nil || r.Code != 0 {
		p.t.Fatalf("%s: exit code %d, %v\n%s\n%s", args, r.Code, err, r.Stdout[max(0, len(r.Stdout)-4000):], r.Stderr)
	}
	return []byte(r.Stdout)
}

// check wants every join that was acknowledged on record, and the log whole.
func (p *plug) check(acknowledged []string) {
	p.t.Helper()
	recorded := joinsIn(p.t, p.run("audit", "export"))
	for _, id := range acknowledged {
		if !recorded[id] {
			p.t.Errorf("the join of %s was acknowledged and is not on record", id)
		}
	}
	p.run("audit", "verify")
}

// TestPowerLoss pulls the plug of a coordinator with embedded state, again and again, while jobs join and renew: it comes back by itself, no
// acknowledged record is missing and the log verifies, no address is given twice, and sessions live on.
func TestPowerLoss(t *testing.T) {
	if os.Getenv(kernelEnv) == "" {
		t.Skip("make power runs this")
	}
	times := 5
	if n, err := strconv.Atoi(os.Getenv("CULVERT_E2E_KILLS")); err == nil {
		times = n
	}
	p := newPlug(t)
	p.embedded()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the machine's console:\n%s", tail(p.console))
		}
	})
	t.Logf("ready %s after power came", p.on().Round(100*time.Millisecond))
	file := filepath.Join(p.dir, "ids")
	var g *generator
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the generator says:\n%s", g.log.String()[max(0, g.log.Len()-4000):])
		}
	})
	g = play(t, p.host, []*node{p.node}, "", "--gateways", "4", "--sessions", "20", "--rate", "2", "--duration", "20m", "--renew-every", "20s",
		"--retry", "--timeout", "90s", "--ids", file)
	tr := &trial{cluster: &cluster{t: t}, file: file}
	tr.goOn(21)
	for range times {
		tr.goOn(20 + p.random.IntN(30))
		p.off()
		data, err := os.ReadFile(file)
		p.must(err)
		acknowledged := strings.Fields(string(data))
		took := p.on()
		p.check(acknowledged)
		gap := tr.goOn(10)
		t.Logf("ready %s after power came back; %d joins were acknowledged before, and all are on record; then none for %s", took.Round(100*time.Millisecond), len(acknowledged), gap.Round(time.Millisecond))
	}
	_ = g.proc.Signal(syscall.SIGINT)
	r := g.report()
	r.clean(t)
	ph := r.Phases[len(r.Phases)-1]
	t.Logf("%d joins, p50 %.0f ms, p99 %.0f ms, longest gap %.0f ms, %d renewals, %d sessions", ph.Joins, ph.P50, ph.P99, ph.Gap, r.Renewals, r.Sessions)
	if r.Renewals == 0 {
		t.Error("nothing was renewed")
	}
}
