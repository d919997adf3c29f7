package host

import (
	"bytes"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// installed lists what SetRoutes has put into the kernel.
func installed(t *testing.T, i *Interface) []netip.Prefix {
	t.Helper()
	i.link.mu.Lock()
	defer i.link.mu.Unlock()
	now, err := i.link.routes()
	check(t, err)
	var all []netip.Prefix
	for p := range now.ours {
		all = append(all, p)
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	return all
}

func setRoutes(t *testing.T, i *Interface, want []netip.Prefix, keep []netip.Addr) []netip.Prefix {
	t.Helper()
	left, err := i.SetRoutes(want, keep)
	check(t, err)
	return prefixesIn(left)
}

func TestSetRoutes(t *testing.T) {
	inNamespace(t)
	eth := addLink(t, "eth0", "10.1.0.4/16")
	addRoute(t, eth, "0.0.0.0/0", "10.1.0.1")
	addLink(t, "docker0", "172.17.0.1/16")
	addLink(t, "eth1", "fd00:2::4/64")
	before := snapshot(t)
	i := open(t, Options{})
	check(t, i.SetAddresses(addrs("198.18.0.2", "fd63::2")))

	left := setRoutes(t, i, prefixes("10.20.0.0/24", "198.18.0.1/32", "fd00:1::/64", "10.1.5.0/24", "172.16.0.0/12", "fd00::/16"), addrs("10.20.0.9"))
	if want := prefixes("10.1.5.0/24", "172.17.0.0/16", "fd00:2::/64"); !slices.Equal(left, want) {
		t.Errorf("left %v, want %v", left, want)
	}
	wantVia(t, "culvert0", "10.20.0.8", "10.20.0.10", "198.18.0.1", "172.16.0.1", "172.18.0.1", "fd00:1::1", "fd00:3::1")
	wantVia(t, "eth0", "10.20.0.9", "10.1.5.1", "8.8.8.8")
	wantVia(t, "docker0", "172.17.0.2")
	wantVia(t, "eth1", "fd00:2::9")

	left = setRoutes(t, i, prefixes("10.20.0.0/24", "192.168.0.0/16"), nil)
	if want := prefixes("10.20.0.0/24", "192.168.0.0/16"); len(left) > 0 || !slices.Equal(installed(t, i), want) {
		t.Errorf("left %v, installed %v", left, installed(t, i))
	}
	wantVia(t, "culvert0", "10.20.0.9")
	setRoutes(t, i, nil, nil)
	if got := installed(t, i); len(got) > 0 {
		t.Errorf("installed %v", got)
	}
	check(t, i.Close())
	if after := snapshot(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
}

// TestSetRoutesAppliesTheDifference watches the kernel's own announcements.
func TestSetRoutesAppliesTheDifference(t *testing.T) {
	inNamespace(t)
	i := open(t, Options{})
	setRoutes(t, i, prefixes("10.20.0.0/24", "10.30.0.0/24"), nil)
	done, updates := make(chan struct{}), make(chan netlink.RouteUpdate, 64)
	check(t, netlink.RouteSubscribe(updates, done))
	setRoutes(t, i, prefixes("10.20.0.0/24", "10.40.0.0/24"), nil)
	setRoutes(t, i, prefixes("10.20.0.0/24", "10.40.0.0/24"), nil)
	setRoutes(t, i, prefixes("10.20.0.0/24", "10.40.0.0/24", "10.50.0.0/24"), nil)
	var got []string
	for range 3 {
		u := <-updates
		verb := "add "
		if u.Type == unix.RTM_DELROUTE {
			verb = "delete "
		}
		got = append(got, verb+u.Dst.String())
	}
	close(done)
	for range updates { // its goroutine ends when the socket is closed
	}
	if want := []string{"add 10.40.0.0/24", "delete 10.30.0.0/24", "add 10.50.0.0/24"}; !slices.Equal(got, want) {
		t.Errorf("the kernel was told %v, want %v", got, want)
	}
}

func TestSetRoutesHealsWhatOthersRemoved(t *testing.T) {
	inNamespace(t)
	i := open(t, Options{})
	want := prefixes("10.20.0.0/24", "10.30.0.0/24", "fd00:1::/64")
	setRoutes(t, i, want, nil)
	l, err := netlink.LinkByName(i.Name())
	check(t, err)
	check(t, netlink.LinkSetDown(l))
	check(t, netlink.LinkSetUp(l))
	if got := installed(t, i); len(got) != 0 {
		t.Fatalf("routes outlived the link: %v", got)
	}
	setRoutes(t, i, want, nil)
	if got := installed(t, i); !slices.Equal(got, want) {
		t.Errorf("installed %v", got)
	}
}

// TestDefaultRouteStays covers grants of everything: the default route is neither replaced nor shadowed for what must stay
// outside.
func TestDefaultRouteStays(t *testing.T) {
	inNamespace(t)
	eth := addLink(t, "eth0", "192.0.2.2/24")
	addRoute(t, eth, "0.0.0.0/0", "192.0.2.1")
	i := open(t, Options{})
	check(t, i.SetAddresses(addrs("198.18.0.2")))
	setRoutes(t, i, prefixes("0.0.0.0/0", "::/0"), nil)
	if got := installed(t, i); slices.ContainsFunc(got, func(p netip.Prefix) bool { return p.Bits() == 0 }) {
		t.Errorf("a default route of our own: %v", got)
	}
	wantVia(t, "culvert0", "8.8.8.8", "203.0.113.7", "2001:db8::1")
	setRoutes(t, i, prefixes("0.0.0.0/0"), addrs("203.0.113.7", "203.0.113.8"))
	wantVia(t, "culvert0", "8.8.8.8", "203.0.113.6", "203.0.113.9", "255.0.0.1")
	wantVia(t, "eth0", "203.0.113.7", "203.0.113.8", "192.0.2.1")
	check(t, i.Close())
	wantVia(t, "eth0", "8.8.8.8")
}

// TestRoutesOfOthers covers prefixes that the host routes elsewhere.
func TestRoutesOfOthers(t *testing.T) {
	inNamespace(t)
	eth := addLink(t, "eth0", "192.0.2.2/24")
	addRoute(t, eth, "10.20.0.0/16", "192.0.2.1") // the same prefix: ours are its halves
	addRoute(t, eth, "10.30.0.1/32", "192.0.2.1") // a single address: theirs
	addRoute(t, eth, "100.64.7.7/32", "")         // on the wire without a subnet, as container networks do
	before := snapshot(t)
	i := open(t, Options{})
	left := setRoutes(t, i, prefixes("10.20.0.0/16", "10.30.0.1/32", "100.64.7.0/24"), nil)
	if want := prefixes("100.64.7.7/32", "10.30.0.1/32"); !slices.Equal(left, want) {
		t.Errorf("left %v, want %v", left, want)
	}
	wantVia(t, "culvert0", "10.20.0.1", "10.20.255.1", "100.64.7.6")
	wantVia(t, "eth0", "10.30.0.1", "100.64.7.7")

	other := open(t, Options{}) // another tunnel's routes are no subnet on the wire
	if left := setRoutes(t, other, prefixes("10.20.128.0/24"), nil); len(left) > 0 {
		t.Errorf("left %v", left)
	}
	wantVia(t, "culvert1", "10.20.128.1")
	check(t, other.Close())
	check(t, i.Close())
	if after := snapshot(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
}

func TestDumpRepeatsWhatWasInterrupted(t *testing.T) {
	for _, c := range []struct{ interruptions, calls int }{{0, 1}, {3, 4}, {100, 16}} {
		calls := 0
		got, err := dump(func() (int, error) {
			if calls++; calls <= c.interruptions {
				return calls, netlink.ErrDumpInterrupted
			}
			return calls, nil
		})
		if calls != c.calls || got != calls || (err == nil) != (c.interruptions < 16) {
			t.Errorf("%d interruptions: %d calls, %v", c.interruptions, calls, err)
		}
	}
}

// TestPacketsReachTheDevice sends from a socket whose traffic is routed, and reads what the tunnel would get.
func TestPacketsReachTheDevice(t *testing.T) {
	inNamespace(t)
	i := open(t, Options{})
	check(t, i.SetAddresses(addrs("198.18.0.2", "fd63::2")))
	setRoutes(t, i, prefixes("10.20.0.0/24", "fd00:1::/64"), nil)
	const offset = 16
	bufs, sizes := make([][]byte, i.Device().BatchSize()), make([]int, i.Device().BatchSize())
	for n := range bufs {
		bufs[n] = make([]byte, offset+65535)
	}
	for _, c := range []struct{ from, to string }{{"198.18.0.2", "10.20.0.7"}, {"fd63::2", "fd00:1::7"}} {
		conn, err := net.Dial("udp", net.JoinHostPort(c.to, "9"))
		check(t, err)
		_, err = conn.Write([]byte("hello"))
		check(t, err)
		check(t, conn.Close())
		n, err := i.Device().Read(bufs, sizes, offset)
		check(t, err)
		packet := bufs[0][offset : offset+sizes[0]]
		from, to := packet[12:16], packet[16:20] // RFC 791, section 3.1
		if packet[0]>>4 == 6 {
			from, to = packet[8:24], packet[24:40] // RFC 8200, section 3
		}
		if n != 1 || !net.IP(from).Equal(net.ParseIP(c.from)) || !net.IP(to).Equal(net.ParseIP(c.to)) || !bytes.HasSuffix(packet, []byte("hello")) {
			t.Errorf("got %d packets, the first %x", n, packet)
		}
	}
}
