package nat

import (
	"net/netip"
	"testing"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/wire"
)

func observe(pairs ...string) (out []Observation) {
	for i := 0; i+1 < len(pairs); i += 2 {
		out = append(out, Observation{Server: netip.MustParseAddrPort(pairs[i]), Mapped: netip.MustParseAddrPort(pairs[i+1])})
	}
	return out
}

func TestClassify(t *testing.T) {
	const a1, a2, b1 = "203.0.113.1:3478", "203.0.113.1:3479", "203.0.113.9:3478"
	const six1, six2 = "[2001:db8::1]:3478", "[2001:db8::1]:3479"
	for name, c := range map[string]struct {
		seen       []Observation
		own        string
		mapping    wire.Mapping
		dependence Dependence
		public     string
		direct     bool
	}{
		"nothing":          {},
		"one server":       {seen: observe(a1, "198.51.100.7:4000"), public: "198.51.100.7:4000"},
		"one server twice": {seen: observe(a1, "198.51.100.7:4000", a1, "198.51.100.7:5000"), public: "198.51.100.7:5000"},
		"the same everywhere": {
			seen:    observe(a1, "198.51.100.7:4000", a2, "198.51.100.7:4000", b1, "198.51.100.7:4000"),
			mapping: wire.MappingEasy, dependence: EndpointIndependent, public: "198.51.100.7:4000",
		},
		"another port for another port": {
			seen:    observe(a1, "198.51.100.7:4000", a2, "198.51.100.7:4001"),
			mapping: wire.MappingHard, dependence: AddressAndPortDependent, public: "198.51.100.7:4000",
		},
		"another port for another address": {
			seen:    observe(a1, "198.51.100.7:4000", a2, "198.51.100.7:4000", b1, "198.51.100.7:4001"),
			mapping: wire.MappingHard, dependence: AddressDependent, public: "198.51.100.7:4000",
		},
		"a pool of addresses": {
			seen:    observe(a1, "198.51.100.7:4000", b1, "198.51.100.8:4000"),
			mapping: wire.MappingHard, dependence: AddressDependent, public: "198.51.100.7:4000",
		},
		"no nat, one server": {
			seen: observe(a1, "198.51.100.7:4000"), own: "198.51.100.7:4000",
			mapping: wire.MappingEasy, dependence: EndpointIndependent, public: "198.51.100.7:4000", direct: true,
		},
		"own address, but another port": {
			seen: observe(a1, "198.51.100.7:4001"), own: "198.51.100.7:4000", public: "198.51.100.7:4001",
		},
		"ipv4 decides": {
			seen:    observe(six1, "[2001:db8::7]:4000", six2, "[2001:db8::7]:4000", a1, "198.51.100.7:4000", a2, "198.51.100.7:4001"),
			own:     "[2001:db8::7]:4000",
			mapping: wire.MappingHard, dependence: AddressAndPortDependent, public: "198.51.100.7:4000",
		},
		"ipv6 alone": {
			seen: observe(six1, "[2001:db8::7]:4000", six2, "[2001:db8::7]:4000"), own: "[2001:db8::7]:4000",
			mapping: wire.MappingEasy, dependence: EndpointIndependent, public: "[2001:db8::7]:4000", direct: true,
		},
		"as a dual-stack socket shows it": {
			seen:    observe("[::ffff:203.0.113.1]:3478", "[::ffff:198.51.100.7]:4000", a2, "198.51.100.7:4000"),
			mapping: wire.MappingEasy, dependence: EndpointIndependent, public: "198.51.100.7:4000",
		},
	} {
		t.Run(name, func(t *testing.T) {
			var own []netip.AddrPort
			if c.own != "" {
				own = append(own, netip.MustParseAddrPort(c.own))
			}
			got := Classify(c.seen, own)
			public := ""
			if got.Public.IsValid() {
				public = got.Public.String()
			}
			if got.Mapping != c.mapping || got.Dependence != c.dependence || public != c.public || got.Direct != c.direct {
				t.Errorf("got %+v", got)
			}
		})
	}
}

func drawObservations(t *rapid.T) []Observation {
	addr := rapid.Custom(func(t *rapid.T) netip.AddrPort {
		host := rapid.SampledFrom([]string{"203.0.113.1", "203.0.113.2", "2001:db8::1", "::ffff:203.0.113.1"}).Draw(t, "host")
		return netip.AddrPortFrom(netip.MustParseAddr(host), rapid.Uint16Range(1, 3).Draw(t, "port"))
	})
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Observation {
		return Observation{Server: addr.Draw(t, "server"), Mapped: addr.Draw(t, "mapped")}
	}), 0, 6).Draw(t, "observations")
}

// Easy is claimed only where nothing that was seen speaks against it, and the order of the servers does not matter.
func TestClassifyNeverCallsHardEasy(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seen := drawObservations(t)
		got := Classify(seen, nil)
		last := map[netip.AddrPort]netip.AddrPort{} // over IPv4
		for _, o := range seen {
			if server := plain(o.Server); server.Addr().Is4() {
				last[server] = plain(o.Mapped)
			}
		}
		distinct := map[netip.AddrPort]bool{}
		for _, mapped := range last {
			distinct[mapped] = true
		}
		if got.Mapping == wire.MappingEasy && len(distinct) > 1 {
			t.Fatalf("easy, though seen as %v", distinct)
		}
		if got.Mapping != wire.MappingUnknown && got.Destinations < 2 {
			t.Fatalf("%s after %d destinations", got.Mapping, got.Destinations)
		}
		reversed := map[netip.AddrPort]bool{}
		var back []Observation
		for i := len(seen) - 1; i >= 0; i-- {
			if s := plain(seen[i].Server); !reversed[s] {
				reversed[s] = true
				back = append(back, seen[i])
			}
		}
		if again := Classify(back, nil); again.Mapping != got.Mapping || again.Dependence != got.Dependence {
			t.Fatalf("%v forwards, %v backwards", got, again)
		}
	})
}
