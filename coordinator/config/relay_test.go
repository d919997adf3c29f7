package config

import (
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func parse(t *testing.T, doc string) *Config {
	t.Helper()
	c, err := Parse("culvert.yaml", []byte(doc))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestListedRelays(t *testing.T) {
	udp := &net.UDPAddr{Port: 3479}
	two := wire.Relay{Name: "two", UDP: "relay.example.com:3478", URL: "https://relay.example.com/v1/relay"}
	three := wire.Relay{Name: "three", URL: "https://three.example.com/culvert/relay"}
	own := wire.Relay{Name: "one", UDP: ":3479", URL: "https://culvert.example.com/v1/relay"}
	for name, c := range map[string]struct {
		edit string // of the relay key
		udp  net.Addr
		want []wire.Relay
	}{
		"own first":     {"relay: {name: one}", udp, []wire.Relay{own, two, three}},
		"without UDP":   {"relay: {name: one}", nil, []wire.Relay{{Name: "one", URL: own.URL}, two, three}},
		"default name":  {"relay: {}", udp, []wire.Relay{{Name: wire.OwnRelay, UDP: own.UDP, URL: own.URL}, two, three}},
		"none":          {"relay: off", udp, []wire.Relay{two, three}},
		"listed itself": {"relay: {name: three}", udp, []wire.Relay{three, two}},
	} {
		got := parse(t, strings.Replace(whole, "relay: {name: one}", c.edit, 1)).ListedRelays(c.udp)
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

func TestRelayLimits(t *testing.T) {
	c := parse(t, minimal+"relay: {rate_mbit: 80, queue_kib: 128, sessions: 7}")
	if c.Relay.BytesPerSecond() != 10_000_000 || c.Relay.QueueBytes() != 131072 || c.Relay.Sessions != 7 {
		t.Errorf("relay %+v", c.Relay)
	}
	if c = parse(t, minimal); c.Relay.BytesPerSecond() != 0 || c.Relay.QueueBytes() != 0 {
		t.Errorf("relay %+v: want what the relay itself takes for default", c.Relay)
	}
}

func TestListedSTUN(t *testing.T) {
	ports := []net.Addr{&net.UDPAddr{Port: 3478}, nil, &net.UDPAddr{Port: 3479}}
	if d := cmp.Diff([]string{":3478", ":3479"}, parse(t, minimal).ListedSTUN(ports...)); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{"stun.example.com:3478"}, parse(t, whole).ListedSTUN(ports...)); d != "" {
		t.Error(d)
	}
	if got := parse(t, minimal).ListedSTUN(nil, nil); len(got) != 0 {
		t.Errorf("without UDP: %q", got)
	}
}

func TestPorts(t *testing.T) {
	for _, c := range []struct{ add, udp, probe string }{
		{"", ":3478", ":3479"},
		{"udp: off", "", ""},
		{"udp: off\nprobe: off", "", ""},
		{`udp: "127.0.0.1:0"`, "127.0.0.1:0", "127.0.0.1:0"},
		{`udp: ":65535"`, ":65535", ""},
		{`udp: "[::1]:9"`, "[::1]:9", "[::1]:10"},
		{"probe: off", ":3478", ""},
		{`probe: "10.0.0.1:53"`, ":3478", "10.0.0.1:53"},
		{"udp: fly-global-services:3478", "fly-global-services:3478", "fly-global-services:3479"},
		{"udp: \":0\"\nprobe: \":0\"", ":0", ":0"},
	} {
		if got := parse(t, minimal+c.add); got.UDP != c.udp || got.Probe != c.probe || got.ProbeChosen != strings.Contains(c.add, "probe") {
			t.Errorf("%q: %q and %q", c.add, got.UDP, got.Probe)
		}
	}
}

func TestRelaysRefused(t *testing.T) {
	for add, want := range map[string]string{
		"udp: off\nprobe: \":9\"":                                    "a second STUN port without a first",
		`probe: ":3478"`:                                             "the same address",
		"udp: \"-x:9\"":                                              "not an address to listen on",
		"udp: \"a_b:9\"":                                             "not an address to listen on",
		"udp: \"name:0\"":                                            "not an address to listen on",
		`probe: "x"`:                                                 "not an address to listen on",
		"relay: yes":                                                 "has to be a mapping",
		"relay: {naem: x}":                                           "unknown key",
		"relay: {name: A B}":                                         "no name for a relay",
		"relays: [{name: a}]":                                        "no address",
		"relays: [{url: \"https://a.example\"}]":                     "no name for a relay",
		"relays: [{name: a, udp: \":3478\"}]":                        "not host:port",
		"relays: [{name: a, udp: \"r.example\"}]":                    "not host:port",
		"relays: [{name: a, url: \"http://r.example\"}]":             "loopback only",
		"relays: [{name: a, url: \"wss://r.example\"}]":              "not an http or https URL",
		"relays: [{name: a, url: \"https://u:p@r.example\"}]":        "credentials",
		"relays: [{name: a, udp: \"r:1\"}, {name: a, udp: \"r:2\"}]": "listed twice",
		"relays: [" + strings.Repeat("{name: a, udp: \"r:1\"},", 16) + "]": "more than 15 relays",
	} {
		_, err := Parse("culvert.yaml", []byte(minimal+add))
		if problem.CodeOf(err) != problem.BadConfig || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", add, err)
		}
	}
}
