// Package wire holds what crosses between Culvert's programs: the API's types and the few values that both sides
// must compute alike. It uses the standard library alone.
package wire

import (
	"encoding/json"
	"net/netip"
	"strings"
	"time"
)

// Limits on what the API takes, in bytes or in number.
const (
	MaxToken      = 16 << 10 // an OIDC token
	MaxBody       = 64 << 10 // a request body
	MaxFrame      = 4 << 20  // one message on a gateway's control stream, but for hello and welcome
	MaxState      = 32 << 20 // hello and welcome, which carry whole state
	MaxHeld       = 1 << 16  // sessions in a hello
	MaxCandidates = 32       // candidates of one side
)

// Version is the version of the API, sent by both sides of a gateway's stream.
const Version = 1

// Paths of the coordinator's API.
const (
	PathInfo     = "/v1/info"     // GET: [Info]; needs no credential
	PathSessions = "/v1/sessions" // POST [JoinRequest]; PATCH and DELETE PathSessions/{id} with the session secret as bearer
	PathGateway  = "/v1/gateway"  // GET, upgraded to a WebSocket that carries [Frame]
)

// MediaEvents is the media type of a join's answer as a stream of [JoinEvent], one JSON object a line. A client that
// does not ask for it in Accept gets one [Session] as application/json instead.
const MediaEvents = "application/x-ndjson"

// Audience is the only audience for which a token is accepted: it binds the token to one coordinator and one key.
func Audience(coordinator string, key Key) string {
	return strings.TrimRight(coordinator, "/") + "/wg/" + key.String()
}

// Info is what a client may know before it has proven anything.
type Info struct {
	Version int      `json:"version"`
	STUN    []string `json:"stun"` // "host:port"; an empty host means the coordinator's own
	Relays  []Relay  `json:"relays,omitempty"`
	// TicketKey is the public key that relays check tickets with, as relay.yaml takes it.
	TicketKey string `json:"ticket_key,omitempty"`
}

// CandidateKind says where a candidate address comes from, in the words of RFC 8445.
type CandidateKind string

// The kinds of candidate.
const (
	Host      CandidateKind = "host"      // an address of one of its own interfaces
	Reflexive CandidateKind = "reflexive" // what a STUN server saw
	Public    CandidateKind = "public"    // configured by the operator
	Mapped    CandidateKind = "mapped"    // a port mapping on its router
	Observed  CandidateKind = "observed"  // peer-reflexive: where an authentic check came from
)

// Valid reports whether a side may name candidates of this kind. Observed ones come from checks alone, and a relay from tickets.
func (k CandidateKind) Valid() bool {
	switch k {
	case Host, Reflexive, Public, Mapped:
		return true
	}
	return false
}

// Candidate is one address at which a side may be reachable.
type Candidate struct {
	Kind CandidateKind  `json:"kind"`
	Addr netip.AddrPort `json:"addr"`
}

// JoinRequest asks for a session: the body of POST /v1/sessions.
type JoinRequest struct {
	Network    string      `json:"network,omitempty"` // may be empty where the coordinator has one network
	Key        Key         `json:"key"`
	Token      Secret      `json:"token"`
	Candidates []Candidate `json:"candidates,omitempty"`
	Mapping    Mapping     `json:"mapping,omitempty"` // what the client's NAT does, as far as it knows yet
	Relays     []string    `json:"relays,omitempty"`  // names of relays that answered, nearest first
	Client     string      `json:"client,omitempty"`  // program version and platform, for the log
}

// JoinEvent is one line of a streamed answer to [JoinRequest]; exactly one field is set. The first is Admitted: policy
// said yes and the gateways are being asked, so path checks can start half a round trip early. The last is either
// Session or Problem.
type JoinEvent struct {
	Admitted *Session        `json:"admitted,omitempty"`
	Session  *Session        `json:"session,omitempty"`
	Problem  json.RawMessage `json:"problem,omitempty"` // an RFC 9457 document, see package problem
}

// Session is what a client holds: its addresses, its gateways and its lease.
type Session struct {
	ID        string       `json:"id"`
	Network   string       `json:"network"`
	Secret    Secret       `json:"secret"` // authorises PATCH and DELETE
	Addresses []netip.Addr `json:"addresses"`
	Gateways  []Gateway    `json:"gateways"`
	Relays    []RelayGrant `json:"relays,omitempty"`
	Rules     []string     `json:"rules"`
	Lease     Duration     `json:"lease"`             // how long one lease lasts
	Expires   time.Time    `json:"expires"`           // when this lease ends unless renewed
	Ends      time.Time    `json:"ends"`              // no renewal reaches past this
	Standby   bool         `json:"standby,omitempty"` // the network has another gateway, which may be asked for at [PathStandby]
}

// Gateway is one gateway as a client sees it.
type Gateway struct {
	Name       string         `json:"name"`
	Key        Key            `json:"key"`
	Addresses  []netip.Addr   `json:"addresses"` // its overlay addresses, where it answers inside the tunnel
	Candidates []Candidate    `json:"candidates"`
	Mapping    Mapping        `json:"mapping,omitempty"`
	Routes     []netip.Prefix `json:"routes,omitempty"` // what this session may reach through it
	Names      *Names         `json:"names,omitempty"`  // nil where no name is granted
}

// Update is the body of PATCH /v1/sessions/{id}: candidates and a mapping found later, a fresh token to renew with, or all.
type Update struct {
	Candidates []Candidate `json:"candidates,omitempty"`
	Mapping    Mapping     `json:"mapping,omitempty"`
	Token      Secret      `json:"token,omitempty"`
}

// Lease is the answer to a renewal, at the coordinator and in the tunnel.
type Lease struct {
	Expires time.Time `json:"expires"`
	Ends    time.Time `json:"ends"`
}

// Grant is one thing a session may reach: a line as the policy file writes it, and the rule it stands in. Exactly one of
// Allow and Observe is set.
type Grant struct {
	Rule    string `json:"rule"`
	Allow   string `json:"allow"`
	Observe string `json:"observe,omitempty"` // a range that is let through and marked as observed
}

// Duration is a time.Duration that JSON carries as a string such as "10m0s".
type Duration time.Duration

// MarshalText gives the duration in Go's notation.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText reads Go's notation.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = Duration(v)
	return err
}
