package agent

import (
	"log/slog"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/client/host"
	"github.com/culvertnet/culvert/internal/wire"
)

// No gateway gets what is never a gateway's, in whatever pieces it asks for it; everything else it gets.
func TestNeverRouted(t *testing.T) {
	addr := func(text string) netip.Addr { return netip.MustParseAddr(text) }
	for _, all := range [][]netip.Prefix{
		{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")},
		{netip.MustParsePrefix("169.254.169.254/32"), netip.MustParsePrefix("168.63.129.16/32"), netip.MustParsePrefix("fe80::1/128")},
		{netip.MustParsePrefix("0.0.0.0/1"), netip.MustParsePrefix("128.0.0.0/1"), netip.MustParsePrefix("8000::/1"), netip.MustParsePrefix("::/1")},
	} {
		got := routable(all)
		for _, a := range []netip.Addr{
			addr("169.254.169.254"), addr("168.63.129.16"), addr("100.100.100.200"), addr("127.0.0.1"), addr("224.0.0.251"), addr("255.255.255.255"),
			addr("fe80::1"), addr("ff02::1"), addr("::1"), addr("fd00:ec2::254"), addr("fd20:ce::254"),
		} {
			if contains(got, a) {
				t.Errorf("%s goes into the tunnel of a gateway that asks for %s", a, all)
			}
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		bytes := rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "address")
		a, _ := netip.AddrFromSlice(bytes)
		p := netip.PrefixFrom(a, rapid.IntRange(0, 32).Draw(t, "bits")).Masked()
		if got, want := contains(routable([]netip.Prefix{p}), a), !contains(never, a); got != want {
			t.Errorf("%s of %s: routed %t, want %t", a, p, got, want)
		}
	})
}

// recorded notes what a link is told to keep outside.
type recorded struct {
	link
	keep []netip.Addr
}

// SetRoutes implements link.
func (r *recorded) SetRoutes(_ []netip.Prefix, keep []netip.Addr) ([]host.Yield, error) {
	r.keep = keep
	return nil, nil
}

// A grant that covers them leaves the host its own DNS servers, and the tunnel its own way.
func TestResolversAndPeersStayOutside(t *testing.T) {
	a := &Agent{direct: newOutside(), log: slog.New(slog.DiscardHandler)}
	resolver, coordinator, gateway := netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("198.51.100.7")
	a.opts.resolvers = func() []netip.Addr { return []netip.Addr{resolver} }
	told := &recorded{}
	a.link = told
	a.direct.add(coordinator)
	err := a.setRoutes(wire.Gateway{
		Routes: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, Candidates: []wire.Candidate{{Addr: netip.AddrPortFrom(gateway, 1)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range []netip.Addr{resolver, coordinator, gateway} {
		if !slices.Contains(told.keep, addr) {
			t.Errorf("%s goes into the tunnel: %v stay outside", addr, told.keep)
		}
	}
}
