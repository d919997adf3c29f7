package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/culvertnet/culvert/internal/problem"
)

const ticketKey = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"

const wholeRelay = `name: fra-1
ticket_keys: [AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8]
udp: ":3480"
probe: 127.0.0.1:3490
listen: ":8443"
tls: {cert: c.pem, key: k.pem}
trusted_proxies: [10.0.0.0/8]
limits: {rate_mbit: 1000, queue_kib: 256, sessions: 500, websockets: 100}
metrics: 127.0.0.1:9092
`

const minimalRelay = "ticket_keys: [" + ticketKey + "]\ntls: {cert: c.pem, key: k.pem}\n"

func TestStandalone(t *testing.T) {
	s, err := ParseStandalone("dir/relay.yaml", []byte(wholeRelay))
	if err != nil {
		t.Fatal(err)
	}
	if s.Relay.Name != "fra-1" || len(s.TicketKeys) != 1 || s.TicketKeys[0][31] != 31 || s.UDP != ":3480" || s.Probe != "127.0.0.1:3490" ||
		!s.ProbeChosen || s.Listen != ":8443" || s.TLS.Cert != filepath.Join("dir", "c.pem") || len(s.TrustedProxies) != 1 ||
		s.Relay.BytesPerSecond() != 125_000_000 || s.Relay.QueueBytes() != 256<<10 || s.Relay.Sessions != 500 || s.WebSockets != 100 ||
		s.Metrics != "127.0.0.1:9092" {
		t.Errorf("got %+v", s)
	}
	if s, err = ParseStandalone("relay.yaml", []byte(minimalRelay)); err != nil {
		t.Fatal(err)
	}
	if s.Relay.Name != "relay" || s.UDP != DefaultUDP || s.Probe != ":3479" || s.ProbeChosen || s.Listen != DefaultListen || s.Metrics != "" {
		t.Errorf("got %+v", s)
	}
	if s, err = ParseStandalone("relay.yaml", []byte(minimalRelay+"udp: off\n")); err != nil || s.UDP != "" || s.Probe != "" {
		t.Errorf("without UDP: %+v, %v", s, err)
	}
}

func TestStandaloneRefuses(t *testing.T) {
	for _, c := range []struct{ old, new, want string }{
		{"ticket_keys: [" + ticketKey + "]", "", "relay.yaml:1:1: no coordinator's public key"},
		{ticketKey, "short", `relay.yaml:2:15: "short" is not a public key`},
		{ticketKey, ticketKey + "AA", "is not a public key"},
		{"name: fra-1", "name: FRA", `relay.yaml:1:7: "FRA" is no name for a relay`},
		{`":3480"`, "nonsense", `relay.yaml:3:6: "nonsense" is not an address`},
		{"127.0.0.1:3490", `":3480"`, "probe and udp are the same address"},
		{"tls: {cert: c.pem, key: k.pem}", "tls: {cert: c.pem}", "tls needs both cert and key"},
		{"tls: {cert: c.pem, key: k.pem}\ntrusted_proxies: [10.0.0.0/8]\n", "", "without tls, only loopback"},
		{"10.0.0.0/8", "everybody", "neither an address nor a CIDR"},
		{"rate_mbit: 1000", "rate_mbit: -1", "relay.yaml:8:21: -1 is not between 1 and 1000000"},
		{"queue_kib: 256", "queue_kib: 1", "1 is not between 64 and 65536"},
		{"sessions: 500", "sessions: -5", "is not between"},
		{"websockets: 100", "websockets: 9999999", "is not between"},
		{"metrics: 127.0.0.1:9092", "metrics: nowhere", "is not an address"},
		{"limits:", "limit:", "relay.yaml:8:1: "},
		{"metrics:", "---\nmetrics:", "relay.yaml:9"},
	} {
		if !strings.Contains(wholeRelay, c.old) {
			t.Fatalf("the test changes nothing: %s", c.old)
		}
		_, err := ParseStandalone("relay.yaml", []byte(strings.Replace(wholeRelay, c.old, c.new, 1)))
		if problem.CodeOf(err) != problem.BadConfig || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v", c.new, err)
		}
	}
	if _, err := LoadStandalone("missing.yaml"); problem.CodeOf(err) != problem.BadConfig || !strings.Contains(err.Error(), "cannot read missing.yaml") {
		t.Errorf("got %v", err)
	}
}

func TestStandaloneSchema(t *testing.T) {
	s := compiled(t, "relay")
	for _, text := range []string{wholeRelay, minimalRelay, minimalRelay + "udp: off\n"} {
		if err := s.Validate(asJSON(t, text)); err != nil {
			t.Error(err)
		}
	}
	for _, text := range []string{minimalRelay + "rate: 5\n", "tls: {cert: c, key: k}\n", minimalRelay + "limits: {sessions: many}\n"} {
		if s.Validate(asJSON(t, text)) == nil {
			t.Errorf("taken: %s", text)
		}
	}
}

// TestCheckKnowsARelaysFile: check judges a relay's file as one, with its own mistakes.
func TestCheckKnowsARelaysFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "relay.yaml")
	for content, want := range map[string]string{
		minimalRelay:                        "ok, a relay's",
		minimalRelay + "rules: []\n":        `unknown key "rules"`,
		minimalRelay + "metrics: nowhere\n": "is not an address to listen on",
		"ticket_keys: [x]\n":                "is not a public key",
	} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		r := CheckReport(file, false)
		r.WriteText(&out)
		if !strings.Contains(out.String(), want) || !r.Relay || r.OK != strings.HasPrefix(want, "ok") {
			t.Errorf("%q: %+v\n%s", content, r, out.String())
		}
	}
	if r := CheckRelay(filepath.Join(t.TempDir(), "none"), true); r.OK || r.Errors != 1 {
		t.Errorf("%+v", r)
	}
}
