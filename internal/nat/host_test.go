package nat

import (
	"fmt"
	"net"
	"testing"

	"github.com/culvertnet/culvert/internal/wire"
	"github.com/google/go-cmp/cmp"
)

func cidrs(t *testing.T, list ...string) (out []net.Addr) {
	t.Helper()
	for _, s := range list {
		ip, n, err := net.ParseCIDR(s)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, &net.IPNet{IP: ip, Mask: n.Mask})
	}
	return out
}

func TestHostCandidatesOf(t *testing.T) {
	lo := hostInterface{"lo", true, cidrs(t, "127.0.0.1/8", "::1/128")}
	for name, c := range map[string]struct {
		ifaces []hostInterface
		want   []string
	}{
		"nothing": {nil, nil},
		"loopback only where there is nothing else": {[]hostInterface{lo}, []string{"127.0.0.1:9", "[::1]:9"}},
		"families take turns": {
			[]hostInterface{lo, {"eth0", false, cidrs(t, "192.0.2.5/24", "192.0.2.6/24", "2001:db8::5/64", "fe80::5/64")}},
			[]string{"192.0.2.5:9", "[2001:db8::5]:9", "192.0.2.6:9"},
		},
		"an address on loopback is no use elsewhere": {
			[]hostInterface{{"lo", true, cidrs(t, "127.0.0.1/8", "198.51.100.1/32")}, {"eth0", false, cidrs(t, "192.0.2.5/24")}},
			[]string{"192.0.2.5:9"},
		},
		"skipped names": {
			[]hostInterface{{"docker0", false, cidrs(t, "172.17.0.1/16")}, {"br-1a2b", false, cidrs(t, "172.18.0.1/16")}, {"eth0", false, cidrs(t, "192.0.2.5/24")}},
			[]string{"192.0.2.5:9"},
		},
		"link-local, unspecified and doubles": {
			[]hostInterface{lo, {"eth0", false, cidrs(t, "169.254.1.1/16", "fe80::1/64", "0.0.0.0/0", "192.0.2.5/24")}, {"eth1", false, cidrs(t, "192.0.2.5/32")}},
			[]string{"192.0.2.5:9"},
		},
		"other kinds of address": {
			[]hostInterface{{"eth0", false, append(cidrs(t, "192.0.2.5/24"), &net.UnixAddr{Name: "x"})}},
			[]string{"192.0.2.5:9"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, cand := range hostCandidates(c.ifaces, 9, SkipVirtual) {
				if cand.Kind != wire.Host {
					t.Errorf("%v is not a host candidate", cand)
				}
				got = append(got, cand.Addr.String())
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestHostCandidatesAreBounded(t *testing.T) {
	var many []string
	for i := range 100 {
		many = append(many, fmt.Sprintf("192.0.2.%d/24", i+1))
	}
	got := hostCandidates([]hostInterface{{"eth0", false, cidrs(t, append(many, "2001:db8::5/64")...)}}, 9, nil)
	if len(got) != wire.MaxCandidates {
		t.Errorf("%d candidates", len(got))
	}
	if got[1].Addr.Addr().Is4() {
		t.Error("many IPv4 addresses crowd out the IPv6 one")
	}
}

func TestHostCandidatesHere(t *testing.T) {
	got, err := HostCandidates(4711, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range got {
		if c.Addr.Port() != 4711 || !c.Addr.Addr().IsValid() || c.Addr.Addr().IsLinkLocalUnicast() {
			t.Errorf("candidate %v", c)
		}
	}
	all, err := HostCandidates(4711, func(string) bool { return true })
	if err != nil || len(all) != 0 {
		t.Errorf("got %v, %v with every interface skipped", all, err)
	}
}
