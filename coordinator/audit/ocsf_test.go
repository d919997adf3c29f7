package audit

import (
	"encoding/json"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/coordinator/audit/audittest"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// What OCSF 1.3 says of the classes that records have, as far as Culvert uses it: fields that a class must have, has with its own,
// and of which it must have one (schema.ocsf.io: classes, profiles host and security_control, objects).
var (
	ocsfBase    = []string{"activity_id", "category_uid", "class_uid", "metadata", "severity_id", "time", "type_uid"}
	ocsfMay     = []string{"activity_name", "count", "duration", "end_time", "message", "start_time", "status_code", "status_detail", "status_id", "unmapped"}
	ocsfControl = []string{"action_id", "authorizations", "disposition_id"}
	ocsfClasses = map[int]struct{ must, may, one []string }{
		tunnelClass: {
			may: []string{"connection_info", "dst_endpoint", "protocol_name", "session", "src_endpoint", "traffic", "tunnel_type_id", "user"},
			one: []string{"session", "src_endpoint", "tunnel_type_id"},
		},
		authClass:      {must: []string{"user"}, may: []string{"service", "session", "src_endpoint"}, one: []string{"service", "dst_endpoint"}},
		entityClass:    {must: []string{"entity"}, may: []string{"entity_result", "src_endpoint"}},
		lifecycleClass: {must: []string{"app"}},
		networkClass: {
			may: []string{"connection_info", "dst_endpoint", "src_endpoint", "traffic"}, one: []string{"dst_endpoint", "src_endpoint"},
		},
	}
	ocsfObjects = map[string][]string{
		"metadata": {"version", "product", "log_provider", "log_name", "event_code", "sequence", "uid", "profiles"},
		"user":     {"name", "uid", "type_id"}, "actor": {"user"}, "service": {"name"}, "app": {"name", "vendor_name", "version"},
		"src_endpoint": {"ip", "port", "hostname", "name", "uid"}, "dst_endpoint": {"ip", "port", "hostname", "name", "uid"},
		"session": {"uid", "issuer", "created_time", "expiration_time", "expiration_reason"},
		"entity":  {"name", "uid", "type"}, "entity_result": {"name", "uid", "type"},
		"connection_info": {"direction_id", "protocol_name", "protocol_num"}, "traffic": {"bytes_in", "bytes_out"},
	}
)

// conforms holds an event against the schema.
func conforms(t *testing.T, line []byte) map[string]any {
	t.Helper()
	var e map[string]any
	if err := json.Unmarshal(line, &e); err != nil {
		t.Fatal(err)
	}
	id, activity := int(e["class_uid"].(float64)), int(e["activity_id"].(float64))
	class, ok := ocsfClasses[id]
	if !ok || int(e["category_uid"].(float64)) != id/1000 || int(e["type_uid"].(float64)) != 100*id+activity {
		t.Fatalf("class %v: %s", e["class_uid"], line)
	}
	profiles, _ := e["metadata"].(map[string]any)["profiles"].([]any)
	known := slices.Concat(ocsfBase, ocsfMay, class.must, class.may)
	if slices.Contains(profiles, any(profileHost)) {
		known = append(known, "actor")
	}
	if slices.Contains(profiles, any(profileControl)) {
		known = append(known, ocsfControl...)
	}
	for name, value := range e {
		if !slices.Contains(known, name) {
			t.Errorf("class %d has no %q: %s", id, name, line)
		}
		object, is := value.(map[string]any)
		for field := range object {
			if want, listed := ocsfObjects[name]; is && listed && !slices.Contains(want, field) {
				t.Errorf("%s has no %q: %s", name, field, line)
			}
		}
	}
	for _, name := range slices.Concat(ocsfBase, class.must) {
		if _, ok := e[name]; !ok {
			t.Errorf("class %d lacks %q: %s", id, name, line)
		}
	}
	if len(class.one) > 0 && !slices.ContainsFunc(class.one, func(name string) bool { return e[name] != nil }) {
		t.Errorf("class %d has none of %q: %s", id, class.one, line)
	}
	if (activity == otherActivity) != (e["activity_name"] != nil) {
		t.Errorf("activity %d is named %v", activity, e["activity_name"])
	}
	return e
}

// ocsfRecords gives a record of each event as the coordinator makes them.
func ocsfRecords() map[Event]Record {
	began := time.Date(2026, 11, 20, 10, 0, 0, 0, time.UTC)
	session := &Session{UID: "s", Issuer: "https://issuer.example", Created: 1, Expires: 2}
	job := Unmapped{Network: "corp", Job: &Job{Repository: "acme/shop"}, Gateway: "gw", Instance: "i", Addresses: []netip.Addr{netip.MustParseAddr("198.18.0.7")}}
	all := map[Event]Record{}
	for name, k := range kinds {
		r := Record{Event: name}
		switch k.class {
		case tunnelClass, networkClass:
			r.Session, r.Unmapped, r.Actor = session, job, &Actor{User{"alice", "7"}}
			r.From(netip.MustParseAddr("192.0.2.1"))
		case authClass, entityClass:
			r.Entity = &Entity{Name: "gw", UID: "i", Type: "gateway"}
		}
		all[name] = r
	}
	join, deny := all[Join], all[Denied]
	join.Allowed([]string{"deploy"})
	deny.Refuse(&problem.Error{Code: problem.Denied, Message: "no", Denial: &problem.Denial{Rule: "deploy", Claim: "ref"}})
	flows, refused := all[Flows], Record{Event: Refused, Status: statusFailure, Action: actionDenied, Count: 9}
	target := netip.MustParseAddrPort("10.20.0.5:5432")
	flows.Unmapped.Flows = []wire.FlowRecord{
		{Flow: 1, Session: "s", Proto: "tcp", Name: "db.internal", Addr: target, Verdict: wire.FlowAllowed, Rule: "deploy", Began: began,
			Lasted: wire.Duration(3 * time.Second), BytesUp: 10, BytesDn: 20, Cause: wire.CauseClosed},
		{Flow: 2, Session: "s", Proto: "icmp", Addr: netip.MustParseAddrPort("[2001:db8::1]:0"), Verdict: wire.FlowRefused, Reason: "not granted", Began: began},
		{Session: "s", Proto: "dns", Name: "secret.internal", Verdict: wire.FlowRefused, Count: 3},
		{Flow: 4, Session: "s", Proto: "udp", Addr: target, Verdict: wire.FlowObserved, Began: began, Cause: wire.CauseOpen},
		{Flow: 5, Session: "s", Proto: "tcp", Addr: target, Verdict: wire.FlowAllowed, Began: began, Cause: wire.CauseTimeout},
	}
	refused.Unmapped.Refusals = []Refusal{{Code: problem.RateLimited, From: "192.0.2.9", Count: 9}}
	all[Join], all[Denied], all[Flows], all[Refused] = join, deny, flows, refused
	return all
}

// TestOCSF: whatever is in the log comes out as events that the schema knows, with all that their classes want.
func TestOCSF(t *testing.T) {
	store := audittest.New()
	l := open(t, store)
	all := ocsfRecords()
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if err := l.Record(t.Context(), all[name]); err != nil {
			t.Fatal(err)
		}
	}
	got, uids := map[Event][]map[string]any{}, map[string]bool{}
	err := l.Reader().Tail(t.Context(), Filter{}, 0, false, func(line []byte) bool {
		events, err := OCSF(line)
		if err != nil {
			t.Error(err)
		}
		for _, one := range events {
			e := conforms(t, one)
			about := e["metadata"].(map[string]any)
			code := Event(about["event_code"].(string))
			got[code] = append(got[code], e)
			uids[about["uid"].(string)] = true
		}
		return true
	})
	if err != nil || len(got) != len(kinds) || len(uids) != len(kinds)+4 {
		t.Fatalf("%d events of %d kinds, %v", len(uids), len(got), err)
	}
	is := func(e map[string]any, path string, want any) {
		t.Helper()
		var at any = e
		for name := range strings.SplitSeq(path, ".") {
			at = at.(map[string]any)[name]
		}
		if at != want {
			t.Errorf("%s is %v, want %v", path, at, want)
		}
	}
	is(got[Join][0], "user.name", "alice")
	is(got[Join][0], "disposition_id", 1.0)
	is(got[Join][0], "dst_endpoint.name", "gw")
	is(got[Denied][0], "disposition_id", 2.0)
	is(got[Moved][0], "activity_name", "session.move")
	is(got[Enrolled][0], "user.name", "gw")
	is(got[Refused][0], "src_endpoint.ip", "192.0.2.9")
	flows := got[Flows]
	is(flows[0], "src_endpoint.ip", "198.18.0.7")
	is(flows[0], "dst_endpoint.hostname", "db.internal")
	is(flows[0], "dst_endpoint.port", 5432.0)
	is(flows[0], "traffic.bytes_out", 10.0)
	is(flows[0], "duration", 3000.0)
	is(flows[0], "unmapped.session.uid", "s")
	for i, activity := range []float64{flowClose, flowRefuse, flowRefuse, flowOpen, flowFail} {
		is(flows[i], "activity_id", activity)
	}
	is(flows[1], "connection_info.protocol_num", 58.0)
	is(flows[1], "status_detail", "not granted")
	is(flows[2], "count", 3.0)
}

func TestOCSFOfSomethingElse(t *testing.T) {
	for _, line := range []string{"", "{}", `{"seal":{}}`, `{"prev":"x","metadata":5}`} {
		if got, err := OCSF([]byte(line)); err == nil {
			t.Errorf("%q is %q", line, got)
		}
	}
}
