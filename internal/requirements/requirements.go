// Package requirements is the one list of what Culvert needs from a network: every name, port and protocol, in which direction, what
// it carries and when it is needed. The programs' doctor commands test it, and docs/network-requirements.md shows it.
package requirements

import (
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"

	"github.com/culvertnet/culvert/internal/wire"
)

// Party is the side whose firewall a row is for.
type Party string

// The parties. Relay is a relay that stands alone.
const (
	Runner      Party = "runner"
	Gateway     Party = "gateway"
	Coordinator Party = "coordinator"
	Relay       Party = "relay"
)

// Direction says who opens a connection, or sends first.
type Direction string

// The directions, as the party's firewall sees them.
const (
	Out Direction = "out"
	In  Direction = "in"
)

// Row is one thing that has to be let through.
type Row struct {
	ID        string // stable, for JSON: "<party>/<what>"
	Party     Party
	Direction Direction
	Peer      string // who is at the other end
	Protocol  string // "TCP", "UDP" or both
	Port      string // a default, with the setting that changes it, or what else can be said
	Carries   string
	Purpose   string
	When      string // "always", or when it is needed
	// Required rows have to work for a tunnel to be possible at all. Without the others it is slower, or something is missing.
	Required bool

	targets func(Facts) []Target
}

// Facts are what is known of one installation, which turns rows into names and ports. All of it is optional.
type Facts struct {
	Coordinator *url.URL
	STUN        []string     // "host:port"; an empty host is the coordinator's
	Relays      []wire.Relay // as the coordinator lists them
	TokenURL    *url.URL     // where a job asks for its token
	Issuers     []string     // whose keys are fetched
	NATS        []string     // of an external state
	ACME        string       // URL of the directory of the CA that the coordinator asks for its certificate
	Releases    bool         // whether the action gets the client from GitHub
}

// Kind is how a target is tested.
type Kind string

// The kinds of test.
const (
	API       Kind = "api"       // the coordinator's HTTPS, with what it tells everybody
	HTTPS     Kind = "https"     // any answer over HTTPS
	Discovery Kind = "discovery" // an issuer's OpenID configuration
	STUN      Kind = "stun"      // an answer to a Binding request
	RelayUDP  Kind = "relay-udp" // the same, by a relay
	WebSocket Kind = "websocket" // a relay's WebSocket
	TCP       Kind = "tcp"       // a connection
	DNS       Kind = "dns"       // a name that resolves
)

// Target is something that can be tested.
type Target struct {
	Kind Kind
	Host string
	Port uint16
	URL  string // of API, HTTPS, Discovery and WebSocket
}

// Targets gives what can be tested of a row, none where that is not known or not possible from here.
func (r Row) Targets(f Facts) []Target {
	if r.targets == nil {
		return nil
	}
	return r.targets(f)
}

// For lists the rows of a party, in the order in which people want to read them.
func For(p Party) []Row {
	return slices.DeleteFunc(All(), func(r Row) bool { return r.Party != p })
}

// port gives a URL's port.
func port(u *url.URL) uint16 {
	if n, err := strconv.ParseUint(u.Port(), 10, 16); err == nil {
		return uint16(n)
	}
	if u.Scheme == "http" {
		return 80
	}
	return 443
}

// at makes a target of a URL, none of one that is empty or no URL.
func at(kind Kind, address string) []Target {
	u, err := url.Parse(address)
	if err != nil || u.Hostname() == "" {
		return nil
	}
	return []Target{{Kind: kind, Host: u.Hostname(), Port: port(u), URL: address}}
}

// udp makes a target of "host:port".
func udp(kind Kind, f Facts, address string) []Target {
	host, text, err := net.SplitHostPort(address)
	n, perr := strconv.ParseUint(text, 10, 16)
	if err != nil || perr != nil || n == 0 {
		return nil
	}
	if host == "" && f.Coordinator != nil {
		host = f.Coordinator.Hostname()
	}
	if host == "" {
		return nil
	}
	return []Target{{Kind: kind, Host: host, Port: uint16(n)}}
}

// own reports whether a host is the coordinator's.
func (f Facts) own(host string) bool {
	return host == "" || f.Coordinator != nil && host == f.Coordinator.Hostname()
}

func coordinatorAPI(f Facts) []Target {
	if f.Coordinator == nil {
		return nil
	}
	return at(API, f.Coordinator.String())
}

// firstSTUN is the main port, and secondSTUN what comes after it.
func firstSTUN(f Facts) []Target {
	if len(f.STUN) == 0 {
		return nil
	}
	return udp(STUN, f, f.STUN[0])
}

func secondSTUN(f Facts) (out []Target) {
	for _, s := range f.STUN[min(len(f.STUN), 1):] {
		out = append(out, udp(STUN, f, s)...)
	}
	return out
}

// relaysUDP and relaysHTTPS are the relays elsewhere. The coordinator's own is at its own ports.
func relaysUDP(f Facts) (out []Target) {
	for _, r := range f.Relays {
		for _, t := range udp(RelayUDP, f, r.UDP) {
			if !f.own(t.Host) {
				out = append(out, t)
			}
		}
	}
	return out
}

func relaysHTTPS(f Facts) (out []Target) {
	for _, r := range f.Relays {
		for _, t := range at(WebSocket, r.URL) {
			if !f.own(t.Host) {
				out = append(out, t)
			}
		}
	}
	return out
}

func issuers(f Facts) (out []Target) {
	for _, i := range f.Issuers {
		out = append(out, at(Discovery, i)...)
	}
	return out
}

func tokenEndpoint(f Facts) []Target {
	if f.TokenURL == nil {
		return nil
	}
	// Without its query, which belongs to the job.
	return at(HTTPS, (&url.URL{Scheme: f.TokenURL.Scheme, Host: f.TokenURL.Host, Path: "/"}).String())
}

func releases(f Facts) (out []Target) {
	if !f.Releases {
		return nil
	}
	for _, host := range releaseHosts {
		out = append(out, Target{Kind: HTTPS, Host: host, Port: 443, URL: "https://" + host + "/"})
	}
	return out
}

func acmeDirectory(f Facts) []Target {
	if f.ACME == "" {
		return nil
	}
	return at(HTTPS, f.ACME)
}

func natsServers(f Facts) (out []Target) {
	for _, s := range f.NATS {
		u, err := url.Parse(s)
		if err != nil || u.Hostname() == "" {
			continue
		}
		n := uint64(4222)
		if p, err := strconv.ParseUint(u.Port(), 10, 16); err == nil {
			n = p
		}
		out = append(out, Target{Kind: TCP, Host: u.Hostname(), Port: uint16(n)})
	}
	return out
}

// names are looked up to see that this network's DNS knows them.
func names(f Facts) (out []Target) {
	for _, from := range []func(Facts) []Target{coordinatorAPI, tokenEndpoint, issuers, relaysHTTPS, relaysUDP, natsServers, acmeDirectory} {
		for _, t := range from(f) {
			name := Target{Kind: DNS, Host: t.Host}
			if _, err := netip.ParseAddr(t.Host); err != nil && !slices.Contains(out, name) {
				out = append(out, name)
			}
		}
	}
	return out
}
