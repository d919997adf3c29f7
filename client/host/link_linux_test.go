package host

import (
	"bufio"
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/problem"
)

// childEnv makes the test binary play a client that is killed, see TestKill.
const childEnv = "CULVERT_TEST_HOST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m)
}

// inNamespace moves the rest of the test into a fresh network namespace. The thread stays locked, and ends with the test.
func inNamespace(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		lab.Skip(t, "needs root, to make a network namespace: %v", err)
	}
	if _, err := os.Stat(tunPath); err != nil {
		lab.Skip(t, "needs the TUN driver: %v", err)
	}
	lo, err := netlink.LinkByName("lo")
	check(t, err)
	check(t, netlink.LinkSetUp(lo))
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, opts Options) *Interface {
	t.Helper()
	i, err := Open(opts)
	check(t, err)
	t.Cleanup(func() { _ = i.Close() })
	return i
}

// addLink makes an interface as a host has it: an Ethernet of its own with an address, ready to send.
func addLink(t *testing.T, name, cidr string) netlink.Link {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	check(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name + "-peer"}))
	addr, err := netlink.ParseAddr(cidr)
	check(t, err)
	addr.Flags = unix.IFA_F_NODAD
	for _, end := range []string{name + "-peer", name} {
		l, err := netlink.LinkByName(end)
		check(t, err)
		check(t, netlink.LinkSetIP6AddrGenMode(l, addrGenNone))
		if end == name {
			check(t, netlink.AddrAdd(l, addr))
		}
		check(t, netlink.LinkSetUp(l))
	}
	l, err := netlink.LinkByName(name)
	check(t, err)
	eventually(t, name+" has a carrier", func() bool {
		l, err := netlink.LinkByName(name)
		return err == nil && l.Attrs().OperState == netlink.OperUp
	})
	eventually(t, name+" has its address", func() bool {
		routes, err := netlink.RouteGet(addr.IP)
		return err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL
	})
	return l
}

// eventually asks until the kernel's own threads are done.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(40 * time.Second); !done(); {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

func addRoute(t *testing.T, l netlink.Link, dst, gateway string) {
	t.Helper()
	_, to, err := net.ParseCIDR(dst)
	check(t, err)
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: to, Gw: net.ParseIP(gateway)}
	if gateway == "" {
		r.Scope = netlink.SCOPE_LINK
	}
	check(t, netlink.RouteAdd(r))
}

// snapshot is all that this package could leave behind: links, addresses, routes of all tables, rules.
func snapshot(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	links, err := netlink.LinkList()
	check(t, err)
	for _, l := range links {
		fmt.Fprintln(&b, "link", l.Attrs().Name, l.Attrs().Flags&^net.FlagRunning)
		list, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		check(t, err)
		for _, a := range list {
			fmt.Fprintln(&b, "addr", l.Attrs().Name, a.IPNet)
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_TABLE)
		check(t, err)
		var lines []string
		for _, r := range routes {
			if r.Dst != nil && r.Dst.IP.IsMulticast() {
				continue // ff00::/8 comes with the carrier, whenever the kernel gets to it
			}
			lines = append(lines, fmt.Sprint("route ", r.Table, " ", r.LinkIndex, " ", r.Dst, " ", r.Gw, " ", r.Protocol, " ", r.Priority))
		}
		slices.Sort(lines)
		fmt.Fprintln(&b, strings.Join(lines, "\n"))
		rules, err := netlink.RuleList(family)
		check(t, err)
		fmt.Fprintln(&b, rules)
	}
	return b.String()
}

// via asks the kernel which interface an address goes through; "" if none.
func via(t *testing.T, addr string) string {
	t.Helper()
	routes, err := netlink.RouteGet(net.ParseIP(addr))
	if err != nil || len(routes) == 0 {
		return ""
	}
	l, err := netlink.LinkByIndex(routes[0].LinkIndex)
	check(t, err)
	return l.Attrs().Name
}

func wantVia(t *testing.T, name string, addrs ...string) {
	t.Helper()
	for _, addr := range addrs {
		if got := via(t, addr); got != name {
			t.Errorf("%s goes through %q, want %q", addr, got, name)
		}
	}
}

func TestOpenAndClose(t *testing.T) {
	inNamespace(t)
	if !Privileged() {
		t.Fatal("root in its own namespace is not privileged")
	}
	before := snapshot(t)
	first, second := open(t, Options{MTU: 1280}), open(t, Options{})
	if first.Name() != "culvert0" || second.Name() != "culvert1" {
		t.Errorf("names %q and %q", first.Name(), second.Name())
	}
	if mtu, err := first.Device().MTU(); err != nil || mtu != 1280 {
		t.Errorf("MTU %d, %v", mtu, err)
	}
	l, err := netlink.LinkByName("culvert0")
	check(t, err)
	if l.Attrs().Flags&net.FlagUp == 0 {
		t.Error("the interface is down")
	}
	check(t, first.Close())
	check(t, first.Close())
	third := open(t, Options{})
	if third.Name() != "culvert0" {
		t.Errorf("name %q", third.Name())
	}
	check(t, second.Device().Close())
	check(t, third.Close())
	if after := snapshot(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
	if err := third.SetAddresses(addrs("198.18.0.2")); problem.CodeOf(err) != problem.NotUp {
		t.Errorf("addresses on a closed interface: %v", err)
	}
	if _, err := third.SetRoutes(prefixes("10.0.0.0/8"), nil); problem.CodeOf(err) != problem.NotUp {
		t.Errorf("routes on a closed interface: %v", err)
	}
}

// TestCloseWithUnreadEvents floods the event channel, which has five places, before the device is closed.
func TestCloseWithUnreadEvents(t *testing.T) {
	inNamespace(t)
	i := open(t, Options{})
	l, err := netlink.LinkByName(i.Name())
	check(t, err)
	for mtu := 1300; mtu < 1320; mtu++ {
		check(t, netlink.LinkSetMTU(l, mtu))
	}
	check(t, i.Close())
	goleak.VerifyNone(t, goleak.IgnoreCurrent())
}

func TestOpenTakenName(t *testing.T) {
	inNamespace(t)
	addLink(t, "corp", "192.0.2.2/24")
	_, err := Open(Options{Name: "corp"})
	if problem.CodeOf(err) != problem.Usage {
		t.Errorf("got %v", err)
	}
	addLink(t, "culvert0", "192.0.2.3/24")
	if i := open(t, Options{}); i.Name() != "culvert1" {
		t.Errorf("name %q", i.Name())
	}
	if i := open(t, Options{Name: "corp-1"}); i.Name() != "corp-1" {
		t.Errorf("name %q", i.Name())
	}
	if _, err := Open(Options{Name: "corp-1"}); problem.CodeOf(err) != problem.Usage {
		t.Errorf("got %v", err)
	}
}

func TestSetAddresses(t *testing.T) {
	inNamespace(t)
	i := open(t, Options{})
	have := func() []string {
		l, err := netlink.LinkByName(i.Name())
		check(t, err)
		list, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		check(t, err)
		var all []string
		for _, a := range list {
			all = append(all, a.IPNet.String())
		}
		slices.Sort(all)
		return all
	}
	for _, step := range []struct {
		set  []netip.Addr
		want []string
	}{
		{addrs("198.18.0.2", "fd63:756c:7665:7274::c612:2"), []string{"198.18.0.2/32", "fd63:756c:7665:7274::c612:2/128"}},
		{addrs("198.18.0.2", "::ffff:198.18.0.3", "198.18.0.2"), []string{"198.18.0.2/32", "198.18.0.3/32"}},
		{nil, nil},
		{addrs("198.18.0.9"), []string{"198.18.0.9/32"}},
	} {
		check(t, i.SetAddresses(step.set))
		if got := have(); !slices.Equal(got, step.want) {
			t.Errorf("after %v: %v, want %v", step.set, got, step.want)
		}
		if len(i.Skipped()) != 0 {
			t.Errorf("skipped %v", i.Skipped())
		}
	}
}

func TestIPv6SwitchedOff(t *testing.T) {
	inNamespace(t)
	for _, conf := range []string{"all", "default"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+conf+"/disable_ipv6", []byte("1"), 0); err != nil {
			lab.Skip(t, "cannot switch IPv6 off: %v", err)
		}
	}
	var logged bytes.Buffer
	i := open(t, Options{Logger: slog.New(slog.NewTextHandler(&logged, nil))})
	check(t, i.SetAddresses(addrs("198.18.0.2", "fd63:756c:7665:7274::c612:2")))
	if got := i.Skipped(); !slices.Equal(got, addrs("fd63:756c:7665:7274::c612:2")) {
		t.Errorf("skipped %v", got)
	}
	left, err := i.SetRoutes(prefixes("10.0.0.0/8", "fd00:1::/64"), nil)
	if err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
	wantVia(t, i.Name(), "10.1.1.1")
	if text := logged.String(); !strings.Contains(text, "c612:2") || !strings.Contains(text, "routes=1") {
		t.Errorf("logged %q", text)
	}
}

// child opens an interface with everything on it, says so, and waits to be killed.
func child() {
	i, err := Open(Options{})
	if err == nil {
		err = i.SetAddresses([]netip.Addr{netip.MustParseAddr("198.18.0.2"), netip.MustParseAddr("fd63::2")})
	}
	if err == nil {
		_, err = i.SetRoutes([]netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("fd00:1::/64")},
			[]netip.Addr{netip.MustParseAddr("203.0.113.7")})
	}
	fmt.Println("ready", err)
	select {}
}

func TestKill(t *testing.T) {
	inNamespace(t)
	eth := addLink(t, "eth0", "192.0.2.2/24")
	addRoute(t, eth, "0.0.0.0/0", "192.0.2.1")
	before := snapshot(t)
	cmd := exec.Command("/proc/self/exe") // started from this thread, so in this namespace
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "ready <nil>\n" {
		t.Errorf("the child says %q, %v", line, err)
	}
	wantVia(t, "culvert0", "8.8.8.8", "fd00:1::1")
	wantVia(t, "eth0", "203.0.113.7", "192.0.2.9")
	check(t, cmd.Process.Kill())
	if err := cmd.Wait(); cmd.ProcessState.Sys().(interface{ Signaled() bool }).Signaled() == false {
		t.Errorf("the child was not killed: %v", err)
	}
	if after := snapshot(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
	wantVia(t, "eth0", "8.8.8.8")
}

func TestConcurrentUse(t *testing.T) {
	inNamespace(t)
	i := open(t, Options{})
	var wg sync.WaitGroup
	for n := range 4 {
		wg.Go(func() {
			for range 5 {
				_, err := i.SetRoutes(prefixes(fmt.Sprintf("10.%d.0.0/16", n)), nil)
				if err != nil && problem.CodeOf(err) != problem.NotUp {
					t.Error(err)
				}
				if err := i.SetAddresses(addrs(fmt.Sprintf("198.18.0.%d", n+2))); err != nil && problem.CodeOf(err) != problem.NotUp {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() { _ = i.Close() })
	wg.Wait()
}
