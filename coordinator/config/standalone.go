package config

import (
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"strconv"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// Standalone is a relay that runs by itself: relay.yaml, checked and with defaults filled in. It is never changed once
// loaded.
type Standalone struct {
	File           string              // where it was read from
	Relay          Relay               // its name and limits
	TicketKeys     []ed25519.PublicKey // of the coordinators whose tickets it takes
	UDP            string              // UDP address for STUN and relaying; "" where there is none
	Probe          string              // UDP address of the second STUN port; "" where there is none
	ProbeChosen    bool                // the file names it: without it the relay does not start
	Listen         string              // TCP address for WebSockets
	TLS            *TLS                // nil: plain HTTP
	TrustedProxies []netip.Prefix      // whose X-Forwarded-For is believed
	WebSockets     int                 // at once; 0 for the default
	Metrics        string              // TCP address for metrics; "" for none
	InsecureHTTP   bool
}

// standaloneDoc is relay.yaml as it is written. The comments on its keys are what editors show: see schema.go.
type standaloneDoc struct {
	// Name stands in logs; default relay. What clients see is the name under which a coordinator lists it.
	Name string `yaml:"name"`
	// TicketKeys are the public keys of the coordinators whose tickets are taken: ticket_key of their /v1/info.
	TicketKeys []string `yaml:"ticket_keys" jsonschema:"required"`
	// UDP address for STUN and relaying, such as ":3478", or off.
	UDP string `yaml:"udp"`
	// Probe is the UDP address of the second STUN port, or off; default the port after udp's.
	Probe string `yaml:"probe"`
	// Listen is the TCP address for WebSockets, such as ":443".
	Listen string `yaml:"listen"`
	// TLS names the certificate; without it only loopback and trusted proxies are served.
	TLS *TLS `yaml:"tls"`
	// TrustedProxies are addresses and ranges whose X-Forwarded-For is believed.
	TrustedProxies []string `yaml:"trusted_proxies"`
	// InsecureHTTP serves plain HTTP beyond loopback.
	InsecureHTTP bool `yaml:"insecure_http"`
	// Limits on what it carries.
	Limits limitsDoc `yaml:"limits"`
	// Metrics is the TCP address on which metrics are served, such as 127.0.0.1:9092; default none.
	Metrics string `yaml:"metrics"`
}

type limitsDoc struct {
	// Rate is what it forwards from one side of one session at most, in Mbit/s; default 5000.
	Rate int `yaml:"rate_mbit"`
	// Queue is how much of one session may wait on a WebSocket before packets are dropped, in KiB; default 512.
	Queue int `yaml:"queue_kib"`
	// Sessions is how many it carries at once; default 100000.
	Sessions int `yaml:"sessions"`
	// WebSockets is how many it holds open at once; default 20000.
	WebSockets int `yaml:"websockets"`
}

const maxWebSockets = 1_000_000

// LoadStandalone reads and checks relay.yaml. Errors are *problem.Error with code bad-config: the first mistake.
func LoadStandalone(file string) (*Standalone, error) {
	data, err := readBounded(file)
	if err != nil {
		return nil, problem.Wrap(err, problem.BadConfig, fmt.Sprintf("cannot read %s: %v", file, cause(err)),
			"give the path of a readable configuration file")
	}
	return ParseStandalone(file, data)
}

// ParseStandalone checks the content of relay.yaml; file names it in errors, and paths in it are relative to its folder.
func ParseStandalone(file string, data []byte) (*Standalone, error) {
	s, findings, err := checkStandalone(file, data)
	if err != nil {
		return nil, err
	}
	for i := range findings {
		if findings[i].Severity == policy.Mistake {
			return nil, findings[i].Problem()
		}
	}
	return s, nil
}

func checkStandalone(file string, data []byte, more ...func(*reader, *Standalone)) (*Standalone, []policy.Finding, error) {
	parsed, err := yamlfile.Parse(file, data)
	if err != nil {
		return nil, nil, err
	}
	var d standaloneDoc
	r := &reader{locators: []*policy.Locator{{File: file, Document: parsed}}, dir: filepath.Dir(file)}
	r.locators[0].Decode(&d)
	s := r.standalone(&d)
	for _, f := range more {
		f(r, s)
	}
	return s, r.findings(), nil
}

// relayKey is what every relay's file has at its outermost level, and no coordinator's.
var relayKey = regexp.MustCompile(`(?m)^["']?ticket_keys["']?[ \t]*:`)

// CheckRelay checks the file of a relay that runs by itself; with files it looks for those that it names as well.
func CheckRelay(file string, files bool) Report {
	data, err := readBounded(file)
	if err != nil {
		return reportOf(file, []policy.Finding{unreadable(file, err)})
	}
	var more []func(*reader, *Standalone)
	if files {
		more = append(more, func(r *reader, s *Standalone) { r.lintTLS(s.TLS) })
	}
	_, findings, err := checkStandalone(file, data, more...)
	if err != nil {
		findings = []policy.Finding{policy.FromProblem(file, err)}
	}
	r := reportOf(file, findings)
	r.Relay = true
	return r
}

func (r *reader) standalone(d *standaloneDoc) *Standalone {
	s := &Standalone{File: r.locators[0].File, InsecureHTTP: d.InsecureHTTP, WebSockets: d.Limits.WebSockets}
	s.TicketKeys = r.ticketKeys(d.TicketKeys)
	as := &document{
		UDP: d.UDP, Probe: d.Probe, Listen: d.Listen, TLS: d.TLS, TrustedProxies: d.TrustedProxies, InsecureHTTP: d.InsecureHTTP,
	}
	s.TLS, s.Listen = r.listener(as)
	s.TrustedProxies = r.proxies(d.TrustedProxies)
	s.UDP, s.Probe = r.ports(as)
	s.ProbeChosen = d.Probe != ""
	s.Relay = r.limits("$", "$.limits", Relay{Name: d.Name, Rate: d.Limits.Rate, Queue: d.Limits.Queue, Sessions: d.Limits.Sessions}, "relay")
	r.bounds("$.limits.websockets", d.Limits.WebSockets, 1, maxWebSockets)
	s.Metrics = r.address("$.metrics", d.Metrics, "")
	return s
}

// ticketKeys reads the coordinators' public keys.
func (r *reader) ticketKeys(list []string) []ed25519.PublicKey {
	const next = "copy ticket_key from what the coordinator answers at /v1/info"
	if len(list) == 0 {
		r.fail("$.ticket_keys", "no coordinator's public key, so there is nobody to relay for", next)
	}
	out := make([]ed25519.PublicKey, 0, len(list))
	for i, text := range list {
		key, err := base64.RawURLEncoding.Strict().DecodeString(text)
		if err != nil || len(key) != ed25519.PublicKeySize {
			r.fail(fmt.Sprintf("$.ticket_keys[%d]", i), strconv.Quote(text)+" is not a public key: 43 characters of base64url", next)
		}
		out = append(out, key)
	}
	return out
}
