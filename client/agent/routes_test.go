package agent

import (
	"net/netip"
	"testing"

	"pgregory.net/rapid"
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
