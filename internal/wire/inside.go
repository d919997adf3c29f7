package wire

import (
	"net/netip"
	"time"
)

// What a gateway serves on its overlay address, inside the tunnel. A session is known by the source address that
// WireGuard has authenticated; no other credential is needed.
const (
	InsidePort    = 80              // HTTP, TCP
	EchoPort      = 7               // UDP echo (RFC 862): proves that bytes flow both ways in one round trip
	MaxEcho       = 256             // a longer echo request is dropped, in bytes
	PathInsideMe  = "/v1/session"   // GET: [InsideSession]
	PathRenew     = "/v1/renew"     // POST [InsideRenew] → [Lease]
	PathReach     = "/v1/reach"     // POST [ReachRequest] → [ReachResult]
	MaxInsideBody = MaxToken + 4096 // bytes
)

// InsideRenew renews a session through its tunnel.
type InsideRenew struct {
	Token Secret `json:"token"`
}

// InsideSession is the gateway's view of the session that asks.
type InsideSession struct {
	Session   string         `json:"session"`
	Gateway   string         `json:"gateway"`
	Addresses []netip.Addr   `json:"addresses"`
	Routes    []netip.Prefix `json:"routes"`
	Names     *Names         `json:"names,omitempty"`
	Grants    []Grant        `json:"grants"`
	Expires   time.Time      `json:"expires"`
	Ends      time.Time      `json:"ends"`
	Flows     FlowCounts     `json:"flows"`
	Reached   []Reached      `json:"reached,omitempty"` // at most [MaxReached]
	More      uint64         `json:"more,omitempty"`    // flows to targets that are not in Reached
}

// MaxReached bounds the targets that a gateway adds up for a session; half are for what it turns away.
const MaxReached = 32

// Reached adds up a session's flows to one target, as far as they have ended; those that are open count with what they have carried.
type Reached struct {
	Proto   string      `json:"proto"`  // as in [FlowRecord]
	Target  string      `json:"target"` // "host:port" as a rule would name it; without a port for ICMP and names that were refused
	Verdict FlowVerdict `json:"verdict"`
	Rule    string      `json:"rule,omitempty"`
	Reason  string      `json:"reason,omitempty"`
	Flows   uint64      `json:"flows"`
	BytesUp uint64      `json:"bytes_up,omitempty"`
	BytesDn uint64      `json:"bytes_down,omitempty"`
	Cause   FlowCause   `json:"cause,omitempty"` // why the last one ended
}

// FlowCounts counts a session's flows since it began.
type FlowCounts struct {
	Open     uint64 `json:"open"`
	Allowed  uint64 `json:"allowed"`            // an allow line covers them
	Observed uint64 `json:"observed,omitempty"` // only an observe line does
	Denied   uint64 `json:"denied"`
	Limited  uint64 `json:"limited,omitempty"` // covered, but the session had used up what it may have
	Failed   uint64 `json:"failed"`            // let through, but the target refused or did not answer
	BytesUp  uint64 `json:"bytes_up"`
	BytesDn  uint64 `json:"bytes_down"`
}

// ReachRequest asks the gateway whether this session could reach a target, by trying.
type ReachRequest struct {
	Target string `json:"target"` // "host:port", TCP
}

// ReachResult is the gateway's word on one target.
type ReachResult struct {
	Target  string   `json:"target"`
	Verdict Verdict  `json:"verdict"`
	Rule    string   `json:"rule,omitempty"`   // the rule that grants it
	Reason  string   `json:"reason,omitempty"` // why not
	Next    string   `json:"next,omitempty"`   // what to do about a denial: whose policy would have to allow it
	RTT     Duration `json:"rtt,omitempty"`    // from the gateway to the target
}

// Verdict is the outcome of trying a target.
type Verdict string

// The outcomes.
const (
	Reachable   Verdict = "reachable"
	FlowDenied  Verdict = "denied"      // not in the grant
	Unreachable Verdict = "unreachable" // granted, but it does not answer behind the gateway
)
