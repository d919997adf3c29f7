package netcheck

import (
	"net/netip"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// Report is what was found. Its JSON form is described field by field in docs/netcheck.md, which a test holds against it.
// Times are in milliseconds.
type Report struct {
	Coordinator Coordinator `json:"coordinator"`
	Proxy       *Proxy      `json:"proxy,omitempty"` // absent where nothing goes through one
	UDP         UDP         `json:"udp"`
	NAT         NAT         `json:"nat"`
	IPv4        Family      `json:"ipv4"`
	IPv6        Family      `json:"ipv6"`
	MTU         *MTU        `json:"mtu,omitempty"` // absent where it could not be probed
	Relays      []Relay     `json:"relays"`
	Tunnel      Tunnel      `json:"tunnel"`
}

// Coordinator is how its HTTPS is reached.
type Coordinator struct {
	URL       string  `json:"url"`
	Reachable bool    `json:"reachable"`
	Address   string  `json:"address,omitempty"` // to which the connection went: a proxy's, where there is one
	RTT       float64 `json:"rtt_ms,omitempty"`  // of a request on an open connection
	TLS       *TLS    `json:"tls,omitempty"`     // absent with plain HTTP
	Error     string  `json:"error,omitempty"`
	Next      string  `json:"next,omitempty"` // what to do about it
}

// TLS is how a connection is protected. Who issued the certificate tells of a proxy that reads along.
type TLS struct {
	Version string    `json:"version"`
	Issuer  string    `json:"issuer"`
	Expires time.Time `json:"expires"`
}

// Proxy is what the environment says for the coordinator. Credentials are left out.
type Proxy struct {
	URL     string `json:"url"`
	NoProxy string `json:"no_proxy,omitempty"`
}

// UDP tells whether it gets out and back.
type UDP struct {
	Works   bool         `json:"works"`
	Servers []STUNServer `json:"servers"` // that were asked
	Error   string       `json:"error,omitempty"`
}

// STUNServer is one that was asked. Mapped is absent where no answer came.
type STUNServer struct {
	Server netip.AddrPort  `json:"server"`
	Mapped *netip.AddrPort `json:"mapped,omitempty"`
	RTT    float64         `json:"rtt_ms,omitempty"`
}

// NAT is what stands between this host and the servers, as far as IPv4 goes where there is any.
type NAT struct {
	Present      bool           `json:"present"`
	Mapping      wire.Mapping   `json:"mapping,omitempty"` // easy or hard; absent where it could not be told
	Depends      nat.Dependence `json:"mapping_depends,omitempty"`
	Filtering    nat.Dependence `json:"filtering,omitempty"`
	Destinations int            `json:"destinations"` // that were compared
}

// Family is one version of IP.
type Family struct {
	Addresses []netip.Addr    `json:"addresses"`        // of this host's interfaces, beyond loopback and link-local
	Public    *netip.AddrPort `json:"public,omitempty"` // as servers see it; absent where none answered
}

// MTU is the largest packet that got out, IP header included, in bytes, towards Server. What comes back may differ.
type MTU struct {
	Server netip.AddrPort `json:"server"`
	Bytes  int            `json:"bytes"`
}

// Relay is one of the coordinator's relays. A nil Way is one that the relay does not have.
type Relay struct {
	Name      string `json:"name"`
	UDP       *Way   `json:"udp,omitempty"`
	WebSocket *Way   `json:"websocket,omitempty"`
}

// Way is one way to a relay.
type Way struct {
	To    string  `json:"to"`
	Works bool    `json:"works"`
	RTT   float64 `json:"rtt_ms,omitempty"`
	Error string  `json:"error,omitempty"`
}

// Path is how a tunnel to a kind of gateway comes about.
type Path string

// The paths, best first. Until one that is probed for opens, packets go through a relay.
const (
	PathDirect    Path = "direct"
	PathProbing   Path = "probing" // direct after some seconds
	PathUDP       Path = "relay-udp"
	PathWebSocket Path = "relay-websocket"
	PathNone      Path = "none"
)

// Tunnel is what all this means.
type Tunnel struct {
	Possible bool `json:"possible"`
	// Paths by the kind of gateway: public (a public address or a forwarded port), easy and hard (the NAT in front of it).
	Paths struct {
		Public Path `json:"public"`
		Easy   Path `json:"easy"`
		Hard   Path `json:"hard"`
	} `json:"paths"`
	Meaning []string `json:"meaning"` // in words
}

func milliseconds(d time.Duration) float64 {
	return float64(d.Round(10*time.Microsecond)) / float64(time.Millisecond)
}
