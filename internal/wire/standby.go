package wire

import (
	"crypto/sha256"
	"encoding/base64"
	"net/netip"
)

// PathStandby stands behind a session's path: POST PathSessions/{id}/standby [StandbyRequest] → [Standby], with the session
// secret as bearer.
const PathStandby = "/standby"

// A session's word to a gateway inside the tunnel, when it moves from one to the other.
const (
	PathTake  = "/v1/take"  // POST [InsideTake], or empty: this gateway carries the session from now on; answered with [InsideSession]
	PathLeave = "/v1/leave" // POST, empty, to a gateway that is draining: answered with [Left] once no connection would be cut, or a while later
)

// MaxTakenNames bounds the names of an [InsideTake].
const MaxTakenNames = 256

// InsideTake tells a gateway which names under wildcards the job has heard of from another one, so that what it has remembered stays right.
type InsideTake struct {
	Names []NamedAddr `json:"names,omitempty"` // at most [MaxTakenNames]
}

// NamedAddr is a name with its service address, of either family.
type NamedAddr struct {
	Name string     `json:"name"`
	Addr netip.Addr `json:"addr"`
}

// FrameTaken says that a session uses its standby from now on: gateway → coordinator, [Taken].
const FrameTaken FrameType = "taken"

// StandbyRequest asks for a second gateway that holds a session too, ready to carry it when the first is lost. That gateway
// verifies the token for itself, as the first did.
type StandbyRequest struct {
	Token      Secret      `json:"token"`
	Candidates []Candidate `json:"candidates,omitempty"`
	Mapping    Mapping     `json:"mapping,omitempty"`
	Relays     []string    `json:"relays,omitempty"` // names of relays that answered, nearest first
	Not        []Key       `json:"not,omitempty"`    // gateways that are out of the client's reach
	Only       []Key       `json:"only,omitempty"`   // the only gateways that the client would use, where it pins them
}

// Standby is a gateway that holds a session and does not carry it yet.
type Standby struct {
	Gateway Gateway      `json:"gateway"`
	Relays  []RelayGrant `json:"relays,omitempty"` // tickets for [StandbyID]
}

// Taken says that a session has moved to the gateway that says so.
type Taken struct {
	Session string `json:"session"`
}

// Left is a draining gateway's answer to a session that would leave it.
type Left struct {
	Go   bool   `json:"go"`             // leave now: until then no flow begins here. Otherwise ask again
	Open uint64 `json:"open,omitempty"` // connections that are open; with Go they are cut, because their time is up
}

// StandbyID names the paths between a session's client and its standby gateway, in checks and at relays. They are not the
// session's own, because a relay knows two sides of a session and no third. Both sides derive it: 22 characters of base64url, the first 128
// bits of a SHA-256 over both keys.
func StandbyID(client, gateway Key) string {
	sum := sha256.Sum256(append(append([]byte("culvert standby v1\x00"), client[:]...), gateway[:]...))
	return base64.RawURLEncoding.EncodeToString(sum[:16])
}
