package wire

import (
	"net/netip"
	"time"
)

// Frames that carry what flows did. They may be sent once a stream is open.
const (
	FrameFlows    FrameType = "flows"     // gateway → coordinator: [Flows]
	FrameFlowsAck FrameType = "flows-ack" // coordinator → gateway: [FlowsAck]
)

// Limits on a batch of flow records. A coordinator refuses what is longer.
const (
	MaxFlowRecords = 512
	MaxFlowName    = 255 // bytes of FlowRecord.Name: what DNS allows (RFC 1035, section 2.3.4)
	MaxFlowText    = 256 // bytes of Rule and Reason
)

// Flows is a batch of records. A gateway numbers its batches from 1 with every start of the process (Hello.Instance), keeps
// each until it is acknowledged, as far as its memory for that goes, and sends what is not again, in order, on a new stream.
// So a batch may come twice, under the same number, but never changes.
type Flows struct {
	Seq     uint64       `json:"seq"`
	Dropped uint64       `json:"dropped,omitempty"` // records lost to a full queue since the gateway started; denials never are
	Records []FlowRecord `json:"records"`
}

// FlowsAck says that every batch up to Seq is recorded for good; the gateway forgets them.
type FlowsAck struct {
	Seq uint64 `json:"seq"`
}

// FlowRecord is what became of one flow, or of several alike where Count says so. Sessions are named as the gateway knows
// them; the coordinator believes a gateway about those that it holds or has held and no others. Records of a session may come
// after its [End]. An empty session stands for several, when too many denials came at once.
type FlowRecord struct {
	// Flow numbers the flow within its gateway's instance; 0 where the record stands for several. A flow that lives long is
	// reported twice: once as [CauseOpen] and once when it has ended, with the totals of its whole life.
	Flow    uint64         `json:"flow,omitempty"`
	Session string         `json:"session"`
	Proto   string         `json:"proto"`          // "tcp", "udp", "icmp"; "dns" for a name that was asked for and refused
	Name    string         `json:"name,omitempty"` // the name that the job used, where it used one; lower case, no final dot
	Addr    netip.AddrPort `json:"addr,omitzero"`  // the target's address as dialled or asked for; port 0 for ICMP and where ports differed
	Verdict FlowVerdict    `json:"verdict"`
	Rule    string         `json:"rule,omitempty"`   // the rule that allows or observes it
	Reason  string         `json:"reason,omitempty"` // why it was denied
	Began   time.Time      `json:"began"`
	Lasted  Duration       `json:"lasted,omitempty"`     // for an aggregate: from its first flow to its last
	BytesUp uint64         `json:"bytes_up,omitempty"`   // from the job, payload
	BytesDn uint64         `json:"bytes_down,omitempty"` // to the job, payload
	Cause   FlowCause      `json:"cause,omitempty"`      // why it ended
	Count   uint64         `json:"count,omitempty"`      // flows that the record stands for; 0 means 1
}

// FlowVerdict is what a gateway decided on a flow.
type FlowVerdict string

// The verdicts.
const (
	FlowAllowed    FlowVerdict = "allowed"  // an allow line covers it
	FlowObserved   FlowVerdict = "observed" // no allow line covers it, but an observe line lets it through
	FlowRefused    FlowVerdict = "denied"   // no line covers it, or nothing may open it
	FlowOverLimits FlowVerdict = "limited"  // a line covers it, but the session has used up what it may have
)

// FlowCause says why a flow that was let through ended.
type FlowCause string

// The causes.
const (
	CauseOpen        FlowCause = "open"          // it has not
	CauseClosed      FlowCause = "closed"        // both sides had said all
	CauseReset       FlowCause = "reset"         // one of the two sides broke it off
	CauseIdle        FlowCause = "idle"          // nothing was heard for too long
	CauseRefused     FlowCause = "refused"       // the target refused it
	CauseUnreachable FlowCause = "unreachable"   // there is no way to the target
	CauseTimeout     FlowCause = "timeout"       // the target did not answer
	CauseNoName      FlowCause = "no-name"       // its name did not resolve to an address that it may have
	CauseRevoked     FlowCause = "revoked"       // the session's grant no longer covers it
	CauseSession     FlowCause = "session-ended" // the session was over
)
