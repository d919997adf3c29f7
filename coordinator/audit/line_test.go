package audit

import (
	"encoding/json"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// TestFlowsForPeople: a record of flows tells of each, and is found by what became of any.
func TestFlowsForPeople(t *testing.T) {
	target := netip.MustParseAddrPort("10.20.0.5:5432")
	text := flowLine(t,
		wire.FlowRecord{Session: "s", Proto: "tcp", Name: "db.internal", Addr: target, Verdict: wire.FlowAllowed, Rule: "deploy", BytesUp: 10, BytesDn: 20},
		wire.FlowRecord{Session: "s", Proto: "udp", Addr: target, Verdict: wire.FlowRefused, Reason: "no line covers it\nx", Count: 7},
		wire.FlowRecord{Session: "s", Proto: "tcp", Addr: target, Verdict: wire.FlowOverLimits},
	)
	allowed := "    allowed  proto=tcp name=db.internal addr=10.20.0.5:5432 rule=deploy up=10 down=20"
	denied := `    denied   proto=udp addr=10.20.0.5:5432 reason="no line covers it\nx" count=7`
	limited := "    limited  proto=tcp addr=10.20.0.5:5432"
	for verdict, want := range map[string][]string{"": {allowed, denied, limited}, decisionAllowed: {allowed}, decisionDenied: {denied, limited}} {
		lines := strings.Split(Line(text, verdict), "\n")
		if !strings.Contains(lines[0], string(Flows)) || strings.Join(lines[1:], "\n") != strings.Join(want, "\n") {
			t.Errorf("%q: %q, want %q", verdict, lines, want)
		}
	}
	only := flowLine(t, wire.FlowRecord{Session: "s", Proto: "tcp", Addr: target, Verdict: wire.FlowObserved})
	for verdict, want := range map[string][2]bool{"": {true, true}, decisionAllowed: {true, true}, decisionDenied: {true, false}} {
		f, err := ParseFilter(url.Values{"verdict": {verdict}}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if got := [2]bool{f.matches(text), f.matches(only)}; got != want {
			t.Errorf("%q finds %v, want %v", verdict, got, want)
		}
	}
}

// TestChangesForPeople: what was changed stands in the line, so that nobody has to read the record for it.
func TestChangesForPeople(t *testing.T) {
	for want, r := range map[string]Record{
		" rules=3 added=a,b changed=c": {Unmapped: Unmapped{Change: &Change{Rules: 3, Added: []string{"a", "b"}, Changed: []string{"c"}}}},
		" was=K1 is=K2":                {Entity: &Entity{UID: "K1"}, EntityResult: &Entity{UID: "K2"}},
	} {
		text, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if got := Line(text, ""); !strings.Contains(got, want) {
			t.Errorf("%q has no %q", got, want)
		}
	}
}

// TestFilterThatCannotMatch: a filter that finds nothing by mistake says so, in place of finding nothing.
func TestFilterThatCannotMatch(t *testing.T) {
	for want, q := range map[string]url.Values{
		`did you mean "session.join"?`: {"event": {"session.jion"}},
		"name one of audit.broken, ":   {"event": {"xyz"}},
		"OWNER/NAME":                   {"repository": {"acme"}},
		"swap them":                    {"since": {"2h"}, "until": {"3h"}},
	} {
		_, err := ParseFilter(q, time.Now())
		if p := problem.From(err); p.Code != problem.BadRequest || !strings.Contains(p.Next, want) {
			t.Errorf("%v: %v", q, err)
		}
	}
	for _, q := range []url.Values{{"repository": {"acme/"}}, {"repository": {"acme/shop"}}, {"since": {"3h"}, "until": {"2h"}}} {
		if _, err := ParseFilter(q, time.Now()); err != nil {
			t.Errorf("%v: %v", q, err)
		}
	}
}
