package wire

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"slices"
	"strconv"
	"time"
)

// Headers with which a gateway opens its stream. The credential goes into Authorization: "Bearer TOKEN" for a workload
// identity token, "Enrol SECRET" for an enrolment secret.
const (
	HeaderNetwork = "Culvert-Network"
	SchemeBearer  = "Bearer"
	SchemeEnrol   = "Enrol"
)

// FrameType names a message on a gateway's control stream.
type FrameType string

// The messages. Hello and Welcome open a stream, in this order, and carry whole state; all others follow in any order.
const (
	FrameHello      FrameType = "hello"      // gateway → coordinator: [Hello]
	FrameWelcome    FrameType = "welcome"    // coordinator → gateway: [Welcome]
	FrameOffer      FrameType = "offer"      // coordinator → gateway: [Offer], answered under the same id
	FrameAnswer     FrameType = "answer"     // gateway → coordinator: [Answer]
	FrameCandidates FrameType = "candidates" // either way: [Trickle]
	FrameRenewed    FrameType = "renewed"    // gateway → coordinator, and on to the session's standby: [Renewed]
	FrameRenew      FrameType = "renew"      // coordinator → gateway: [Renewed], a token that came to the coordinator; answered with [Answer]
	FrameEnd        FrameType = "end"        // either way: [End]
	FrameCredential FrameType = "credential" // gateway → coordinator: [Credential], before the one that the stream was opened with runs out
	FrameStanding   FrameType = "standing"   // coordinator → gateway: [Standing], before the one of the welcome runs out
	FrameLeaving    FrameType = "leaving"    // gateway → coordinator: no new sessions, please
)

// Frame is one message on a gateway's control stream, one WebSocket text message each.
type Frame struct {
	Type FrameType       `json:"type"`
	ID   uint64          `json:"id,omitempty"` // pairs an answer with what it answers
	Body json.RawMessage `json:"body,omitempty"`
}

// Encode gives the frame as JSON. Body must be valid JSON; it is taken as it is, since it may be large, and encoding/json would
// read it twice more.
func (f Frame) Encode() []byte { return f.Append(nil) }

// Append is Encode behind what is in b.
func (f Frame) Append(b []byte) []byte {
	b = slices.Grow(b, len(f.Body)+len(f.Type)+48)
	b = strconv.AppendQuoteToASCII(append(b, `{"type":`...), string(f.Type))
	if f.ID != 0 {
		b = strconv.AppendUint(append(b, `,"id":`...), f.ID, 10)
	}
	if len(f.Body) > 0 {
		b = append(append(b, `,"body":`...), f.Body...)
	}
	return append(b, '}')
}

// ParseFrame reads a frame. Its body is part of data. What [Frame.Encode] writes is read without the three times that encoding/json looks
// at each byte; any other spelling is left to that.
func ParseFrame(data []byte) (f Frame, err error) {
	if f, ok := parseEncoded(data); ok {
		return f, nil
	}
	err = json.Unmarshal(data, &f)
	return f, err
}

// parseEncoded reads a frame as Encode writes it; ok is false for anything else.
func parseEncoded(data []byte) (f Frame, ok bool) {
	rest, ok := bytes.CutPrefix(data, []byte(`{"type":"`))
	rest, ended := bytes.CutSuffix(rest, []byte(`}`))
	name, rest, quoted := bytes.Cut(rest, []byte(`"`))
	if !ok || !ended || !quoted || !plain(name) {
		return f, false
	}
	f.Type = FrameType(name)
	if digits, found := bytes.CutPrefix(rest, []byte(`,"id":`)); found {
		n := 0
		for n < len(digits) && digits[n] >= '0' && digits[n] <= '9' {
			n++
		}
		if f.ID, ok = number(digits[:n]); !ok {
			return f, false
		}
		rest = digits[n:]
	}
	if body, found := bytes.CutPrefix(rest, []byte(`,"body":`)); found {
		f.Body, rest = body, nil
		ok = json.Valid(body)
	}
	return f, ok && len(rest) == 0
}

// plain reports whether a text in JSON means itself.
func plain(text []byte) bool {
	for _, c := range text {
		if c < ' ' || c > '~' || c == '\\' {
			return false
		}
	}
	return true
}

// number reads digits as JSON would.
func number(digits []byte) (uint64, bool) {
	if len(digits) == 0 || len(digits) > 1 && digits[0] == '0' {
		return 0, false
	}
	n, err := strconv.ParseUint(string(digits), 10, 64)
	return n, err == nil
}

// Hello introduces a gateway and re-asserts every session it holds.
type Hello struct {
	Version    int         `json:"version"`
	Instance   string      `json:"instance"` // random, new with every start of the process
	Name       string      `json:"name"`
	Key        Key         `json:"key"`
	Candidates []Candidate `json:"candidates"`
	Mapping    Mapping     `json:"mapping,omitempty"`
	Sessions   []Held      `json:"sessions"`
	Program    string      `json:"program"` // version and platform, for the log
}

// Held is a session as its gateway holds it.
type Held struct {
	Session   string       `json:"session"`
	Key       Key          `json:"key"`
	Addresses []netip.Addr `json:"addresses"`
	Rules     []string     `json:"rules"`
	Expires   time.Time    `json:"expires"`
	Ends      time.Time    `json:"ends"`
	Standby   bool         `json:"standby,omitempty"` // another gateway carries it
}

// Welcome accepts a gateway and tells it what holds in its network.
type Welcome struct {
	Version   int            `json:"version"`
	Network   string         `json:"network"`
	Addresses []netip.Addr   `json:"addresses"`         // the gateway's overlay addresses
	Overlay   []netip.Prefix `json:"overlay"`           // ranges of sessions and services, to which no flow leaves the tunnel
	Services  netip.Prefix   `json:"services,omitzero"` // IPv4 range of service addresses; the IPv6 overlay mirrors it
	STUN      []string       `json:"stun"`
	Relays    []Relay        `json:"relays,omitempty"` // to be kept ready: an offer may name any of them
	Standing  *Standing      `json:"standing,omitempty"`
	End       []string       `json:"end"` // sessions of Hello that are over
}

// Standing lets a gateway keep a WebSocket to each relay ready before a session needs it. It forwards nothing: each session has
// tickets of its own, see [RelayGrant].
type Standing struct {
	Ticket Secret   `json:"ticket"`
	Life   Duration `json:"life"` // from now on
}

// Offer asks a gateway to admit a session. The gateway believes none of it: it verifies the token for itself.
type Offer struct {
	Session    string       `json:"session"`
	Key        Key          `json:"key"`
	Token      Secret       `json:"token"`
	Addresses  []netip.Addr `json:"addresses"`
	Candidates []Candidate  `json:"candidates"`
	Mapping    Mapping      `json:"mapping,omitempty"`
	Relays     []RelayGrant `json:"relays,omitempty"` // the gateway's own tickets
	Grants     []Grant      `json:"grants"`
	Lease      Duration     `json:"lease"`
	MaxSession Duration     `json:"max_session"`
	// Standby: another gateway carries the session, and this one is to be ready for it. Paths go by [StandbyID] then. A standby that is
	// offered again is put in place anew.
	Standby bool `json:"standby,omitempty"`
}

// Answer is a gateway's word on an offer or a renewal: either Problem is set, or the session is in place.
type Answer struct {
	Problem json.RawMessage `json:"problem,omitempty"` // an RFC 9457 document
	Gateway *Gateway        `json:"gateway,omitempty"` // to an offer
	Lease   *Lease          `json:"lease,omitempty"`
}

// Trickle brings what was found later: of a client (Session set; its candidates come on top of those that are known) or of
// the gateway itself (which names all that it has).
type Trickle struct {
	Session    string      `json:"session,omitempty"`
	Candidates []Candidate `json:"candidates"`
	Mapping    Mapping     `json:"mapping,omitempty"`
}

// Renewed passes on a fresh token for a session.
type Renewed struct {
	Session string `json:"session"`
	Token   Secret `json:"token"`
	Lease   *Lease `json:"lease,omitempty"` // what the gateway gave, in its own word
}

// Credential proves anew who a gateway is: the Authorization header's value, as when the stream was opened. A gateway sends it
// when its file has changed, because workload identity tokens rotate and a stream lasts no longer than its credential.
type Credential struct {
	Authorization Secret `json:"authorization"`
}

// End says that a session is over.
type End struct {
	Session string `json:"session"`
	Reason  string `json:"reason"`
}
