package audit

import (
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// What OCSF's classes want beside what a record says. Numbers are the schema's (version 1.3).
const (
	profileHost      = "host"             // has actor
	profileControl   = "security_control" // has action_id, disposition_id and authorizations
	userSystem       = 3                  // user.type_id
	tunnelSplit      = 1                  // tunnel_type_id
	directionInbound = 1                  // connection_info.direction_id: into the network that the gateway serves

	flowOpen    = 1 // activities of Network Activity
	flowClose   = 2
	flowReset   = 3
	flowFail    = 4
	flowRefuse  = 5
	flowTraffic = 6
)

// stored is a record as the log has it.
type stored struct {
	Metadata struct {
		Version  string          `json:"version"`
		Product  json.RawMessage `json:"product"`
		Provider string          `json:"log_provider"`
		Event    Event           `json:"event_code"`
		Sequence uint64          `json:"sequence"`
	} `json:"metadata"`
	Record
}

// event is a record as OCSF has it. Its fields hide those of the same name in the record.
type event struct {
	Metadata metadata `json:"metadata"`
	Record
	ActivityName string       `json:"activity_name,omitempty"` // where activity_id is 99
	Disposition  int          `json:"disposition_id,omitempty"`
	User         *account     `json:"user,omitempty"`
	Service      *Named       `json:"service,omitempty"`
	App          *application `json:"app,omitempty"`
	Target       *endpoint    `json:"dst_endpoint,omitempty"`
	TunnelType   int          `json:"tunnel_type_id,omitempty"`
	Protocol     string       `json:"protocol_name,omitempty"`
	Connection   *connection  `json:"connection_info,omitempty"`
	Traffic      *traffic     `json:"traffic,omitempty"`
	Start        int64        `json:"start_time,omitempty"`
	End          int64        `json:"end_time,omitempty"`
	Duration     int64        `json:"duration,omitempty"` // milliseconds
	Unmapped     unmapped     `json:"unmapped"`
}

type metadata struct {
	Version  string          `json:"version"`
	Product  json.RawMessage `json:"product"`
	Provider string          `json:"log_provider"`
	Name     string          `json:"log_name"`
	Event    Event           `json:"event_code"`
	Sequence uint64          `json:"sequence"`
	UID      string          `json:"uid"` // the record's hash, as the next one's prev has it; for flows with their number in it
	Profiles []string        `json:"profiles,omitempty"`
}

type account struct {
	User
	Type int `json:"type_id"`
}

type application struct {
	Name    string `json:"name"`
	Vendor  string `json:"vendor_name"`
	Version string `json:"version,omitempty"`
}

type endpoint struct {
	Endpoint
	Name string `json:"name,omitempty"`
	UID  string `json:"uid,omitempty"`
}

type connection struct {
	Direction int    `json:"direction_id"`
	Protocol  string `json:"protocol_name,omitempty"`
	Number    int    `json:"protocol_num,omitempty"`
}

type traffic struct {
	In  uint64 `json:"bytes_in"`  // to the job
	Out uint64 `json:"bytes_out"` // from the job
}

type unmapped struct {
	Unmapped
	Session *Session `json:"session,omitempty"` // of a flow
}

// OCSF makes events of the Open Cybersecurity Schema Framework of a line of the log: one of each record, and one of each flow in a record
// of flows. They have the classes' required fields, and none that the schema does not know. What the chain needs is left out,
// so nothing verifies them: keep an export of the log itself as well.
func OCSF(line []byte) ([][]byte, error) {
	var s stored
	if err := json.Unmarshal(line, &s); err != nil || s.Metadata.Sequence == 0 {
		return nil, errLine
	}
	s.Event = s.Metadata.Event
	e := event{Record: s.Record, Unmapped: unmapped{Unmapped: s.Record.Unmapped}, Metadata: metadata{
		Version: s.Metadata.Version, Product: s.Metadata.Product, Provider: s.Metadata.Provider, Name: "audit", Event: s.Event,
		Sequence: s.Metadata.Sequence, UID: hashOf(line),
	}}
	if s.Class == networkClass {
		return e.flows()
	}
	switch s.Class {
	case tunnelClass:
		e.tunnel()
	case authClass:
		e.authentication()
	case lifecycleClass:
		e.App = &application{"culvert-coordinator", "Culvert", e.Unmapped.Program}
	}
	out, err := e.encode()
	return [][]byte{out}, err
}

// encode fills in what every class has.
func (e *event) encode() ([]byte, error) {
	if e.Activity == otherActivity {
		e.ActivityName = string(e.Event)
	}
	e.Type, e.Disposition = e.Class*100+e.Activity, e.Action // 1 is allowed and 2 blocked, as action_id has 1 and 2
	if e.Actor != nil {
		e.Metadata.Profiles = append(e.Metadata.Profiles, profileHost)
	}
	if e.Action != 0 || len(e.Authorizations) > 0 {
		e.Metadata.Profiles = append(e.Metadata.Profiles, profileControl)
	}
	out, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encode an event: %w", err)
	}
	return out, nil
}

func (e *event) tunnel() {
	e.TunnelType, e.Protocol = tunnelSplit, "WireGuard"
	if a := e.Actor; a != nil {
		e.User = &account{User: a.User}
	}
	if u := &e.Unmapped; u.Gateway != "" {
		e.Target = &endpoint{Name: u.Gateway, UID: u.Instance}
	}
}

// authentication is a gateway's, or that of many whom nobody knows.
func (e *event) authentication() {
	e.Service = &Named{"culvert-coordinator"}
	e.User = &account{User: User{Name: "unknown"}}
	if e.Entity != nil {
		e.User, e.Entity = &account{User{e.Entity.Name, e.Entity.UID}, userSystem}, nil
	}
	for _, r := range e.Unmapped.Refusals {
		if e.Source == nil && r.From != "" {
			e.Source = &Endpoint{IP: r.From}
		}
	}
}

// flows gives an event for each flow.
func (e *event) flows() ([][]byte, error) {
	list, uid := e.Unmapped.Flows, e.Metadata.UID
	e.Unmapped.Session, e.Session = e.Session, nil
	if own := e.Unmapped.Addresses; len(own) > 0 {
		e.Source = &Endpoint{IP: own[0].String()}
	}
	var all [][]byte
	for i, f := range list {
		one := *e
		one.Metadata.UID = uid + "-" + strconv.Itoa(i+1)
		one.Unmapped.Flows = list[i : i+1]
		one.flow(f)
		out, err := one.encode()
		if err != nil {
			return nil, err
		}
		all = append(all, out)
	}
	return all, nil
}

// protocols are IANA's of protocols; ICMP depends on the target.
var protocols = map[string]int{"tcp": 6, "udp": 17}

func (e *event) flow(f wire.FlowRecord) {
	e.Activity, e.Count = flowActivity(f), f.Count
	e.Status, e.Action = statusSuccess, actionAllowed
	decision := decisionAllowed
	switch f.Verdict {
	case wire.FlowAllowed, wire.FlowObserved:
	default:
		e.Status, e.Action, decision, e.Severity = statusFailure, actionDenied, decisionDenied, Low
	}
	if e.Activity == flowFail {
		e.Status = statusFailure
	}
	e.Detail, e.Authorizations = f.Reason, nil
	if f.Rule != "" {
		e.Authorizations = []Authorization{{decision, Named{f.Rule}}}
	}
	e.Target = &endpoint{Endpoint: Endpoint{Host: f.Name, Port: f.Addr.Port()}}
	if f.Addr.IsValid() {
		e.Target.IP = f.Addr.Addr().String()
	}
	e.Connection = &connection{directionInbound, f.Proto, protocols[f.Proto]}
	if f.Proto == "icmp" {
		if e.Connection.Number = 1; f.Addr.Addr().Is6() {
			e.Connection.Number = 58
		}
	}
	e.Traffic = &traffic{In: f.BytesDn, Out: f.BytesUp}
	e.Start, e.Duration = Millis(f.Began), time.Duration(f.Lasted).Milliseconds()
	if e.Start != 0 && f.Cause != wire.CauseOpen {
		e.End = e.Start + e.Duration
	}
}

// flowActivity is activity_id of a flow; several flows in one are traffic.
func flowActivity(f wire.FlowRecord) int {
	switch {
	case f.Verdict != wire.FlowAllowed && f.Verdict != wire.FlowObserved:
		return flowRefuse
	case f.Count > 1:
		return flowTraffic
	}
	switch f.Cause {
	case wire.CauseOpen:
		return flowOpen
	case wire.CauseClosed, wire.CauseIdle:
		return flowClose
	case wire.CauseReset, wire.CauseRevoked, wire.CauseSession:
		return flowReset
	case wire.CauseRefused, wire.CauseUnreachable, wire.CauseTimeout, wire.CauseNoName:
		return flowFail
	}
	return flowTraffic
}
