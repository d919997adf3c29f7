package policy

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/culvertnet/culvert/internal/wire"
)

// grantOf compiles lines, each under the rule r1, r2, … of its place.
func grantOf(t testing.TB, lines ...string) *Grant {
	t.Helper()
	g, err := ParseGrant(wireLines(lines...))
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func wireLines(lines ...string) []wire.Grant {
	var out []wire.Grant
	for i, l := range lines {
		out = append(out, wire.Grant{Rule: "r" + string(rune('1'+i)), Allow: l})
	}
	return out
}

// flowOf reads "tcp 10.0.0.1:443" or "icmp 10.0.0.1".
func flowOf(t testing.TB, s string) Flow {
	t.Helper()
	proto, dst, _ := strings.Cut(s, " ")
	if proto == "icmp" {
		return Flow{Proto: ICMP, Dst: netip.AddrPortFrom(netip.MustParseAddr(dst), 0)}
	}
	return Flow{Proto: protoNames[proto], Dst: netip.MustParseAddrPort(dst)}
}

const everything = "tcp 0.0.0.0/0:*|udp 0.0.0.0/0:*|icmp 0.0.0.0/0|tcp [::/0]:*|udp [::/0]:*|icmp ::/0"

func split(lines string) []string {
	if lines == "" {
		return nil
	}
	return strings.Split(lines, "|")
}

var ownAddrs = []netip.Addr{netip.MustParseAddr("10.9.9.9"), netip.MustParseAddr("2001:db8:9::9")}

func scopeOf(t testing.TB, offered, local string) *Scope {
	s := &Scope{
		Offered: grantOf(t, split(offered)...),
		Own: func(a netip.Addr) bool {
			return a == ownAddrs[0] || a == ownAddrs[1]
		},
		Overlay: []netip.Prefix{
			netip.MustParsePrefix("198.18.0.0/16"), netip.MustParsePrefix("198.19.0.0/16"),
			netip.MustParsePrefix("fd63:756c:7665:7274::/96"),
		},
	}
	if local != "" {
		s.Local = grantOf(t, split(local)...)
	}
	return s
}

func TestDecideGranted(t *testing.T) {
	tests := []struct {
		offered, local, flow string
		rule                 string // "" means not granted
	}{
		{"tcp 10.0.0.5:5432", "", "tcp 10.0.0.5:5432", "r1"},
		{"tcp 10.0.0.5:5432", "", "tcp 10.0.0.5:5433", ""},
		{"tcp 10.0.0.5:5432", "", "udp 10.0.0.5:5432", ""},
		{"tcp 10.0.0.5:5432", "", "tcp 10.0.0.6:5432", ""},
		{"tcp 10.0.0.5:5432", "", "icmp 10.0.0.5", ""},
		{"tcp 10.0.0.0/24:443", "", "tcp 10.0.0.255:443", "r1"},
		{"tcp 10.0.0.0/24:443", "", "tcp 10.0.1.0:443", ""},
		{"tcp,udp 10.0.0.0/24:53", "", "udp 10.0.0.1:53", "r1"},
		{"tcp 10.0.0.0/24:8000-8100", "", "tcp 10.0.0.1:8000", "r1"},
		{"tcp 10.0.0.0/24:8000-8100", "", "tcp 10.0.0.1:8100", "r1"},
		{"tcp 10.0.0.0/24:8000-8100", "", "tcp 10.0.0.1:7999", ""},
		{"tcp 10.0.0.0/24:8000-8100", "", "tcp 10.0.0.1:8101", ""},
		{"tcp 10.0.0.0/24:53,853", "", "tcp 10.0.0.1:853", "r1"},
		{"tcp 10.0.0.0/24:53,853", "", "tcp 10.0.0.1:100", ""},
		{"tcp 10.0.0.0/24:*", "", "tcp 10.0.0.1:65535", "r1"},
		{"icmp 10.0.0.0/24", "", "icmp 10.0.0.1", "r1"},
		{"icmp 10.0.0.0/24", "", "tcp 10.0.0.1:1", ""},
		{"tcp [fd00::/64]:443", "", "tcp [fd00::1]:443", "r1"},
		{"tcp [fd00::/64]:443", "", "tcp [fd00:0:0:1::1]:443", ""},
		{"icmp fd00::/64", "", "icmp fd00::1", "r1"},
		{"", "", "tcp 10.0.0.1:1", ""},
		// the first line in the file names the rule, whatever its prefix
		{"tcp 10.0.0.0/8:443|tcp 10.0.0.1:443", "", "tcp 10.0.0.1:443", "r1"},
		{"tcp 10.0.0.1:443|tcp 10.0.0.0/8:443", "", "tcp 10.0.0.1:443", "r1"},
		{"tcp 10.0.0.0/8:80|tcp 10.0.0.0/8:443", "", "tcp 10.0.0.1:443", "r2"},
		{"tcp internet:443|tcp 8.8.8.8:443", "", "tcp 8.8.8.8:443", "r1"},
		{"tcp 8.0.0.0/8:443|tcp internet:443", "", "tcp 8.8.8.8:443", "r1"},
		// the gateway's own policy narrows
		{"tcp 10.0.0.0/8:*", "tcp 10.1.0.0/16:443", "tcp 10.1.0.1:443", "r1"},
		{"tcp 10.0.0.0/8:*", "tcp 10.1.0.0/16:443", "tcp 10.2.0.1:443", ""},
		{"tcp 10.0.0.0/8:*", "tcp 10.1.0.0/16:443", "tcp 10.1.0.1:444", ""},
		{"tcp 10.1.0.0/16:443", "tcp 10.0.0.0/8:*", "tcp 10.1.0.1:443", "r1"},
		{"tcp 10.1.0.0/16:443", "udp 10.0.0.0/8:*", "tcp 10.1.0.1:443", ""},
		// an IPv4-mapped address is the IPv4 address
		{"tcp 10.0.0.5:1", "", "tcp [::ffff:10.0.0.5]:1", "r1"},
		{"tcp [::/0]:*", "", "tcp [::ffff:10.0.0.5]:1", ""},
		{"tcp 0.0.0.0/0:*", "", "tcp 240.0.0.1:1", "r1"},
		{everything, "", "tcp [2606:4700::1]:443", "r4"},
	}
	for _, tt := range tests {
		v := scopeOf(t, tt.offered, tt.local).Decide(flowOf(t, tt.flow))
		if v.Allowed != (tt.rule != "") || v.Rule != tt.rule {
			t.Errorf("%s (own policy %q): %s gives %+v, want rule %q", tt.offered, tt.local, tt.flow, v, tt.rule)
		}
		if !v.Allowed && v.Reason != reasonNotGranted {
			t.Errorf("%s: %s is refused as %q", tt.offered, tt.flow, v.Reason)
		}
	}
}

func TestDecideInternet(t *testing.T) {
	public := []string{"1.1.1.1", "8.8.8.8", "172.15.255.255", "172.32.0.0", "100.63.255.255", "100.128.0.0", "223.255.255.255",
		"192.31.196.1", "198.17.255.255", "198.20.0.0", "2606:4700:4700::1111", "2000::", "2a00::1", "2001:200::1", "2620:4f:8000::1"}
	special := []string{"10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "100.127.255.255", "192.0.0.1", "192.0.2.1",
		"192.88.99.1", "198.51.100.1", "203.0.113.1", "240.0.0.1", "fd00::1", "fc00::1", "2001:db8::1", "2001:2::1", "2001:10::1", "2001:20::1",
		"3fff::1", "100::1", "64:ff9b::8.8.8.8", "64:ff9b:1::808:808", "5f00::1", "4000::1", "fec0::1", "2002:808:808::1"}
	s := scopeOf(t, "tcp internet:443", "")
	for _, a := range public {
		if v := s.Decide(Flow{TCP, netip.AddrPortFrom(netip.MustParseAddr(a), 443)}); !v.Allowed {
			t.Errorf("internet does not hold %s: %s", a, v.Reason)
		}
	}
	for _, a := range special {
		if v := s.Decide(Flow{TCP, netip.AddrPortFrom(netip.MustParseAddr(a), 443)}); v.Allowed {
			t.Errorf("internet holds %s", a)
		}
	}
}

// Level says what opens a destination that ranges leave closed.
type level int

const (
	byExact level = iota // an exact line of the coordinator's policy
	byBoth               // exact lines of both policies
	byNone
)

func TestDecideClosed(t *testing.T) {
	tests := []struct {
		addr, reason string
		level        level
	}{
		{"169.254.1.1", reasonLinkLocal, byExact}, {"169.254.0.0", reasonLinkLocal, byExact}, {"169.254.255.255", reasonLinkLocal, byExact},
		{"169.254.20.10", reasonLinkLocal, byExact}, {"fe80::1", reasonLinkLocal, byExact}, {"febf::1", reasonLinkLocal, byExact},
		{"169.254.169.254", reasonMetadata, byBoth}, {"169.254.170.2", reasonMetadata, byBoth}, {"169.254.169.253", reasonMetadata, byBoth},
		{"168.63.129.16", reasonMetadata, byBoth}, {"100.100.100.200", reasonMetadata, byBoth}, {"192.0.0.192", reasonMetadata, byBoth},
		{"fd00:ec2::254", reasonMetadata, byBoth}, {"fd00:ec2::23", reasonMetadata, byBoth}, {"fd20:ce::254", reasonMetadata, byBoth},
		{"fe80::a9fe:a9fe", reasonMetadata, byBoth}, {"fe80::a9fe:a9fd", reasonMetadata, byBoth}, {"fd00:42::42", reasonMetadata, byBoth},
		{"169.254.170.23", reasonMetadata, byBoth}, {"169.254.0.23", reasonMetadata, byBoth}, {"169.254.42.42", reasonMetadata, byBoth},
		{"127.0.0.1", reasonLoopback, byBoth}, {"127.255.255.254", reasonLoopback, byBoth}, {"::1", reasonLoopback, byBoth},
		{"224.0.0.1", reasonMulticast, byBoth}, {"239.255.255.250", reasonMulticast, byBoth}, {"ff02::1", reasonMulticast, byBoth},
		{"0.0.0.0", reasonUnspecified, byBoth}, {"0.1.2.3", reasonUnspecified, byBoth}, {"::", reasonUnspecified, byBoth},
		{"255.255.255.255", reasonBroadcast, byBoth},
		{"10.9.9.9", reasonOwn, byBoth}, {"2001:db8:9::9", reasonOwn, byBoth},
		{"198.18.0.1", reasonOverlay, byNone}, {"198.18.77.3", reasonOverlay, byNone}, {"198.19.1.1", reasonOverlay, byNone},
		{"fd63:756c:7665:7274::c612:5", reasonOverlay, byNone},
	}
	for _, tt := range tests {
		t.Run(tt.addr, func(t *testing.T) {
			exact := "tcp " + bracketed(tt.addr) + ":80"
			scopes := []struct {
				offered, local string
				allowed        bool
			}{
				{everything, "", false},
				{everything, everything, false},
				{exact, "", tt.level == byExact},
				{exact, exact, tt.level != byNone},
				{exact, everything, false},
				{everything, exact, false},
			}
			f := Flow{TCP, netip.AddrPortFrom(netip.MustParseAddr(tt.addr), 80)}
			for _, sc := range scopes {
				v := scopeOf(t, sc.offered, sc.local).Decide(f)
				if v.Allowed != sc.allowed {
					t.Errorf("offered %.20q, own policy %.20q: %+v", sc.offered, sc.local, v)
				}
				if !v.Allowed && v.Reason != tt.reason {
					t.Errorf("offered %.20q: reason %q, want %q", sc.offered, v.Reason, tt.reason)
				}
			}
		})
	}
}

func bracketed(addr string) string {
	if strings.Contains(addr, ":") {
		return "[" + addr + "]"
	}
	return addr
}

// Every spelling of a closed address is refused although everything is granted.
func TestDecideUnwraps(t *testing.T) {
	tests := []struct{ name, addr, reason string }{
		{"mapped metadata", "::ffff:169.254.169.254", reasonMetadata},
		{"mapped loopback", "::ffff:127.0.0.1", reasonLoopback},
		{"mapped session", "::ffff:198.18.0.7", reasonOverlay},
		{"mapped own", "::ffff:10.9.9.9", reasonOwn},
		{"compatible metadata", "::169.254.169.254", reasonMetadata},
		{"compatible loopback", "::127.0.0.1", reasonLoopback},
		{"compatible low", "::2", reasonUnspecified},
		{"translated metadata", "::ffff:0:169.254.169.254", reasonMetadata},
		{"NAT64 metadata", "64:ff9b::169.254.169.254", reasonMetadata},
		{"NAT64 link-local", "64:ff9b::169.254.9.9", reasonLinkLocal},
		{"NAT64 loopback", "64:ff9b::7f00:1", reasonLoopback},
		{"NAT64 session", "64:ff9b::198.18.0.7", reasonOverlay},
		{"NAT64 own", "64:ff9b::10.9.9.9", reasonOwn},
		{"NAT64 multicast", "64:ff9b::224.0.0.1", reasonMulticast},
		{"local NAT64 /96 metadata", "64:ff9b:1::169.254.169.254", reasonMetadata},
		{"local NAT64 /96 of another subprefix", "64:ff9b:1:fffe::169.254.169.254", reasonMetadata},
		{"local NAT64 /48 metadata", "64:ff9b:1:a9fe:a9:fe00::", reasonUnspecified},
		{"local NAT64 /48 metadata, suffix used", "64:ff9b:1:a9fe:a9:fe00:0808:0808", reasonMetadata},
		{"local NAT64 /56 metadata, suffix used", "64:ff9b:1:00a9:fe:a9fe:0808:0808", reasonMetadata},
		{"local NAT64 /64 metadata", "64:ff9b:1:0:a9:fea9:fe00:0", reasonMetadata},
		{"local NAT64 /64 metadata, suffix used", "64:ff9b:1:0:a9:fea9:fe08:0808", reasonMetadata},
		{"6to4 metadata", "2002:a9fe:a9fe::1", reasonMetadata},
		{"6to4 loopback", "2002:7f00:1::1", reasonLoopback},
		{"6to4 own", "2002:0a09:0909::1", reasonOwn},
		{"Teredo client metadata", "2001:0:808:808::5601:5601", reasonMetadata},
		{"Teredo server loopback", "2001:0:7f00:1::f7f7:f7f7", reasonLoopback},
	}
	s := scopeOf(t, everything, everything)
	for _, tt := range tests {
		v := s.Decide(Flow{TCP, netip.AddrPortFrom(netip.MustParseAddr(tt.addr), 80)})
		if v.Allowed || v.Reason != tt.reason {
			t.Errorf("%s (%s): %+v, want reason %q", tt.name, tt.addr, v, tt.reason)
		}
	}
}

func TestDecideWantsBothSpellings(t *testing.T) {
	tests := []struct {
		offered, addr string
		allowed       bool
	}{
		{"tcp [64:ff9b::/96]:80", "64:ff9b::10.0.0.5", false},
		{"tcp 10.0.0.0/8:80", "64:ff9b::10.0.0.5", false},
		{"tcp [64:ff9b::/96]:80|tcp 10.0.0.0/8:80", "64:ff9b::10.0.0.5", true},
		{"tcp [64:ff9b::/96]:80|tcp 10.0.0.0/8:81", "64:ff9b::10.0.0.5", false},
		{"tcp [64:ff9b::/96]:80|udp 10.0.0.0/8:80", "64:ff9b::10.0.0.5", false},
		{"tcp [64:ff9b::/96]:80|tcp internet:80", "64:ff9b::8.8.8.8", true},
		{"tcp [64:ff9b:1::/48]:80|tcp 10.0.0.0/8:80", "64:ff9b:1::10.0.0.5", true},
		{"tcp [2002::/16]:80|tcp 8.8.8.8:80", "2002:808:808::1", true},
		{"tcp [2002::/16]:80", "2002:808:808::1", false},
		{"tcp [2001::/32]:80|tcp 8.0.0.0/8:80", "2001:0:808:808::f7f7:f7f7", true},
		{"tcp [2001::/32]:80|tcp 8.8.8.9:80", "2001:0:808:808::f7f7:f7f7", false},
		{"tcp [::/96]:80|tcp 8.8.8.8:80", "::8.8.8.8", true},
	}
	for _, tt := range tests {
		v := scopeOf(t, tt.offered, "").Decide(Flow{TCP, netip.AddrPortFrom(netip.MustParseAddr(tt.addr), 80)})
		if v.Allowed != tt.allowed {
			t.Errorf("%s: %s gives %+v", tt.offered, tt.addr, v)
		}
	}
}

func TestDecideMalformed(t *testing.T) {
	ten := netip.MustParseAddr("10.0.0.1")
	tests := map[string]Flow{
		"no address":     {Proto: TCP},
		"no protocol":    {Dst: netip.AddrPortFrom(ten, 1)},
		"two protocols":  {Proto: TCP | UDP, Dst: netip.AddrPortFrom(ten, 1)},
		"other protocol": {Proto: 8, Dst: netip.AddrPortFrom(ten, 1)},
		"tcp port 0":     {Proto: TCP, Dst: netip.AddrPortFrom(ten, 0)},
		"udp port 0":     {Proto: UDP, Dst: netip.AddrPortFrom(ten, 0)},
		"zone":           {Proto: TCP, Dst: netip.MustParseAddrPort("[2606::1%eth0]:1")},
	}
	s := scopeOf(t, everything, everything)
	for name, f := range tests {
		if v := s.Decide(f); v.Allowed || v.Reason != reasonMalformed {
			t.Errorf("%s: %+v", name, v)
		}
	}
	var empty Scope
	if v := empty.Decide(Flow{TCP, netip.AddrPortFrom(ten, 1)}); v.Allowed {
		t.Error("the zero scope allows a flow")
	}
}

func TestDecideDoesNotAllocate(t *testing.T) {
	s := scopeOf(t, everything+"|tcp internet:*", everything)
	for _, text := range []string{"tcp 10.0.0.1:443", "tcp [64:ff9b::10.0.0.1]:443", "udp 127.0.0.1:1", "tcp [2606::1]:1"} {
		f := flowOf(t, text)
		if n := testing.AllocsPerRun(100, func() { s.Decide(f) }); n != 0 {
			t.Errorf("%s: %v allocations", text, n)
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	var lines []string
	for i := range 8 {
		lines = append(lines, "tcp 10.0."+string(rune('0'+i))+".0/24:443", "udp 10.0.0."+string(rune('1'+i))+":53")
	}
	s := &Scope{Offered: grantOf(b, append(lines, "tcp internet:443")...), Local: grantOf(b, split(everything)...)}
	s.Overlay = []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15")}
	for name, text := range map[string]string{
		"granted": "tcp 10.0.7.9:443", "denied": "tcp 10.1.0.1:443", "internet": "tcp 8.8.8.8:443", "metadata": "tcp 169.254.169.254:80",
	} {
		f := flowOf(b, text)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				s.Decide(f)
			}
		})
	}
}
