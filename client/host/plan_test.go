package host

import (
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func prefixes(texts ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

func addrs(texts ...string) []netip.Addr {
	var all []netip.Addr
	for _, text := range texts {
		all = append(all, netip.MustParseAddr(text))
	}
	return all
}

func TestPlan(t *testing.T) {
	for name, c := range map[string]struct {
		want         []netip.Prefix
		keep         []netip.Addr
		connected    []netip.Prefix
		routes, left []netip.Prefix
	}{
		"nothing": {},
		"as it is": {
			want:   prefixes("10.20.0.0/24", "fd00:1::/64", "198.18.0.1/32"),
			routes: prefixes("10.20.0.0/24", "198.18.0.1/32", "fd00:1::/64"),
		},
		"joined": {
			want:   prefixes("10.0.1.0/24", "10.0.0.0/24", "10.0.0.128/25", "10.0.1.7/32"),
			routes: prefixes("10.0.0.0/23"),
		},
		"host bits and mapped": {
			want:   prefixes("10.1.2.3/8", "::ffff:192.168.7.9/120"),
			routes: prefixes("10.0.0.0/8", "192.168.7.0/24"),
		},
		"around an address": {
			want: prefixes("10.0.0.0/29"), keep: addrs("10.0.0.2", "203.0.113.1", "::ffff:10.0.0.7"),
			routes: prefixes("10.0.0.0/31", "10.0.0.3/32", "10.0.0.4/31", "10.0.0.6/32"),
		},
		"everything": {
			want: prefixes("0.0.0.0/0", "::/0"), keep: addrs("255.255.255.255", "::"),
			routes: append(prefixes("0.0.0.0/1", "128.0.0.0/2", "192.0.0.0/3", "224.0.0.0/4", "240.0.0.0/5", "248.0.0.0/6"),
				append(v4Tail(), v6Head()...)...),
		},
		"link inside": {
			want: prefixes("172.16.0.0/14"), connected: prefixes("172.17.0.0/16", "192.0.2.0/24", "fe80::/64"),
			routes: prefixes("172.16.0.0/16", "172.18.0.0/15"), left: prefixes("172.17.0.0/16"),
		},
		"inside the link": {
			want: prefixes("10.1.5.0/24", "10.20.0.0/24"), connected: prefixes("10.1.0.0/16"),
			routes: prefixes("10.20.0.0/24"), left: prefixes("10.1.5.0/24"),
		},
		"just one address, kept": {want: prefixes("10.0.0.1/32"), keep: addrs("10.0.0.1")},
		"zone":                   {want: prefixes("fe80::1/128"), keep: addrs("fe80::1%eth0")},
		"invalid":                {want: []netip.Prefix{{}}, keep: []netip.Addr{{}}},
	} {
		routes, left := plan(c.want, c.keep, c.connected)
		if !slices.Equal(routes, c.routes) {
			t.Errorf("%s: routes %v, want %v", name, routes, c.routes)
		}
		if !slices.Equal(left, c.left) {
			t.Errorf("%s: left %v, want %v", name, left, c.left)
		}
	}
}

// v4Tail is 252.0.0.0/7 down to 255.255.255.254/32: what lies below the broadcast address.
func v4Tail() (all []netip.Prefix) {
	for bits := 7; bits <= 32; bits++ {
		p := netip.PrefixFrom(netip.MustParseAddr("255.255.255.255"), bits-1).Masked()
		all = append(all, netip.PrefixFrom(p.Addr(), bits))
	}
	return all
}

// v6Head is ::1/128, ::2/127 and so on up to 8000::/1: what lies above the unspecified address.
func v6Head() (all []netip.Prefix) {
	for bits := 128; bits >= 1; bits-- {
		all = append(all, halves(netip.PrefixFrom(netip.IPv6Unspecified(), bits-1))[1])
	}
	return all
}

// drawAddr gives an address of a few small worlds, at the ends of both families too, so that all kinds of overlap come up.
func drawAddr(t *rapid.T, label string) netip.Addr {
	base := rapid.SampledFrom(addrs("0.0.0.0", "10.0.0.0", "255.255.255.240", "::", "fd00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fff0")).Draw(t, label)
	b := base.AsSlice()
	b[len(b)-1] |= rapid.ByteRange(0, 15).Draw(t, label)
	addr, _ := netip.AddrFromSlice(b)
	return addr
}

func drawPrefix(t *rapid.T, label string) netip.Prefix {
	addr := drawAddr(t, label)
	bits := addr.BitLen() - rapid.IntRange(0, 5).Draw(t, label)
	if rapid.IntRange(0, 9).Draw(t, label) == 0 {
		bits = rapid.IntRange(0, addr.BitLen()).Draw(t, label)
	}
	return netip.PrefixFrom(addr, bits)
}

func drawPrefixes(t *rapid.T, label string) []netip.Prefix {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) netip.Prefix { return drawPrefix(t, label) }), 0, 6).Draw(t, label)
}

func contains(all []netip.Prefix, addr netip.Addr) bool {
	return slices.ContainsFunc(all, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// TestPlanMembership states what plan means, address by address.
func TestPlanMembership(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want, connected := drawPrefixes(t, "want"), drawPrefixes(t, "connected")
		keep := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) netip.Addr { return drawAddr(t, "keep") }), 0, 5).Draw(t, "keep")
		routes, left := plan(want, keep, connected)
		probes := append(slices.Clone(keep), drawAddr(t, "probe"), drawAddr(t, "probe"), drawAddr(t, "probe"))
		for _, p := range slices.Concat(want, connected, routes) { // both sides of every edge
			first, last := p.Masked().Addr(), lastOf(p.Masked())
			probes = append(probes, first, last, first.Prev(), last.Next())
		}
		for _, addr := range probes {
			if !addr.IsValid() {
				continue
			}
			link := contains(connected, addr)
			if got, should := contains(routes, addr), contains(want, addr) && !link && !slices.Contains(keep, addr); got != should {
				t.Fatalf("%s routed: %v, want %v (routes %v)", addr, got, should, routes)
			}
			if got, should := contains(left, addr), contains(want, addr) && link; got != should {
				t.Fatalf("%s left: %v, want %v (left %v)", addr, got, should, left)
			}
		}
	})
}

// TestPlanMinimal checks that no prefix lies in another and no two could be one: of disjoint covers there is only one such.
func TestPlanMinimal(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		routes, left := plan(drawPrefixes(t, "want"), nil, drawPrefixes(t, "connected"))
		for _, set := range [][]netip.Prefix{routes, left} {
			for i, p := range set {
				if p != p.Masked() {
					t.Fatalf("%s has host bits", p)
				}
				if i == 0 {
					continue
				}
				before := set[i-1]
				if before.Addr().Compare(p.Addr()) >= 0 || before.Overlaps(p) {
					t.Fatalf("%s and %s overlap or are out of order", before, p)
				}
				if before.Bits() == p.Bits() && p.Bits() > 0 && netip.PrefixFrom(before.Addr(), p.Bits()-1).Masked().Contains(p.Addr()) {
					t.Fatalf("%s and %s could be one", before, p)
				}
			}
		}
	})
}

func TestSplit(t *testing.T) {
	taken := map[netip.Prefix]bool{}
	for _, p := range prefixes("0.0.0.0/0", "128.0.0.0/1", "10.0.0.0/8", "198.18.0.1/32", "192.0.2.0/31", "192.0.2.1/32") {
		taken[p] = true
	}
	free, lost := split(prefixes("0.0.0.0/0", "10.0.0.0/8", "11.0.0.0/8", "198.18.0.1/32", "192.0.2.0/31", "::/0"), taken)
	wantFree := prefixes("0.0.0.0/1", "128.0.0.0/2", "192.0.0.0/2", "10.0.0.0/9", "10.128.0.0/9", "11.0.0.0/8", "192.0.2.0/32", "::/1", "8000::/1")
	if !reflect.DeepEqual(free, wantFree) {
		t.Errorf("free %v, want %v", free, wantFree)
	}
	if wantLost := prefixes("198.18.0.1/32", "192.0.2.1/32"); !reflect.DeepEqual(lost, wantLost) {
		t.Errorf("lost %v, want %v", lost, wantLost)
	}
}

// TestSplitMembership checks that splitting loses nothing but what it says, and gives nothing that is taken.
func TestSplitMembership(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		routes, _ := plan(drawPrefixes(t, "want"), nil, nil)
		taken := make(map[netip.Prefix]bool)
		for _, p := range drawPrefixes(t, "taken") {
			taken[p.Masked()] = true
		}
		for _, p := range routes {
			taken[p] = taken[p] || rapid.Bool().Draw(t, "same")
		}
		free, lost := split(routes, taken)
		again, _ := plan(slices.Concat(free, lost), nil, nil)
		if !slices.Equal(again, routes) {
			t.Fatalf("free %v and lost %v are not %v", free, lost, routes)
		}
		for _, p := range free {
			if taken[p] || p.Bits() == 0 {
				t.Fatalf("%s is taken", p)
			}
		}
		for _, p := range lost {
			if !taken[p] || !p.IsSingleIP() {
				t.Fatalf("%s is lost for no reason", p)
			}
		}
	})
}

func BenchmarkPlanInternet(b *testing.B) {
	keep := addrs("203.0.113.7", "198.51.100.9", "192.0.2.1", "2001:db8::1")
	for b.Loop() {
		plan(prefixes("0.0.0.0/0", "::/0"), keep, prefixes("10.1.0.0/16", "172.17.0.0/16"))
	}
}
