package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/wire"
)

func TestRoutes(t *testing.T) {
	tests := []struct{ name, offered, local, want string }{
		{"nothing", "", "", ""},
		{"one address", "tcp 10.0.0.5:1", "", "10.0.0.5/32"},
		{"sorted and merged", "tcp 10.0.1.0/24:1|tcp 10.0.0.0/24:1|udp 10.0.0.7:1|tcp [fd00::1]:1", "", "10.0.0.0/23 fd00::1/128"},
		{"neighbours", "tcp 10.0.0.1:1|tcp 10.0.0.2:1|tcp 10.0.0.3:1", "", "10.0.0.1/32 10.0.0.2/31"},
		{"intersection", "tcp 10.0.0.0/8:1", "tcp 10.1.0.0/16:1|tcp 11.0.0.0/8:1", "10.1.0.0/16"},
		{"intersection, other way", "tcp 10.1.0.0/16:1|tcp 11.0.0.0/8:1", "tcp 10.0.0.0/8:1", "10.1.0.0/16"},
		{"no port in common", "tcp 10.0.0.0/8:1", "tcp 10.0.0.0/8:2", ""},
		{"no protocol in common", "tcp 10.0.0.0/8:1", "udp 10.0.0.0/8:1|icmp 10.0.0.0/8", ""},
		{"icmp in common", "icmp 10.0.0.0/8", "tcp 10.0.0.0/8:1|icmp 10.0.0.0/8", "10.0.0.0/8"},
		{"ports in a wider prefix", "tcp 10.0.0.0/24:1", "tcp 10.0.0.0/24:2|tcp 10.0.0.0/8:1", "10.0.0.0/24"},
		{"own policy grants nothing", "tcp 10.0.0.0/8:1", "tcp 192.0.2.1:1", ""},
		{"internet against private", "tcp internet:1", "tcp 10.0.0.0/8:1", ""},
		{"internet against public", "tcp internet:1", "tcp 8.8.8.0/24:1", "8.8.8.0/24"},
		{"internet against internet and more", "tcp internet:1", "tcp internet:1|tcp 8.8.8.0/24:2", internetRoutes},
		{"link-local by name", "tcp 169.254.1.1:1", "", "169.254.1.1/32"},
		{"link-local by name, own policy by range", "tcp 169.254.1.1:1", "tcp 169.0.0.0/8:1", ""},
		{"link-local by name in both", "tcp 169.254.1.1:1", "tcp 169.254.1.1:1", "169.254.1.1/32"},
		{"link-local by name in both, other port", "tcp 169.254.1.1:1", "tcp 169.254.1.1:2|tcp 169.0.0.0/8:1", ""},
		{"loopback by name in one", "tcp 127.0.0.1:1", "", ""},
		{"loopback by name in both", "tcp 127.0.0.1:1|tcp 10.0.0.1:1", "tcp 127.0.0.1:1|tcp 10.0.0.1:1", "10.0.0.1/32"},
		{"multicast, unspecified and broadcast by name in both", "udp 224.0.0.1:1|udp 0.0.0.0:1|udp 255.255.255.255:1|udp [ff02::1]:1|udp [::]:1|udp [::1]:1",
			"udp 224.0.0.1:1|udp 0.0.0.0:1|udp 255.255.255.255:1|udp [ff02::1]:1|udp [::]:1|udp [::1]:1", ""},
		{"metadata by name in both", "tcp 169.254.169.254:80", "tcp 169.254.169.254:80", "169.254.169.254/32"},
		{"metadata inside a range", "tcp 168.63.129.16/31:1", "", "168.63.129.17/32"},
		{"overlay", "tcp 198.16.0.0/14:1", "", "198.16.0.0/15"},
		{"overlay by name", "tcp 198.18.0.5:1", "tcp 198.18.0.5:1", ""},
		{"link-local cut out", "tcp 169.254.0.0/15:1", "", "169.255.0.0/16"},
		{"last address", "tcp 255.255.255.254/31:1", "", "255.255.255.254/32"},
		{"last IPv6 address", "tcp [fe00::/7]:1", "", "fe00::/9 fec0::/10"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			routes := scopeOf(t, tt.offered, tt.local).Routes()
			checkSorted(t, routes)
			var got []string
			for _, r := range routes {
				got = append(got, r.String())
			}
			if s := strings.Join(got, " "); s != tt.want {
				t.Errorf("got %s", s)
			}
		})
	}
}

// internetRoutes are the routes of `internet`, less Azure's wire server.
var internetRoutes = func() string {
	var got []string
	for _, r := range (&Scope{Offered: mustGrant("tcp internet:1")}).Routes() {
		got = append(got, r.String())
	}
	return strings.Join(got, " ")
}()

func mustGrant(line string) *Grant {
	g, err := ParseGrant([]wire.Grant{{Rule: "r", Allow: line}})
	if err != nil {
		panic(err)
	}
	return g
}

// The sizes that the documentation of Routes states.
func TestRoutesSizes(t *testing.T) {
	for line, atMost := range map[string]int{"tcp internet:*": 200, "tcp 0.0.0.0/0:*": 150, "tcp [::/0]:*": 600} {
		n := len(scopeOf(t, line, "").Routes())
		t.Logf("%s: %d routes", line, n)
		if n > atMost {
			t.Errorf("%s gives %d routes, more than %d", line, n, atMost)
		}
	}
}

func TestRoutesLeaveTheRunnersOwnNetworkAlone(t *testing.T) {
	routes := scopeOf(t, "tcp 0.0.0.0/0:*|tcp [::/0]:*|tcp internet:*", "").Routes()
	for _, a := range []string{"127.0.0.53", "169.254.169.254", "168.63.129.16", "fe80::1", "::1", "224.0.0.251", "255.255.255.255", "198.18.0.1"} {
		if contains(routes, netip.MustParseAddr(a)) {
			t.Errorf("%s would go into the tunnel", a)
		}
	}
}

// The largest grants that are taken are answered in bounded time.
func TestRoutesAreBounded(t *testing.T) {
	var lines []wire.Grant
	for i := range MaxLines {
		line := fmt.Sprintf("tcp 10.%d.%d.0/30:%d", i/256, i%256, i+1)
		if i%4 == 0 {
			line = fmt.Sprintf("tcp,udp internet:%d", i+1)
		}
		lines = append(lines, wire.Grant{Rule: "r", Allow: line})
	}
	g, err := ParseGrant(lines)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	s := Scope{Offered: g, Local: g}
	n := len(s.Routes())
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("%d routes took %s", n, took)
	}
}

// Cutting one set of prefixes from another and listing what is left is right for every address at the edges.
func TestSpansAgreeWithPrefixes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := rapid.Custom(func(t *rapid.T) netip.Prefix {
			if rapid.Bool().Draw(t, "family") {
				a := netip.AddrFrom4([4]byte{255, 255, 255, rapid.Byte().Draw(t, "low")})
				p, _ := a.Prefix(rapid.IntRange(20, 32).Draw(t, "bits"))
				return p
			}
			a := netip.AddrFrom16([16]byte{15: rapid.Byte().Draw(t, "low")})
			p, _ := a.Prefix(rapid.IntRange(118, 128).Draw(t, "bits"))
			return p
		})
		keep, cut := rapid.SliceOfN(draw, 0, 5).Draw(t, "keep"), rapid.SliceOfN(draw, 0, 5).Draw(t, "cut")
		var keepSpans, cutSpans []span
		for _, p := range keep {
			keepSpans = append(keepSpans, spanOf(p))
		}
		for _, p := range cut {
			cutSpans = append(cutSpans, spanOf(p))
		}
		var got []netip.Prefix
		for _, s := range subtract(mergeSpans(keepSpans), mergeSpans(cutSpans)) {
			got = s.appendPrefixes(got)
		}
		checkSorted(t, got)
		for low := range 256 {
			for _, a := range []netip.Addr{netip.AddrFrom4([4]byte{255, 255, 255, byte(low)}), netip.AddrFrom16([16]byte{15: byte(low)})} {
				if want := contains(keep, a) && !contains(cut, a); contains(got, a) != want {
					t.Fatalf("%v less %v gives %v, wrong for %s", keep, cut, got, a)
				}
			}
		}
	})
}
