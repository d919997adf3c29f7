package wire

import "time"

// PathRelay is where a relay takes WebSockets, on the coordinator's HTTPS port or its own.
const PathRelay = "/v1/relay"

// OwnRelay is what a coordinator's own relay is called unless its configuration says otherwise. A client makes for it before it
// has been told of it.
const OwnRelay = "coordinator"

// MaxRelays bounds the relays that a coordinator lists and a client measures.
const MaxRelays = 16

// Relayed is the kind of a path through a relay. It is never a candidate: relays come with tickets, see [RelayGrant].
const Relayed CandidateKind = "relay"

// Relay is one relay as the coordinator lists it. At least one of UDP and URL is set.
type Relay struct {
	Name string `json:"name"`
	UDP  string `json:"udp,omitempty"` // "host:port"; an empty host means the coordinator's own
	URL  string `json:"url,omitempty"` // "https://host/v1/relay", to be upgraded to a WebSocket
}

// RelayGrant lets one side of one session use a relay. Both sides of a session get grants for the same relays in the same
// order, the one that the client measured as nearest first.
type RelayGrant struct {
	Relay
	Ticket  Secret    `json:"ticket"`
	Expires time.Time `json:"expires"`
}

// Mapping says how a NAT maps one socket to ports (RFC 4787, section 4.1).
type Mapping string

// The mappings that matter for choosing how to reach a peer.
const (
	MappingUnknown Mapping = ""
	MappingEasy    Mapping = "easy" // the same port towards every destination: endpoint-independent
	MappingHard    Mapping = "hard" // another port for every destination: address- or port-dependent
)

// Valid reports whether m is one of the mappings above.
func (m Mapping) Valid() bool { return m == MappingUnknown || m == MappingEasy || m == MappingHard }
