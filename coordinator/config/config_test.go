package config

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/problem"
)

const secretHash = "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"

// whole is a file that uses every key.
const whole = `
url: https://culvert.example.com/
listen: ":8443"
tls: {cert: tls/cert.pem, key: /etc/key.pem}
trusted_proxies: [10.0.0.0/8, "192.0.2.1", "2001:db8::/32"]
udp: ":3479"
state: {dir: data}
issuers:
  - url: https://token.actions.githubusercontent.com
  - {url: https://ghes.example.com/_services/token, jwks_file: ghes.json}
networks:
  corp:
    sessions: 100.99.0.0/24
    services: 100.99.1.0/24
    gateways:
      - {issuer: https://oidc.example.com/cluster, subject: "system:serviceaccount:culvert:gateway"}
      - {enrol_sha256: ` + secretHash + `}
  lab:
    gateways: [{enrol_sha256: ` + secretHash + `}]
stun: ["stun.example.com:3478"]
lease: 5m
rules:
  - name: deploy
    network: corp
    match: {repository_owner_id: 9919, ref: ["refs/heads/main", "refs/tags/v*"]}
    allow: ["tcp 10.20.0.5:5432"]
    max_session: 2h
probe: ":4000"
relay: {name: one}
relays:
  - {name: two, udp: "relay.example.com:3478", url: "https://relay.example.com"}
  - {name: three, url: "https://three.example.com/culvert/relay"}
`

// minimal is the shortest useful file.
const minimal = `
url: https://culvert.example.com
tls: {cert: c.pem, key: k.pem}
state: {dir: /var/lib/culvert}
networks: {corp: {gateways: [{enrol_sha256: ` + secretHash + `}]}}
rules:
  - {name: deploy, network: corp, match: {repository_owner_id: 9919}, allow: ["tcp 10.20.0.5:5432"]}
`

func TestParseWhole(t *testing.T) {
	c, err := Parse("/etc/culvert/culvert.yaml", []byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	if c.URL != "https://culvert.example.com" || c.Listen != ":8443" || c.UDP != ":3479" || c.Probe != ":4000" || c.Lease != 5*time.Minute {
		t.Errorf("got %q %q %q %s", c.URL, c.Listen, c.UDP, c.Lease)
	}
	if want := (TLS{"/etc/culvert/tls/cert.pem", "/etc/key.pem"}); *c.TLS != want {
		t.Errorf("tls %v, want %v: paths are relative to the file", *c.TLS, want)
	}
	if c.State.Dir != "/etc/culvert/data" {
		t.Errorf("state in %q", c.State.Dir)
	}
	proxies := []string{"10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32"}
	for i, p := range c.TrustedProxies {
		if p.String() != proxies[i] {
			t.Errorf("proxy %d is %s, want %s", i, p, proxies[i])
		}
	}
	issuers := []claims.Issuer{{URL: claims.GitHub}, {URL: "https://ghes.example.com/_services/token", JWKSFile: "/etc/culvert/ghes.json"}}
	if d := cmp.Diff(issuers, c.Issuers); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{"corp", "lab"}, c.NetworkNames()); d != "" {
		t.Error(d)
	}
	if c.Policy == nil || len(c.Rules) != 1 || c.Rules[0].MaxSession != 2*time.Hour {
		t.Errorf("rules %+v", c.Rules)
	}
}

func TestNetwork(t *testing.T) {
	c, err := Parse("culvert.yaml", []byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	gateway := []netip.Addr{netip.MustParseAddr("100.99.0.1"), netip.MustParseAddr("fd63:756c:7665:7274::6463:1")}
	if d := cmp.Diff(gateway, c.Networks["corp"].Gateway(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Error(d)
	}
	if got := c.Networks["lab"].Gateway()[0].String(); got != "198.18.0.1" {
		t.Errorf("default gateway address %s", got)
	}
	if got := c.Networks["lab"].Overlay(); len(got) != 3 || got[0] != DefaultSessions || got[1] != DefaultServices {
		t.Errorf("overlay %v", got)
	}
	if got := c.GatewayIssuers(); len(got) != 1 || got[0].URL != "https://oidc.example.com/cluster" {
		t.Errorf("gateway issuers %v", got)
	}
	e := c.Networks["corp"].Gateways[1]
	if e.Issuer != "" || e.SecretSHA256[0] != 0x5f || e.SecretSHA256[31] != 0xef {
		t.Errorf("enrolment %+v", e)
	}
}

func TestDefaults(t *testing.T) {
	c, err := Parse("culvert.yaml", []byte(minimal))
	if err != nil {
		t.Fatal(err)
	}
	if c.Listen != DefaultListen || c.UDP != DefaultUDP || c.Probe != ":3479" || c.Lease != DefaultLease {
		t.Errorf("got %q %q %s", c.Listen, c.UDP, c.Lease)
	}
	if len(c.Issuers) != 1 || c.Issuers[0].URL != claims.GitHub {
		t.Errorf("issuers %v, want GitHub's", c.Issuers)
	}
}

// TestRefused changes one thing of a good file and wants to be told what and where.
func TestRefused(t *testing.T) {
	for _, c := range []struct{ name, old, new, where, want string }{
		{"no url", "url: https://culvert.example.com/\n", "", "", "url is missing"},
		{"no scheme", "https://culvert.example.com/", "culvert.example.com", "2:6", "not an http or https URL"},
		{"query", "https://culvert.example.com/", "https://culvert.example.com/?x=1", "2:6", "query"},
		{"credentials", "https://culvert.example.com/", "https://u:p@culvert.example.com/", "2:6", "credentials"},
		{"plain http", "https://culvert.example.com/", "http://culvert.example.com/", "2:6", "loopback only"},
		{"github.com", "https://culvert.example.com/", "https://GitHub.com/culvert", "2:6", "audience"},
		{"unknown key", "udp:", "upd:", "6:1", "upd"},
		{"bad listen", `":8443"`, `"8443"`, "3:9", "listen"},
		{"acme and tls", "udp:", "acme: {email: a@b.c}\nudp:", "6:", "both tls and acme"},
		{"acme without email", "tls: {cert: tls/cert.pem, key: /etc/key.pem}", "acme: {directory: \"https://ca.example.com/dir\"}", "4:", "no mail address"},
		{"acme with a name for email", "tls: {cert: tls/cert.pem, key: /etc/key.pem}", "acme: {email: ops}", "4:", "no mail address"},
		{"acme over http", "tls: {cert: tls/cert.pem, key: /etc/key.pem}", "acme: {email: a@b.c, directory: \"http://ca.example.com/dir\"}", "4:", "loopback only"},
		{"acme's listener", "tls: {cert: tls/cert.pem, key: /etc/key.pem}", "acme: {email: a@b.c, http: \"80\"}", "4:", "not an address to listen on"},
		{"acme's typo", "tls: {cert: tls/cert.pem, key: /etc/key.pem}", "acme: {mail: a@b.c}", "4:", "mail"},
		{"a limit below zero", "networks:", "limits: {total: -1}\nnetworks:", "", "total is below zero"},
		{"a limit that is no number", "networks:", "limits: {total: .nan}\nnetworks:", "", "total is no number"},
		{"a limit without end", "networks:", "limits: {owner: .inf}\nnetworks:", "", "owner is no number"},
		{"half tls", "tls: {cert: tls/cert.pem, key: /etc/key.pem}", "tls: {cert: x}", "4:", "both cert and key"},
		{"bad proxy", `"192.0.2.1"`, `"proxy"`, "5:", "neither an address nor a CIDR"},
		{"no state", "state: {dir: data}\n", "", "", "state has no place"},
		{"two states", "{dir: data}", "{dir: data, nats: [\"tls://n:4222\"]}", "7:", "both dir and nats"},
		{"credentials for nothing", "{dir: data}", "{dir: data, credentials: f}", "7:", "credentials without nats"},
		{"elections of nobody", "{dir: data}", "{dir: data, elections: f}", "7:", "elections without nats"},
		{"secret in nats url", "{dir: data}", "{nats: ['tls://u:p@n:4222']}", "7:", "credentials in it"},
		{"issuer over http", "https://ghes.example.com", "http://ghes.example.com", "10:", "loopback only"},
		{"GitHub itself as issuer", "https://ghes.example.com/_services/token", "https://github.com", "10:", "token.actions.githubusercontent.com"},
		{"GHE.com itself as issuer", "https://ghes.example.com/_services/token", "https://acme.ghe.com", "10:", "https://token.actions.acme.ghe.com"},
		{"issuer with a slash", "https://ghes.example.com/_services/token", "https://ghes.example.com/_services/token/", "10:", "write https://ghes.example.com/_services/token"},
		{"issuer in capitals", "https://ghes.example.com/_services/token", "https://Token.Actions.githubusercontent.com", "10:", "write https://token.actions"},
		{"issuer twice", "https://ghes.example.com/_services/token", "https://token.actions.githubusercontent.com", "10:", "twice"},
		{"network name", "  lab:", "  La_b:", "", "no name for a network"},
		{"sessions not IPv4", "100.99.0.0/24", "fd00::/64", "13:", "no IPv4 range"},
		{"sessions too small", "100.99.0.0/24", "100.99.0.0/30", "13:", "no IPv4 range"},
		{"host bits", "100.99.0.0/24", "100.99.0.9/24", "13:", "100.99.0.0/24"},
		{"overlap", "services: 100.99.1.0/24", "services: 100.99.0.0/16", "", "overlap"},
		{"nobody may be gateway", "gateways: [{enrol_sha256: " + secretHash + "}]", "sessions: 198.18.0.0/16", "", "nobody may be"},
		{"both kinds", "subject:", "enrol_sha256: " + secretHash + ", subject:", "16:", "keep one of the two"},
		{"neither kind", "- {enrol_sha256: " + secretHash + "}", "- {}", "17:", "keep one of the two"},
		{"issuer without subject", `, subject: "system:serviceaccount:culvert:gateway"`, "", "16:", "without a subject"},
		{"short hash", "- {enrol_sha256: " + secretHash, "- {enrol_sha256: 5f70bf18", "17:", "not a SHA-256"},
		{"stun", "stun.example.com:3478", "stun.example.com", "20:", "not host:port"},
		{"lease too short", "lease: 5m", "lease: 1s", "21:", "not between"},
		{"lease too long", "lease: 5m", "lease: 48h", "21:", "not between"},
		{"unpinned rule", "repository_owner_id: 9919, ", "", "2", "owner"},
		{"rule for no network", "network: corp", "network: crop", "24:", "crop"},
		{"every name in allow", "tcp 10.20.0.5:5432", "tcp *:5432", "26:", "every name"},
		{"second document", "rules:", "---\nrules:", "", "document"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !strings.Contains(whole, c.old) {
				t.Fatal("the test changes nothing")
			}
			_, err := Parse("culvert.yaml", []byte(strings.Replace(whole, c.old, c.new, 1)))
			if problem.CodeOf(err) != problem.BadConfig {
				t.Fatalf("got %v, want bad-config", err)
			}
			p := problem.From(err)
			if !strings.Contains(p.Message, "culvert.yaml:"+c.where) || !strings.Contains(p.Message+"; "+p.Next, c.want) || p.Next == "" {
				t.Errorf("got %q (next %q), want it at %q with %q", p.Message, p.Next, c.where, c.want)
			}
		})
	}
}

func TestPlainHTTP(t *testing.T) {
	plain := strings.Replace(minimal, "tls: {cert: c.pem, key: k.pem}\n", "", 1)
	for _, c := range []struct {
		name, add string
		ok        bool
	}{
		{"everywhere", "", false},
		{"loopback", `listen: "127.0.0.1:8080"` + "\n", true},
		{"IPv6 loopback", `listen: "[::1]:8080"` + "\n", true},
		{"localhost", `listen: "localhost:0"` + "\n", true},
		{"private address", `listen: "10.0.0.1:8080"` + "\n", false},
		{"behind a proxy", "trusted_proxies: [10.0.0.0/8]\n", true},
		{"insecure", "insecure_http: true\n", true},
	} {
		_, err := Parse("culvert.yaml", []byte(plain+c.add))
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	insecure := strings.Replace(plain, "https:", "http:", 1) + "insecure_http: true\n"
	if _, err := Parse("culvert.yaml", []byte(insecure)); err != nil {
		t.Errorf("insecure_http does not cover the URL: %v", err)
	}
}

func TestOneKeySetPerGatewayIssuer(t *testing.T) {
	doc := strings.Replace(whole, "lab:\n    gateways: [", "lab:\n    gateways: [{issuer: https://oidc.example.com/cluster, subject: x, jwks_file: k.json}, ", 1)
	_, err := Parse("culvert.yaml", []byte(doc))
	if err == nil || !strings.Contains(err.Error(), "another jwks_file") {
		t.Errorf("got %v", err)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "none.yaml")); problem.CodeOf(err) != problem.BadConfig {
		t.Errorf("missing file: %v", err)
	}
	file := filepath.Join(dir, "culvert.yaml")
	if err := os.WriteFile(file, []byte(whole), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	if c.File != file || c.State.Dir != filepath.Join(dir, "data") {
		t.Errorf("got %q, %q", c.File, c.State.Dir)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(whole))
	f.Add([]byte(minimal))
	f.Add([]byte("networks: {corp: null}\nrules: [null]\nissuers: [{}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("culvert.yaml", data)
		if (c == nil) == (err == nil) {
			t.Fatal("either a configuration or an error")
		}
		if err != nil && problem.CodeOf(err) != problem.BadConfig {
			t.Fatalf("got %v", err)
		}
	})
}

func TestACME(t *testing.T) {
	doc := strings.Replace(whole, "tls: {cert: tls/cert.pem, key: /etc/key.pem}", "acme: {email: ops@example.com, roots: ca.pem, http: \":80\"}", 1)
	c, err := Parse("/etc/culvert/culvert.yaml", []byte(doc))
	if err != nil {
		t.Fatal(err)
	}
	want := ACME{Email: "ops@example.com", Directory: LetsEncrypt, Roots: "/etc/culvert/ca.pem", HTTP: ":80"}
	if c.ACME == nil || *c.ACME != want || c.TLS != nil {
		t.Errorf("%+v, tls %v", c.ACME, c.TLS)
	}
	for url, what := range map[string]string{
		"https://192.0.2.1": "for an address", "https://[2001:db8::1]": "for an address", "https://culvert": "no public name",
		"https://münchen.example.com": "xn--", "http://localhost": "https URL",
	} {
		_, err := Parse("culvert.yaml", []byte(strings.Replace(doc, "https://culvert.example.com/", url, 1)))
		if err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", url, err)
		}
	}
}
