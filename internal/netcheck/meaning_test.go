package netcheck

import (
	"bytes"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

var (
	seen4 = netip.MustParseAddrPort("203.0.113.7:4000")
	stun4 = netip.MustParseAddrPort("203.0.113.1:3478")
	stun6 = netip.MustParseAddrPort("[2001:db8::1]:3478")
)

func works(ok bool) *Way {
	if ok {
		return &Way{Works: true, RTT: 1}
	}
	return &Way{Error: "no answer"}
}

func TestJudge(t *testing.T) {
	for name, c := range map[string]struct {
		udp       bool
		mapping   wire.Mapping
		filtering nat.Dependence
		relayUDP  bool
		relayWS   bool
		want      [3]Path
		possible  bool
		says      string
	}{
		"full cone":               {true, wire.MappingEasy, nat.AddressDependent, true, true, [3]Path{PathDirect, PathDirect, PathDirect}, true, "every gateway"},
		"easy":                    {true, wire.MappingEasy, nat.AddressAndPortDependent, true, true, [3]Path{PathDirect, PathDirect, PathProbing}, true, "behind hard NATs direct after"},
		"easy, filtering unknown": {true, wire.MappingEasy, "", true, true, [3]Path{PathDirect, PathDirect, PathProbing}, true, "easy NAT"},
		"easy without relays":     {true, wire.MappingEasy, "", false, false, [3]Path{PathDirect, PathDirect, PathProbing}, true, "no relay can be reached"},
		"easy, relays by HTTPS":   {true, wire.MappingEasy, "", false, true, [3]Path{PathDirect, PathDirect, PathProbing}, true, "which is slower"},
		"hard":                    {true, wire.MappingHard, nat.AddressAndPortDependent, true, true, [3]Path{PathDirect, PathProbing, PathUDP}, true, "relayed to hard ones"},
		"hard, relays by HTTPS":   {true, wire.MappingHard, "", false, true, [3]Path{PathDirect, PathProbing, PathWebSocket}, true, "relayed to hard ones"},
		"hard without relays":     {true, wire.MappingHard, "", false, false, [3]Path{PathDirect, PathProbing, PathNone}, true, "no path to hard ones"},
		"not known":               {true, wire.MappingUnknown, "", true, true, [3]Path{PathDirect, PathProbing, PathUDP}, true, "second STUN port"},
		"no udp":                  {false, "", "", false, true, [3]Path{PathWebSocket, PathWebSocket, PathWebSocket}, true, "relayed over HTTPS"},
		"nothing":                 {false, "", "", false, false, [3]Path{PathNone, PathNone, PathNone}, false, "no tunnel"},
	} {
		t.Run(name, func(t *testing.T) {
			r := &Report{
				Coordinator: Coordinator{Reachable: true}, UDP: UDP{Works: c.udp}, NAT: NAT{Present: true, Mapping: c.mapping, Filtering: c.filtering},
				Relays: []Relay{{Name: "r", UDP: works(c.relayUDP), WebSocket: works(c.relayWS)}},
			}
			got := judge(r)
			if p := got.Paths; [3]Path{p.Public, p.Easy, p.Hard} != c.want || got.Possible != c.possible {
				t.Errorf("got %+v", got)
			}
			if !strings.Contains(strings.Join(got.Meaning, "\n"), c.says) {
				t.Errorf("says %q, not %q", got.Meaning, c.says)
			}
		})
	}
}

func TestExplainMTU(t *testing.T) {
	for _, c := range []struct {
		server netip.AddrPort
		bytes  int
		says   string
	}{
		{stun4, 1500, ""}, {stun4, 1484, ""}, {stun4, 1480, "1416 instead of 1420"}, {stun4, 1400, "at most 1336"}, {stun4, 1300, "less than a tunnel needs"},
		{stun6, 1500, ""}, {stun6, 1480, "at most 1396"}, {stun6, 1280, "less than"},
	} {
		var said string
		r := &Report{Coordinator: Coordinator{Reachable: true}, UDP: UDP{Works: true}, MTU: &MTU{c.server, c.bytes}, NAT: NAT{Mapping: wire.MappingEasy}}
		for _, line := range judge(r).Meaning {
			if strings.HasPrefix(line, "packets of") {
				said = line
			}
		}
		if (said == "") != (c.says == "") || !strings.Contains(said, c.says) {
			t.Errorf("%d bytes to %s: %q, want %q", c.bytes, c.server, said, c.says)
		}
	}
}

func drawReport(t *rapid.T) *Report {
	pick := func(name string) bool { return rapid.Bool().Draw(t, name) }
	r := &Report{
		Coordinator: Coordinator{Reachable: pick("reachable")}, UDP: UDP{Works: pick("udp")},
		NAT: NAT{
			Mapping:   rapid.SampledFrom([]wire.Mapping{"", wire.MappingEasy, wire.MappingHard}).Draw(t, "mapping"),
			Filtering: rapid.SampledFrom([]nat.Dependence{"", nat.EndpointIndependent, nat.AddressDependent, nat.AddressAndPortDependent}).Draw(t, "filtering"),
		},
		Relays: []Relay{{UDP: works(pick("relay udp")), WebSocket: works(pick("relay websocket"))}},
	}
	if !r.UDP.Works {
		r.Relays[0].UDP = works(false)
	}
	return r
}

var rank = map[Path]int{PathDirect: 4, PathProbing: 3, PathUDP: 2, PathWebSocket: 1, PathNone: 0}

// A gateway that is easier to reach never gets a worse path, something is always said, and a tunnel is possible exactly where
// there is some path.
func TestJudgeIsConsistent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := drawReport(t)
		got := judge(r)
		p := got.Paths
		if rank[p.Public] < rank[p.Easy] || rank[p.Easy] < rank[p.Hard] {
			t.Fatalf("%+v", p)
		}
		if got.Possible != (p.Public != PathNone) || len(got.Meaning) == 0 {
			t.Fatalf("%+v", got)
		}
		if !r.UDP.Works && rank[p.Public] > rank[PathWebSocket] {
			t.Fatalf("%+v without UDP", p)
		}
	})
}

func TestText(t *testing.T) {
	write := func(r *Report) string {
		var b bytes.Buffer
		if err := r.WriteText(&b); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	own := netip.MustParseAddr("192.168.1.10")
	r := &Report{
		Coordinator: Coordinator{URL: "https://culvert.example.com", Reachable: true, RTT: 12.3, TLS: &TLS{Version: "TLS 1.3", Issuer: "Example CA"}},
		Proxy:       &Proxy{URL: "http://proxy:3128"},
		UDP:         UDP{Works: true, Servers: []STUNServer{{Server: stun4, Mapped: &seen4}, {Server: stun6}}},
		NAT:         NAT{Present: true, Mapping: wire.MappingHard, Depends: nat.AddressAndPortDependent, Filtering: nat.AddressAndPortDependent},
		IPv4:        Family{Addresses: []netip.Addr{own}, Public: &seen4},
		MTU:         &MTU{stun4, 1500},
		Relays:      []Relay{{Name: "eu", UDP: works(true), WebSocket: works(false)}, {Name: "us", WebSocket: works(true)}},
	}
	r.Tunnel = judge(r)
	for _, want := range []string{
		"coordinator  https://culvert.example.com, 12.3 ms, TLS 1.3, certificate from Example CA\n",
		"proxy        http://proxy:3128\n",
		"udp          gets out, 1 of 2 servers answer\n",
		"nat          hard: mapping address-and-port-dependent, filtering address-and-port-dependent\n",
		"ipv4         192.168.1.10, seen as 203.0.113.7\n",
		"ipv6         none\n",
		"path mtu     1500\n",
		"relay eu     udp 1.0 ms, websocket: no answer\n",
		"relay us     websocket 1.0 ms\n",
		"gateways     public: direct, behind an easy NAT: probing, behind a hard one: relay-udp\n",
	} {
		if !strings.Contains(write(r), want) {
			t.Errorf("no %q in\n%s", want, write(r))
		}
	}
	r = &Report{Coordinator: Coordinator{Error: "it cannot be reached", Next: "open the firewall"}, UDP: UDP{Servers: []STUNServer{{Server: stun4}}}}
	r.Tunnel = judge(r)
	for _, want := range []string{"coordinator  it cannot be reached\n", "next: open the firewall\n", "proxy        none\n",
		"does not get out: none of 1 servers answers\n", "nat          not known without UDP\n"} {
		if !strings.Contains(write(r), want) {
			t.Errorf("no %q in\n%s", want, write(r))
		}
	}
	public := Family{Addresses: []netip.Addr{seen4.Addr()}, Public: &seen4}
	if got := public.text(); got != "203.0.113.7 (public)" {
		t.Errorf("a public address: %q", got)
	}
}

// fields lists the JSON paths of a type, as the documentation writes them.
func fields(typ reflect.Type, prefix string) (out []string) {
	switch typ.Kind() {
	case reflect.Pointer, reflect.Slice:
		if typ.Kind() == reflect.Slice {
			prefix += "[]"
		}
		return fields(typ.Elem(), prefix)
	case reflect.Struct:
		if typ.PkgPath() != reflect.TypeFor[Report]().PkgPath() && typ.Name() != "" {
			return []string{prefix} // an address or a time, which is text
		}
		for i := range typ.NumField() {
			name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			out = append(out, fields(typ.Field(i).Type, strings.TrimPrefix(prefix+"."+name, "."))...)
		}
		return out
	}
	return []string{prefix}
}

// Every field of the JSON is in the documentation, and every field there exists.
func TestDocumentation(t *testing.T) {
	text, err := os.ReadFile("../../docs/netcheck.md")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{}
	for _, f := range fields(reflect.TypeFor[Report](), "") {
		want[f] = true
		if !strings.Contains(string(text), "\n| `"+f+"` |") {
			t.Errorf("docs/netcheck.md does not describe `%s`", f)
		}
	}
	for line := range strings.Lines(string(text)) {
		if name, ok := strings.CutPrefix(line, "| `"); ok {
			if name, _, _ = strings.Cut(name, "`"); !want[name] {
				t.Errorf("docs/netcheck.md describes `%s`, which does not exist", name)
			}
		}
	}
}
