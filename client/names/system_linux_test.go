package names

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/wire"
)

// The test binary runs again in namespaces of its own, and once more as a client that is killed.
const (
	isolatedEnv = "CULVERT_TEST_NAMES_ISOLATED"
	childEnv    = "CULVERT_TEST_NAMES_CHILD"
)

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(childEnv) != "":
		child()
	case os.Getenv(isolatedEnv) != "":
		if lo, err := netlink.LinkByName("lo"); err != nil || netlink.LinkSetUp(lo) != nil {
			fmt.Fprintln(os.Stderr, "cannot bring up loopback")
			os.Exit(1)
		}
		goleak.VerifyTestMain(m)
	case os.Geteuid() != 0:
		goleak.VerifyTestMain(m)
	default:
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		cmd.Env = append(os.Environ(), isolatedEnv+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		runtime.LockOSThread() // Pdeathsig is this thread's end
		_ = cmd.Run()
		os.Exit(cmd.ProcessState.ExitCode())
	}
}

// namespace is another host: a thread in a network namespace of its own.
type namespace struct {
	fd  int
	run chan func()
}

func newNamespace(t *testing.T) *namespace {
	t.Helper()
	n := &namespace{run: make(chan func())}
	ready, done := make(chan error), make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlock: the thread ends with its namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			n.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		ready <- err
		for f := range n.run {
			f()
		}
	}()
	check(t, <-ready)
	t.Cleanup(func() {
		close(n.run)
		<-done
		_ = unix.Close(n.fd)
	})
	return n
}

// do runs f on that host.
func (n *namespace) do(f func()) {
	done := make(chan struct{})
	n.run <- func() { defer close(done); f() }
	<-done
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func up(t *testing.T, name, addr string) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	check(t, err)
	if addr != "" {
		parsed, err := netlink.ParseAddr(addr)
		check(t, err)
		check(t, netlink.AddrAdd(link, parsed))
	}
	check(t, netlink.LinkSetUp(link))
}

// machine is a runner with a tunnel, a cloud and a container:
//
//	container 172.17.0.2 ── br0 │ eth0 192.0.2.2 ── 192.0.2.53 the cloud's DNS server
//	                            │ culvert0 198.18.0.2 ── 198.18.0.1 the gateway's
type machine struct {
	gateway, system *server
	container       *namespace
	cloud           *namespace
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	if os.Getenv(isolatedEnv) == "" {
		lab.Skip(t, "needs root, for namespaces of its own")
	}
	m := &machine{container: newNamespace(t), cloud: newNamespace(t)}
	forget(t)
	veth := func(name, addr string, peer *namespace, peerAddr string) {
		link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "p", PeerNamespace: netlink.NsFd(peer.fd)}
		check(t, netlink.LinkAdd(link))
		t.Cleanup(func() { _ = netlink.LinkDel(link) })
		peer.do(func() { up(t, "lo", ""); up(t, name+"p", peerAddr) })
		up(t, name, addr)
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	check(t, netlink.LinkAdd(bridge))
	t.Cleanup(func() { _ = netlink.LinkDel(bridge) })
	up(t, "br0", "172.17.0.1/16")
	veth("eth0", "192.0.2.2/24", m.cloud, "192.0.2.53/24")
	veth("culvert0", "198.18.0.2/24", m.cloud, "198.18.0.1/24")
	veth("c0", "", m.container, "172.17.0.2/16")
	port, err := netlink.LinkByName("c0")
	check(t, err)
	check(t, netlink.LinkSetMaster(port, bridge))
	m.container.do(func() {
		check(t, netlink.RouteAdd(&netlink.Route{Gw: net.IPv4(172, 17, 0, 1)}))
	})
	m.cloud.do(func() {
		m.gateway = newServer(t, "198.18.0.1:53", "198.19.0.7")
		m.system = newServer(t, "192.0.2.53:53", "192.0.2.80")
		check(t, netlink.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: net.IPv4(172, 17, 0, 0).To4(), Mask: net.CIDRMask(16, 32)}, Gw: net.IPv4(192, 0, 2, 2)}))
	})
	check(t, os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o600))
	file := filepath.Join(t.TempDir(), "resolv.conf")
	check(t, os.WriteFile(file, []byte("nameserver 192.0.2.53\n"), 0o600))
	old := resolverFiles
	resolverFiles = []string{file}
	t.Cleanup(func() { resolverFiles = old })
	return m
}

// forget has connection tracking forget where queries from some port went before: a forwarder that is gone, and the port may be used again.
func forget(t *testing.T) {
	t.Helper()
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		t.Logf("connection tracking keeps what it knows: %v", err)
	}
}

// ask resolves a name as a program does that knows a server, from a host (nil: the runner itself).
func ask(t *testing.T, from *namespace, network, server, name string) string {
	t.Helper()
	var conn net.Conn
	dial := func() {
		var err error
		conn, err = net.DialTimeout(network, server, 20*time.Second)
		check(t, err)
	}
	if from == nil {
		dial()
	} else {
		from.do(dial)
	}
	defer conn.Close()
	r := &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}
	got, err := r.LookupNetIP(t.Context(), "ip4", name)
	if err != nil || len(got) == 0 {
		return fmt.Sprint(err)
	}
	return got[0].Unmap().String()
}

const (
	cloudDNS = "192.0.2.53:53"
	inTunnel = "198.19.0.7"
	outside  = "192.0.2.80"
)

func start(t *testing.T) *Split {
	t.Helper()
	s, err := Start(t.Context(), Options{Interface: "culvert0", Names: testNames})
	check(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestRedirectSplitsForHostAndContainers(t *testing.T) {
	m := newMachine(t)
	if got := ask(t, m.container, "udp", cloudDNS, "db.internal."); got != outside {
		t.Fatalf("before: %s", got)
	}
	s := start(t)
	if got := s.Methods(); !slices.Equal(got, []string{"nftables"}) {
		t.Fatalf("methods %v", got)
	}
	for where, from := range map[string]*namespace{"host": nil, "container": m.container} {
		for _, network := range []string{"udp", "tcp"} {
			for name, want := range map[string]string{"db.internal.": inTunnel, "x.svc.corp.": inTunnel, "github.com.": outside} {
				if got := ask(t, from, network, cloudDNS, name); got != want {
					t.Errorf("%s, %s: %s resolves to %s", where, network, name, got)
				}
			}
		}
	}
	if m.gateway.saw("github.com.") {
		t.Error("GitHub's names go into the tunnel")
	}
	if got := ask(t, nil, "udp", "198.18.0.1:53", "db.internal."); got != inTunnel {
		t.Errorf("who asks the gateway itself gets %s", got)
	}
	check(t, s.Close())
	forget(t)
	for _, from := range []*namespace{nil, m.container} {
		if got := ask(t, from, "udp", cloudDNS, "db.internal."); got != outside {
			t.Errorf("after: %s", got)
		}
	}
}

// The forwarder's port is nobody's DNS server: whoever was not redirected gets no answer.
func TestForwarderServesRedirectedQueriesOnly(t *testing.T) {
	m := newMachine(t)
	s := start(t)
	port := s.mechanisms[0].(*redirect).forwarders[0].port()
	query := []byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x02db\x08internal\x00\x00\x01\x00\x01")
	for name, from := range map[string]*namespace{"192.0.2.2": m.cloud, "172.17.0.1": m.container} {
		var conn net.Conn
		from.do(func() {
			var err error
			conn, err = net.Dial("udp", net.JoinHostPort(name, itoa(port)))
			check(t, err)
		})
		defer conn.Close()
		_, err := conn.Write(query)
		check(t, err)
		check(t, conn.SetReadDeadline(time.Now().Add(300*time.Millisecond)))
		if n, err := conn.Read(make([]byte, 512)); err == nil {
			t.Errorf("%s answers a stranger with %d bytes", name, n)
		}
	}
	if m.gateway.saw("db.internal.") {
		t.Error("a stranger's query went into the tunnel")
	}
}

// second adds the tunnel of another network, culvert1, whose gateway has the same address as the first one's and other names.
func (m *machine) second(t *testing.T) (gateway *server, names wire.Names) {
	t.Helper()
	other := newNamespace(t)
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "culvert1"}, PeerName: "culvert1p", PeerNamespace: netlink.NsFd(other.fd)}
	check(t, netlink.LinkAdd(link))
	t.Cleanup(func() { _ = netlink.LinkDel(link) })
	other.do(func() { up(t, "lo", ""); up(t, "culvert1p", "198.18.0.1/24") })
	up(t, "culvert1", "198.18.0.3/24")
	other.do(func() { gateway = newServer(t, "198.18.0.1:53", "198.19.0.9") })
	names = testNames
	names.Exact, names.Suffixes = []string{"wiki.lab"}, nil
	return gateway, names
}

// Two networks at once, whose gateways have the same address: on the host and in containers each name goes to the gateway that grants it,
// all others to the system's own servers, and the end of one is not the end of the other.
func TestTwoNetworks(t *testing.T) {
	for _, resolved := range []bool{false, true} {
		t.Run(fmt.Sprintf("resolved %v", resolved), func(t *testing.T) {
			m := newMachine(t)
			gateway, names := m.second(t) // before systemd-resolved, which else has to hear of the link first
			server := cloudDNS
			if resolved {
				runResolved(t)
				server = "127.0.0.53:53"
			}
			first := start(t)
			second, err := Start(t.Context(), Options{Interface: "culvert1", Names: names})
			check(t, err)
			t.Cleanup(func() { _ = second.Close() })
			all := map[string]string{"db.internal.": inTunnel, "wiki.lab.": "198.19.0.9", "github.com.": outside}
			for name, want := range all {
				if got := ask(t, nil, "udp", server, name); got != want {
					t.Errorf("on the host %s resolves to %s", name, got)
				}
				for _, network := range []string{"udp", "tcp"} {
					if got := ask(t, m.container, network, cloudDNS, name); got != want {
						t.Errorf("in a container, by %s, %s resolves to %s", network, name, got)
					}
				}
			}
			if m.gateway.saw("wiki.lab.") || gateway.saw("db.internal.") || gateway.saw("github.com.") || m.gateway.saw("github.com.") {
				t.Error("names went to the wrong gateway")
			}
			check(t, first.Close())
			forget(t)
			for name, want := range map[string]string{"db.internal.": outside, "wiki.lab.": "198.19.0.9"} {
				if got := ask(t, m.container, "udp", cloudDNS, name); got != want {
					t.Errorf("after the end of the first %s resolves to %s", name, got)
				}
			}
		})
	}
}

// Tunnels that belong to different users: a forwarder's queries pass the other user's table untouched, what is anybody's does not.
func TestMarksTellUsersApart(t *testing.T) {
	for _, c := range []struct {
		name          string
		first, second Options
		want          string // of the first network's name, for who asks the second's forwarder
	}{
		{"one user", Options{User: 3001}, Options{User: 3001}, inTunnel},
		{"two users", Options{User: 3001}, Options{User: 3002}, outside},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t)
			_, names := m.second(t)
			c.first.Interface, c.first.Names = "culvert0", testNames
			c.second.Interface, c.second.Names = "culvert1", names
			for _, opts := range []Options{c.first, c.second} {
				s, err := Start(t.Context(), opts)
				check(t, err)
				t.Cleanup(func() { _ = s.Close() })
				if opts.Interface == "culvert0" {
					continue
				}
				f := s.mechanisms[0].(*redirect).forwarders[1]
				query := []byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x02db\x08internal\x00\x00\x01\x00\x01")
				if got := netip.AddrFrom4([4]byte(lastOf(f.answer("udp", query), 4))).String(); got != c.want {
					t.Errorf("db.internal leads to %s", got)
				}
			}
			for name, want := range map[string]string{"db.internal.": inTunnel, "wiki.lab.": "198.19.0.9"} { // root and containers have both
				for _, from := range []*namespace{nil, m.container} {
					if got := ask(t, from, "udp", cloudDNS, name); got != want {
						t.Errorf("%s resolves to %s", name, got)
					}
				}
			}
		})
	}
}

func lastOf(b []byte, n int) []byte { return b[max(len(b)-n, 0):] }

// child starts a split, says so and waits to be killed.
func child() {
	resolverFiles = []string{os.Getenv(childEnv)}
	if _, err := Start(context.Background(), Options{Interface: "culvert0", Names: testNames}); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("up")
	select {}
}

func TestKilledClientLeavesNothing(t *testing.T) {
	m := newMachine(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+resolverFiles[0])
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "up\n" {
		t.Fatalf("the child says %q, %v", line, err)
	}
	if got := ask(t, m.container, "udp", cloudDNS, "db.internal."); got != inTunnel {
		t.Errorf("while it lives: %s", got)
	}
	check(t, cmd.Process.Kill())
	_ = cmd.Wait()
	for _, from := range []*namespace{nil, m.container} {
		if got := ask(t, from, "udp", cloudDNS, "db.internal."); got != outside {
			t.Errorf("after it was killed: %s", got)
		}
	}
}

// With the real systemd-resolved: the host's queries stay with it, granted names go into the tunnel, all others do not.
func TestSystemdResolved(t *testing.T) {
	m := newMachine(t)
	runResolved(t)
	s := start(t)
	if got := s.Methods(); !slices.Equal(got, []string{"systemd-resolved", "nftables"}) {
		t.Fatalf("methods %v", got)
	}
	for name, want := range map[string]string{"db.internal.": inTunnel, "x.svc.corp.": inTunnel, "github.com.": outside} {
		if got := ask(t, nil, "udp", "127.0.0.53:53", name); got != want {
			t.Errorf("%s resolves to %s", name, got)
		}
	}
	if got := ask(t, m.container, "udp", cloudDNS, "db.internal."); got != inTunnel {
		t.Errorf("a container gets %s", got)
	}
	if m.gateway.saw("github.com.") || m.system.saw("db.internal.") {
		t.Error("names went the wrong way")
	}
	if got := ask(t, nil, "udp", cloudDNS, "db.internal."); got != outside {
		t.Errorf("the host's own queries are redirected, too: %s", got)
	}
	check(t, s.Close())
	if got := ask(t, nil, "udp", "127.0.0.53:53", "x.svc.corp."); got == inTunnel {
		t.Error("granted names still resolve after the end")
	}
}

// runResolved starts a bus and systemd-resolved on it, with eth0's server for all names.
func runResolved(t *testing.T) {
	t.Helper()
	program := "/lib/systemd/systemd-resolved"
	if other := os.Getenv("CULVERT_TEST_RESOLVED"); other != "" {
		program = other
	}
	if _, err := os.Stat(program); err != nil {
		lab.Skip(t, "needs systemd-resolved (Debian: its package unpacked, and its path in CULVERT_TEST_RESOLVED)")
	}
	bus, err := exec.LookPath("dbus-daemon")
	if err != nil {
		lab.Skip(t, "needs dbus-daemon")
	}
	dir := t.TempDir()
	check(t, os.Chmod(dir, 0o755))
	check(t, os.Chmod(filepath.Dir(dir), 0o755))
	private(t, dir)
	address := "unix:path=" + filepath.Join(dir, "bus")
	config := filepath.Join(dir, "bus.conf")
	check(t, os.WriteFile(config, []byte(`<busconfig><type>system</type><listen>`+address+`</listen><policy context="default"><allow user="*"/><allow own="*"/>`+
		`<allow send_type="method_call"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>`), 0o644))
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
	background(t, bus, "--config-file="+config, "--nofork", "--nosyslog")
	eventually(t, "the bus", func() bool { _, err := os.Stat(filepath.Join(dir, "bus")); return err == nil })
	background(t, program)
	link, err := net.InterfaceByName("eth0")
	check(t, err)
	s, _ := newScope(testNames, nil)
	s.servers = []netip.Addr{netip.MustParseAddr("192.0.2.53")}
	s.exact, s.suffixes = nil, nil
	eventually(t, "systemd-resolved", func() bool {
		m, err := startResolved(t.Context(), Options{Interface: "eth0"}, s, nil)
		if err != nil {
			return false
		}
		r := m.(*resolved)
		err = r.call(t.Context(), "SetLinkDefaultRoute", int32(link.Index), true)
		return err == nil && r.conn.Close() == nil
	})
}

// private gives this test binary's own mount namespace what systemd-resolved wants: a /run of its own and a user.
func private(t *testing.T, dir string) {
	t.Helper()
	check(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	check(t, unix.Mount("none", "/run", "tmpfs", 0, ""))
	t.Cleanup(func() { _ = unix.Unmount("/run", unix.MNT_DETACH) })
	check(t, os.MkdirAll("/run/systemd", 0o755))
	for _, name := range []string{"passwd", "group"} {
		data, err := os.ReadFile("/etc/" + name)
		check(t, err)
		if !strings.Contains(string(data), "\nsystemd-resolve:") {
			data = append(data, map[string]string{"passwd": "systemd-resolve:x:64995:64995::/:/usr/sbin/nologin\n", "group": "systemd-resolve:x:64995:\n"}[name]...)
		}
		file := filepath.Join(dir, name)
		check(t, os.WriteFile(file, data, 0o644))
		check(t, unix.Mount(file, "/etc/"+name, "", unix.MS_BIND, ""))
		t.Cleanup(func() { _ = unix.Unmount("/etc/"+name, unix.MNT_DETACH) })
	}
}

func background(t *testing.T, program string, args ...string) {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "SYSTEMD_LOG_TARGET=console")
	check(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		_ = cmd.Wait()
	})
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within half a minute", what)
		}
		time.Sleep(10 * time.Millisecond) // another program's start cannot be faked
	}
}
