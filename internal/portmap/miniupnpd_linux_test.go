package portmap

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvertnet/culvert/internal/lab"
)

// long bounds a wait for something that a busy machine may be slow to do.
const long = 30 * time.Second

// external is what the router declares as its address. Miniupnpd takes none of the lab's, which are documentation's.
var external = netip.MustParseAddr("11.22.33.44")

// childEnv names the protocols that this test binary keeps a mapping with, when it runs as a gateway of the lab.
const childEnv = "PORTMAP_TEST_CHILD"

// child is a gateway: it keeps a mapping until its input ends, writes each candidate as a line, and answers knocks.
func child(protocols string) int {
	conn, err := net.ListenPacket("udp4", ":0")
	if err != nil {
		return complain(err)
	}
	go func() {
		buf := make([]byte, 64)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(append([]byte("from inside: "), buf[:n]...), from)
		}
	}()
	port := uint16(conn.LocalAddr().(*net.UDPAddr).Port)
	if fixed, err := strconv.ParseUint(os.Getenv("PORTMAP_TEST_PORT"), 10, 16); err == nil {
		port = uint16(fixed)
	}
	var m *Manager
	// Again at once: the router may not have been up yet when it was asked first.
	m, err = New(Options{
		Port: port, Check: time.Second, Retry: time.Second, Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})),
		OnChange: func() {
			c, _ := m.Candidate()
			_ = json.NewEncoder(os.Stdout).Encode(c)
		},
	})
	if err != nil {
		return complain(err)
	}
	m.discover = only(protocols)
	ctx, stop := context.WithCancel(context.Background())
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); stop() }()
	m.Run(ctx)
	return 0
}

func complain(err error) int {
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// only leaves out what the router speaks besides.
func only(protocols string) func(context.Context, netip.Addr, netip.Addr) []method {
	return func(ctx context.Context, router, self netip.Addr) (out []method) {
		for _, m := range discover(ctx, router, self) {
			if strings.Contains(protocols, m.name()) {
				out = append(out, m)
			}
		}
		return out
	}
}

// home is a router with miniupnpd and two hosts behind it.
type home struct {
	*testing.T
	net      *lab.Net
	router   *lab.Host
	boxes    [2]*lab.Host
	stranger *lab.Host
	config   string
	daemon   *lab.Process
}

func newHome(t *testing.T) *home {
	t.Helper()
	lab.Require(t)
	if _, err := findDaemon(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("miniupnpd is missing, and CI must not skip: %v", err)
		}
		t.Skipf("miniupnpd is missing (Debian: apt-get install miniupnpd-nftables): %v", err)
	}
	n, err := lab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	h := &home{T: t, net: n}
	t.Cleanup(func() { _ = n.Close() })
	for name, to := range map[string]**lab.Host{"router": &h.router, "box-0": &h.boxes[0], "box-1": &h.boxes[1], "stranger": &h.stranger} {
		if *to, err = n.Host(name, lab.HostOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range h.boxes {
		h.connect(i)
	}
	h.check(h.router.Forward())
	h.check(h.router.Do(masquerade))
	h.configure()
	h.startDaemon()
	return h
}

// findDaemon looks where ordinary users do not, too.
func findDaemon() (string, error) {
	path, err := exec.LookPath("miniupnpd")
	if err != nil {
		return exec.LookPath("/usr/sbin/miniupnpd")
	}
	return path, nil
}

func (h *home) check(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

// connect moves a box from the internet to behind the router, on a subnet of its own.
func (h *home) connect(i int) {
	h.Helper()
	var ns *os.File
	inside, outside := fmt.Sprintf("192.168.%d.10/24", 70+i), fmt.Sprintf("192.168.%d.1/24", 70+i)
	h.check(h.boxes[i].Do(func() (err error) {
		if ns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkDel(eth0)
	}))
	defer ns.Close()
	h.check(h.router.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = fmt.Sprint("lan", i)
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(ns.Fd()))}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return bringUp(attrs.Name, outside)
	}))
	h.check(h.boxes[i].Do(func() error {
		if err := bringUp("eth0", inside); err != nil {
			return err
		}
		via := netip.MustParsePrefix(outside).Addr()
		return netlink.RouteAdd(&netlink.Route{Gw: via.AsSlice()})
	}))
}

func bringUp(name, prefix string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(prefix)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

var table = &nftables.Table{Name: "filter", Family: nftables.TableFamilyINet}

// masquerade makes the chains that miniupnpd fills (its nft_init.sh), and the router a NAT that drops strangers.
func masquerade() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	c.AddTable(table)
	accept := nftables.ChainPolicyAccept
	for _, ch := range []struct {
		name string
		kind nftables.ChainType
		hook *nftables.ChainHook
		prio *nftables.ChainPriority
		jump string
	}{
		{"forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, "miniupnpd"},
		{"prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, "prerouting_miniupnpd"},
		{"postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, "postrouting_miniupnpd"},
	} {
		c.AddChain(&nftables.Chain{Table: table, Name: ch.jump})
		base := c.AddChain(&nftables.Chain{Table: table, Name: ch.name, Type: ch.kind, Hooknum: ch.hook, Priority: ch.prio, Policy: &accept})
		c.AddRule(&nftables.Rule{Table: table, Chain: base, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: ch.jump}}})
		if ch.name == "postrouting" {
			c.AddRule(&nftables.Rule{Table: table, Chain: base, Exprs: append(interfaceIs(expr.MetaKeyOIFNAME), &expr.Masq{})})
		}
		if ch.name == "forward" {
			isNew := []expr.Any{
				&expr.Ct{Register: 1, Key: expr.CtKeySTATE},
				&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitNEW), Xor: make([]byte, 4)},
				&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
				&expr.Verdict{Kind: expr.VerdictDrop},
			}
			c.AddRule(&nftables.Rule{Table: table, Chain: base, Exprs: append(interfaceIs(expr.MetaKeyIIFNAME), isNew...)})
		}
	}
	return c.Flush()
}

func interfaceIs(key expr.MetaKey) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, "eth0")
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name}}
}

// mapped lists the rules that miniupnpd has made.
func (h *home) mapped() int {
	h.Helper()
	n := 0
	h.check(h.router.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		rules, err := c.GetRules(table, &nftables.Chain{Table: table, Name: "prerouting_miniupnpd"})
		n = len(rules)
		return err
	}))
	return n
}

func (h *home) configure() {
	h.Helper()
	h.config = filepath.Join(h.TempDir(), "miniupnpd.conf")
	h.check(os.WriteFile(h.config, []byte(fmt.Sprintf(`ext_ifname=eth0
ext_ip=%s
listening_ip=lan0
listening_ip=lan1
ipv6_disable=yes
enable_natpmp=yes
enable_upnp=yes
secure_mode=yes
system_uptime=no
min_lifetime=120
uuid=5e9b6246-f0d7-4a12-b61c-da064fc8c1ac
allow 1024-65535 192.168.0.0/16 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
`, external)), 0o600))
}

func (h *home) startDaemon() {
	h.Helper()
	path, err := findDaemon()
	h.check(err)
	log, err := os.Create(filepath.Join(h.TempDir(), "log"))
	h.check(err)
	h.Cleanup(func() {
		if h.Failed() {
			text, _ := os.ReadFile(log.Name())
			h.Logf("miniupnpd:\n%s", text)
		}
		_ = log.Close()
	})
	h.daemon, err = h.router.Start(lab.Program{
		Path: path, Args: []string{"-d", "-f", h.config, "-P", filepath.Join(h.TempDir(), "pid")}, Stdout: log, Stderr: log,
	})
	h.check(err)
}

// restart is a router that loses power: the daemon dies without a word, and every mapping with it.
func (h *home) restart() {
	h.Helper()
	h.daemon.Kill()
	<-h.daemon.Done()
	h.check(h.router.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		for _, chain := range []string{"miniupnpd", "prerouting_miniupnpd", "postrouting_miniupnpd"} {
			c.FlushChain(&nftables.Chain{Table: table, Name: chain})
		}
		return c.Flush()
	}))
	h.startDaemon()
}

// keeper is a child on a box.
type keeper struct {
	*home
	process *lab.Process
	stdin   io.Closer
	lines   chan string
}

// keep starts a child. With port 0 it maps a port of its own.
func (h *home) keep(box int, protocols string, port uint16) *keeper {
	h.Helper()
	in, stdin := io.Pipe()
	stdout, out := io.Pipe()
	log, err := os.Create(filepath.Join(h.TempDir(), "child.log"))
	h.check(err)
	env := append(os.Environ(), childEnv+"="+protocols)
	if port != 0 {
		env = append(env, "PORTMAP_TEST_PORT="+strconv.Itoa(int(port)))
	}
	process, err := h.boxes[box].Start(lab.Program{Path: "/proc/self/exe", Env: env, Stdin: in, Stdout: out, Stderr: log})
	h.check(err)
	k := &keeper{home: h, process: process, stdin: stdin, lines: make(chan string, 64)}
	go func() {
		defer close(k.lines)
		for s := bufio.NewScanner(stdout); s.Scan(); {
			k.lines <- s.Text()
		}
	}()
	h.Cleanup(func() {
		process.Kill()
		_, _ = stdin.Close(), out.Close() // it is not done before what copies to it is
		<-process.Done()
		for range k.lines {
		}
		if h.Failed() {
			text, _ := os.ReadFile(log.Name())
			h.Logf("child on box %d:\n%s", box, text)
		}
		_ = log.Close()
	})
	return k
}

// candidate waits for the child's next mapped address.
func (k *keeper) candidate() netip.AddrPort {
	k.Helper()
	select {
	case line := <-k.lines:
		var c struct{ Addr netip.AddrPort }
		k.check(json.Unmarshal([]byte(line), &c))
		return c.Addr
	case <-time.After(long):
		k.Fatal("no mapping")
	}
	return netip.AddrPort{}
}

// knock reports what a stranger hears who sends to the router.
func (h *home) knock(port uint16) string {
	h.Helper()
	conn, err := h.stranger.ListenPacket(":0")
	h.check(err)
	defer conn.Close()
	buf := make([]byte, 64)
	for deadline := time.Now().Add(long); time.Now().Before(deadline); {
		_, err := conn.WriteTo([]byte("knock"), net.UDPAddrFromAddrPort(netip.AddrPortFrom(h.router.Addr(), port)))
		h.check(err)
		_ = conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if n, _, err := conn.ReadFrom(buf); err == nil {
			return string(buf[:n])
		}
	}
	return ""
}

func (h *home) until(what string, ok func() bool) {
	h.Helper()
	for deadline := time.Now().Add(long); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.Fatalf("not so in %v: %s", long, what)
		}
	}
}

// stop ends the child as a gateway ends, and waits.
func (k *keeper) stop() {
	k.Helper()
	_ = k.stdin.Close()
	ctx, cancel := context.WithTimeout(k.Context(), long)
	defer cancel()
	if code, err := k.process.Wait(ctx); err != nil || code != 0 {
		k.Fatalf("the child ended with %d, %v", code, err)
	}
}

func TestMiniupnpd(t *testing.T) {
	for _, protocol := range []string{"PCP", "NAT-PMP", "UPnP"} {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel() // they mostly wait
			h := newHome(t)
			k := h.keep(0, protocol, 0)
			at := k.candidate()
			if at.Addr() != external {
				t.Fatalf("mapped %s, want an address at %s", at, external)
			}
			if got := h.knock(at.Port()); got != "from inside: knock" {
				t.Errorf("a stranger hears %q", got)
			}
			h.restart()
			if n := h.mapped(); n != 0 {
				t.Fatalf("%d rules after a restart", n)
			}
			h.until("the mapping is made again after the router's restart", func() bool { return h.mapped() == 1 })
			if got := h.knock(at.Port()); got != "from inside: knock" {
				t.Errorf("a stranger hears %q after a restart of the router", got)
			}
			k.stop()
			if n := h.mapped(); n != 0 {
				t.Errorf("%d rules are left behind", n)
			}
		})
	}
}

// Two gateways behind one router want the same port: the second gets another, and the first keeps its own.
func TestMiniupnpdNeighbours(t *testing.T) {
	for _, protocol := range []string{"PCP", "NAT-PMP", "UPnP"} {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel() // they mostly wait
			h := newHome(t)
			const port = 51820
			first := h.keep(0, protocol, port)
			a := first.candidate()
			second := h.keep(1, protocol, port)
			b := second.candidate()
			if a.Port() != port || b.Port() == port || !b.IsValid() {
				t.Errorf("mapped %s and %s", a, b)
			}
			second.stop()
			if n := h.mapped(); n != 1 {
				t.Errorf("%d rules after one of two is gone", n)
			}
			first.stop()
			if n := h.mapped(); n != 0 {
				t.Errorf("%d rules are left behind", n)
			}
		})
	}
}
