// Package config reads culvert.yaml: strict, every mistake named by line and column, nothing half understood.
package config

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
	"github.com/culvertnet/culvert/internal/yamlfile"
)

// What holds where the file is silent.
const (
	DefaultListen = ":443"
	DefaultUDP    = ":3478"
	DefaultLease  = 10 * time.Minute
)

// Bounds on lease, so that neither renewals nor dead sessions pile up.
const (
	MinLease = 30 * time.Second
	MaxLease = 24 * time.Hour
)

// Default ranges of a network (RFC 2544, section 12: benchmarking, so used by nobody's network).
var (
	DefaultSessions = netip.MustParsePrefix("198.18.0.0/16")
	DefaultServices = netip.MustParsePrefix("198.19.0.0/16")
	// Overlay6 holds every network's IPv6 overlay: its last 32 bits are the IPv4 overlay address.
	Overlay6 = netip.MustParsePrefix("fd63:756c:7665:7274::/96")
)

// Config is a coordinator's configuration, checked and with defaults filled in. It is never changed once loaded.
type Config struct {
	File           string         // where it was read from
	Included       []string       // files that it includes, in order
	URL            string         // public base URL without a trailing slash; part of every token's audience
	Listen         string         // TCP address for HTTP
	TLS            *TLS           // nil where there is no certificate from files
	ACME           *ACME          // nil where none is asked for; without both, plain HTTP
	TrustedProxies []netip.Prefix // whose X-Forwarded-For is believed
	UDP            string         // UDP address for STUN and the relay; "" where there is none
	Probe          string         // UDP address of the second STUN port; "" where there is none
	ProbeChosen    bool           // the file names it; else it is as good as none where it cannot be opened
	Relay          Relay          // this node's own
	Relays         []wire.Relay   // other relays
	State          State
	Audit          Audit
	Private        Private
	Limits         Limits
	Issuers        []claims.Issuer // whose tokens may admit jobs
	Networks       map[string]Network
	STUN           []string // what clients are told to ask instead of this coordinator, "host:port"
	Lease          time.Duration
	Downloads      string // folder with releases to serve; "" for none
	InsecureHTTP   bool
	Rules          []policy.Rule                         // of all files
	Targets        map[string][]string                   // likewise
	Groups         map[string][]map[string]policy.Values // likewise
	Policy         *policy.Policy                        // Rules, compiled
}

// TLS names the certificate's files. They are read again when they change.
type TLS struct {
	// Cert is a PEM file with the certificate, and after it those that lead to its authority.
	Cert string `yaml:"cert"`
	// Key is a PEM file with its private key.
	Key string `yaml:"key"`
}

// State says where leases live: embedded in Dir, or in an existing NATS cluster.
type State struct {
	// Dir is a folder of this coordinator's own.
	Dir string `yaml:"dir"`
	// NATS are the URLs of a cluster's servers, such as tls://n1:4222.
	NATS []string `yaml:"nats"`
	// Credentials is a file with the cluster's credentials: a user's JWT and seed, or the seed of an nkey alone.
	Credentials string `yaml:"credentials"`
	// Elections is a file like it, of a user of the cluster's system account that may ask for elections: without one, joins wait up to 9 s
	// when a server dies that leads.
	Elections string `yaml:"elections"`
}

// Network is one private network and who may be its gateway.
type Network struct {
	Sessions netip.Prefix // IPv4 range of session addresses
	Services netip.Prefix // IPv4 range of service addresses
	Gateways []Enrolment
}

// Enrolment is one way for a gateway to prove that it belongs to a network: a workload identity, or a secret of which
// only the SHA-256 is known here. It is comparable, so that a changed file shows whose enrolment is gone.
type Enrolment struct {
	Issuer       string
	Subject      string
	JWKSFile     string
	SecretSHA256 [32]byte // set where Issuer is empty
}

// Gateway gives the overlay addresses that all gateways of the network share.
func (n Network) Gateway() []netip.Addr {
	v4 := n.Sessions.Masked().Addr().Next()
	return []netip.Addr{v4, overlay6(v4)}
}

// Overlay gives the ranges that only sessions and services use.
func (n Network) Overlay() []netip.Prefix {
	return []netip.Prefix{n.Sessions, n.Services, Overlay6}
}

func overlay6(v4 netip.Addr) netip.Addr {
	b, v := Overlay6.Addr().As16(), v4.As4()
	copy(b[12:], v[:])
	return netip.AddrFrom16(b)
}

// GatewayIssuers lists the issuers of gateways' identities, each once. They never admit jobs.
func (c *Config) GatewayIssuers() []claims.Issuer {
	var out []claims.Issuer
	seen := map[string]bool{}
	for _, name := range c.NetworkNames() {
		for _, e := range c.Networks[name].Gateways {
			if e.Issuer != "" && !seen[e.Issuer] {
				seen[e.Issuer] = true
				out = append(out, claims.Issuer{URL: e.Issuer, JWKSFile: e.JWKSFile})
			}
		}
	}
	return out
}

// Load reads and checks a file and what it includes. Errors are *problem.Error with code bad-config: the first mistake, and
// how many more there are.
func Load(file string) (*Config, error) {
	c, findings := load(file)
	return c, firstMistake(file, findings)
}

// Parse checks a file's content; file names it in errors, and paths in it are relative to its folder.
func Parse(file string, data []byte) (*Config, error) {
	c, findings := check(file, data)
	return c, firstMistake(file, findings)
}

// Check is [Load] that tells everything that is wrong, and what is dangerous as well. The Config is nil where there is a
// mistake.
func Check(file string) (*Config, []policy.Finding) { return load(file, (*reader).lint) }

func load(file string, more ...func(*reader, *Config)) (*Config, []policy.Finding) {
	data, err := readBounded(file)
	if err != nil {
		err = problem.Wrap(err, problem.BadConfig, fmt.Sprintf("cannot read %s: %v", file, cause(err)),
			"give the path of a readable configuration file")
		return nil, []policy.Finding{policy.FromProblem(file, err)}
	}
	return check(file, data, more...)
}

func check(file string, data []byte, more ...func(*reader, *Config)) (*Config, []policy.Finding) {
	parsed, err := yamlfile.Parse(file, data)
	if err != nil {
		return nil, []policy.Finding{policy.FromProblem(file, err)}
	}
	var d document
	r := &reader{locators: []*policy.Locator{{File: file, Document: parsed}}, dir: filepath.Dir(file)}
	r.locators[0].Decode(&d)
	c := r.read(&d)
	for _, f := range more {
		f(r, c)
	}
	findings := r.findings()
	if mistakes(findings) > 0 {
		return nil, findings
	}
	return c, findings
}

func mistakes(findings []policy.Finding) int {
	n := 0
	for i := range findings {
		if findings[i].Severity == policy.Mistake {
			n++
		}
	}
	return n
}

func firstMistake(file string, findings []policy.Finding) error {
	for i := range findings {
		if findings[i].Severity != policy.Mistake {
			continue
		}
		e := problem.From(findings[i].Problem())
		if more := mistakes(findings) - 1; more > 0 {
			e.Next += fmt.Sprintf("; %d more: culvert-coordinator check %s", more, file)
		}
		return e
	}
	return nil
}

// readBounded reads a file of at most yamlfile.MaxSize bytes; a longer one is left to yamlfile to refuse.
func readBounded(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f, yamlfile.MaxSize+1)
}
