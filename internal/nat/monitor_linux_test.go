package nat

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/wire"
)

// prepare lets tests build labs, also without root: inside a namespace, whose loopback is then brought up for the others.
func prepare() {
	_ = lab.Enter() // a test that needs it names the reason, through lab.Require
	if lo, err := netlink.LinkByName("lo"); err == nil && lo.Attrs().OperState != netlink.OperUp {
		if err := netlink.LinkSetUp(lo); err != nil {
			fmt.Fprintln(os.Stderr, "bring up loopback:", err)
		}
	}
}

// watched is a host of a lab whose network is being watched.
type watched struct {
	*testing.T
	host    *lab.Host
	changes <-chan Change
}

func watchHost(t *testing.T) *watched {
	t.Helper()
	lab.Require(t)
	n, err := lab.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.Close() })
	h, err := n.Host("host", lab.HostOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	w := &watched{T: t, host: h}
	w.do(func() error {
		w.changes = Watch(ctx, WatchOptions{Settle: 20 * time.Millisecond})
		return nil
	})
	t.Cleanup(func() {
		cancel()
		for range w.changes {
		}
	})
	return w
}

func (w *watched) do(f func() error) {
	w.Helper()
	if err := w.host.Do(f); err != nil {
		w.Fatal(err)
	}
}

// until waits for a change after which ok holds. Steps in between may be told or merged.
func (w *watched) until(what string, ok func(Change) bool) {
	w.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case c := <-w.changes:
			if ok(c) {
				return
			}
		case <-deadline:
			w.Fatalf("not told that %s", what)
		}
	}
}

func (w *watched) link(name string) netlink.Link {
	w.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		w.Fatal(err)
	}
	return l
}

func (w *watched) address(iface, prefix string, change func(netlink.Link, *netlink.Addr) error) {
	w.Helper()
	w.do(func() error {
		addr, err := netlink.ParseAddr(prefix)
		if err != nil {
			return err
		}
		return change(w.link(iface), addr)
	})
}

func TestWatchSeesTheKernelsChanges(t *testing.T) {
	w := watchHost(t)
	extra, six := netip.MustParseAddr("192.0.2.77"), netip.MustParseAddr("2001:db8::77")
	w.address("eth0", "192.0.2.77/32", netlink.AddrAdd)
	w.until("an address came", func(c Change) bool { return c.Addrs && slices.Contains(c.Now.Addrs, extra) })
	w.address("eth0", "2001:db8::77/64", netlink.AddrAdd)
	w.until("an IPv6 address came", func(c Change) bool { return slices.Contains(c.Now.Addrs, six) })
	w.address("eth0", "192.0.2.77/32", netlink.AddrDel)
	w.until("an address went", func(c Change) bool { return c.Addrs && !slices.Contains(c.Now.Addrs, extra) })

	var via netip.Addr
	w.do(func() error {
		n, err := ReadNetwork(nil)
		if err != nil || len(n.Routes) != 1 || n.Routes[0].Iface != "eth0" || !n.Routes[0].Via.Is4() {
			t.Errorf("read %+v, %v", n, err)
			return err
		}
		via = n.Routes[0].Via
		return netlink.RouteDel(&netlink.Route{LinkIndex: w.link("eth0").Attrs().Index, Gw: via.AsSlice()})
	})
	w.until("the default route went", func(c Change) bool { return c.Routes && len(c.Now.Routes) == 0 })
	w.do(func() error {
		return netlink.RouteAdd(&netlink.Route{LinkIndex: w.link("eth0").Attrs().Index, Gw: via.AsSlice(), Priority: 7})
	})
	w.until("it came back with another metric", func(c Change) bool {
		return c.Routes && slices.Equal(c.Now.Routes, []DefaultRoute{{Iface: "eth0", Via: via, Metric: 7}})
	})
	w.do(func() error { return netlink.LinkSetDown(w.link("eth0")) })
	w.until("the link went down", func(c Change) bool { return len(c.Now.Addrs) == 0 && len(c.Now.Routes) == 0 })
}

// What containers and other tunnels do is none of our business. The address at the end is there to know that all that
// came before has been looked at.
func TestWatchLeavesOthersAlone(t *testing.T) {
	w := watchHost(t)
	for _, name := range []string{"docker0", "culvert0"} {
		w.do(func() error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = name
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "br-" + name})
		})
		w.address(name, "172.17.0.1/16", netlink.AddrAdd)
		w.do(func() error { return netlink.LinkSetUp(w.link(name)) })
		for _, dst := range []string{"10.99.0.0/16", "0.0.0.0/0"} {
			w.do(func() error {
				to, err := netlink.ParseIPNet(dst)
				if err != nil {
					return err
				}
				return netlink.RouteAdd(&netlink.Route{LinkIndex: w.link(name).Attrs().Index, Dst: to, Scope: netlink.SCOPE_LINK, Priority: 9})
			})
		}
		w.do(func() error { return netlink.LinkDel(w.link(name)) })
	}
	w.address("eth0", "192.0.2.77/32", netlink.AddrAdd)
	deadline := time.After(20 * time.Second)
	select {
	case c := <-w.changes:
		if !slices.Contains(c.Now.Addrs, netip.MustParseAddr("192.0.2.77")) || c.Routes {
			t.Errorf("told of %+v", c)
		}
	case <-deadline:
		t.Fatal("told of nothing")
	}
}

// message builds one rtnetlink message.
func message(kind uint16, body ...byte) []byte {
	b := make([]byte, unix.NLMSG_HDRLEN, 64)
	binary.NativeEndian.PutUint32(b, uint32(unix.NLMSG_HDRLEN+len(body)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	b = append(b, body...)
	for len(b)%unix.NLMSG_ALIGNTO != 0 {
		b = append(b, 0)
	}
	return b
}

func TestMatters(t *testing.T) {
	narrow := message(unix.RTM_NEWROUTE, unix.AF_INET, 24, 0, 0)
	neighbour := message(unix.RTM_NEWNEIGH, unix.AF_INET, 0, 0)
	for name, c := range map[string]struct {
		batch []byte
		want  bool
	}{
		"nothing":                 {nil, false},
		"an address":              {message(unix.RTM_NEWADDR, 0, 0, 0, 0), true},
		"a link":                  {message(unix.RTM_DELLINK), true},
		"a default route":         {message(unix.RTM_DELROUTE, unix.AF_INET, 0, 0, 0), true},
		"a narrow route":          {narrow, false},
		"a neighbour":             {neighbour, false},
		"the last of several":     {slices.Concat(narrow, neighbour, message(unix.RTM_DELADDR)), true},
		"several without meaning": {slices.Concat(narrow, neighbour, narrow), false},
		"a length beyond the end": {narrow[:unix.NLMSG_HDRLEN], true},
		"a length of zero":        {make([]byte, unix.NLMSG_HDRLEN), true},
		"a cut header":            {narrow[:unix.NLMSG_HDRLEN-1], false},
	} {
		if got := matters(c.batch); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	noise := slices.Concat(narrow, neighbour, narrow)
	if n := testing.AllocsPerRun(100, func() { matters(noise) }); n != 0 {
		t.Errorf("%v allocations for news that does not matter", n)
	}
}

// The lab's NATs are what they say, seen from inside with two ports of one server and a second server.
func TestClassifyNATs(t *testing.T) {
	for _, tc := range []struct {
		kind       lab.Kind
		mapping    wire.Mapping
		dependence Dependence
		filtering  Dependence // one kind shows that nothing comes, which takes its time
	}{
		{lab.Open, wire.MappingEasy, EndpointIndependent, AddressDependent},
		{lab.FullCone, wire.MappingEasy, EndpointIndependent, AddressDependent},
		{lab.Restricted, wire.MappingEasy, EndpointIndependent, AddressDependent},
		{lab.Easy, wire.MappingEasy, EndpointIndependent, AddressAndPortDependent},
		{lab.Hard, wire.MappingHard, AddressAndPortDependent, DependenceUnknown},
		{lab.CarrierGrade, wire.MappingHard, AddressAndPortDependent, DependenceUnknown},
	} {
		t.Run(tc.kind.String(), func(t *testing.T) {
			t.Parallel() // they mostly wait for what does not come
			lab.Require(t)
			n := must(lab.New(t.Context()))(t)
			t.Cleanup(func() { _ = n.Close() })
			box := must(n.NAT("nat", lab.NATOptions{Kind: tc.kind}))(t)
			inside := must(n.Host("inside", lab.HostOptions{Behind: box}))(t)
			var servers []netip.AddrPort
			for i, ports := range [][]string{{":3478", ":3479"}, {":3478"}} {
				h := must(n.Host(fmt.Sprint("server-", i), lab.HostOptions{}))(t)
				for _, port := range ports {
					if err := h.Do(func() error { return serve(t, port) }); err != nil {
						t.Fatal(err)
					}
					servers = append(servers, netip.MustParseAddrPort(h.Addr().String()+port))
				}
			}
			conn := must(inside.ListenPacket(":0"))(t)
			defer conn.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			seen := must(Probe(ctx, conn, servers))(t)
			got := Classify(seen, []netip.AddrPort{netip.AddrPortFrom(inside.Addr(), addrOf(conn.LocalAddr()).Port())})
			if got.Mapping != tc.mapping || got.Dependence != tc.dependence || got.Public.Addr() != inside.Public() ||
				got.Direct != (tc.kind.String() == lab.Open.String()) {
				t.Errorf("from %v: %+v", seen, got)
			}
			if got.Destinations != 3 || got.Addresses != 2 {
				t.Errorf("compared %d destinations at %d addresses", got.Destinations, got.Addresses)
			}
			if tc.filtering == DependenceUnknown {
				return
			}
			limit := 30 * time.Second
			if tc.filtering == AddressAndPortDependent {
				limit = 10 * time.Second // nothing comes, however long one waits
			}
			ctx, cancel = context.WithTimeout(t.Context(), limit)
			defer cancel()
			usual, changed := must(inside.ListenPacket(":0"))(t), must(inside.ListenPacket(":0"))(t)
			defer usual.Close()
			defer changed.Close()
			if f, err := ProbeFiltering(ctx, usual, changed, servers); err != nil || f != tc.filtering {
				t.Errorf("filters %q (%v), want %q", f, err, tc.filtering)
			}
		})
	}
}

// serve runs a STUN server in the calling thread's namespace.
func serve(t *testing.T, addr string) error {
	s, err := Listen(t.Context(), ServerOptions{Addr: addr})
	if err == nil {
		t.Cleanup(func() { _ = s.Close() })
	}
	return err
}

// must unpacks a result for a test that cannot go on without it.
func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
