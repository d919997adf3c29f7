package audit

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/wire"
)

func flowLine(t interface{ Fatal(...any) }, flows ...wire.FlowRecord) []byte {
	r := Record{Event: Flows, Session: &Session{UID: "s1"}, Unmapped: Unmapped{Network: "corp", Instance: "i1", Flows: flows}}
	body, err := encode(r, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	line, _ := link(nil, head{}, Flows, []byte(`"n1"`), body)
	return line
}

func flow(proto, name, to string, verdict wire.FlowVerdict) wire.FlowRecord {
	f := wire.FlowRecord{Session: "s1", Proto: proto, Name: name, Verdict: verdict, Began: time.Unix(1_800_000_000, 0)}
	if to != "" {
		f.Addr = netip.MustParseAddrPort(to)
	}
	return f
}

func suggested(t *testing.T, denied bool, flows ...wire.FlowRecord) Suggestion {
	t.Helper()
	s := Suggester{Denied: denied}
	s.Learn(flowLine(t, flows...))
	list := s.Suggestions()
	if len(list) != 1 {
		t.Fatalf("%d networks", len(list))
	}
	return list[0]
}

func allowed(g Suggestion) (out []string) {
	for _, l := range g.Lines {
		out = append(out, l.Allow)
	}
	return out
}

func TestSuggest(t *testing.T) {
	ok, seen, no := wire.FlowAllowed, wire.FlowObserved, wire.FlowRefused
	for name, c := range map[string]struct {
		flows []wire.FlowRecord
		want  []string
	}{
		"one flow":           {[]wire.FlowRecord{flow("tcp", "", "10.0.0.1:5432", ok)}, []string{"tcp 10.0.0.1:5432"}},
		"by name":            {[]wire.FlowRecord{flow("tcp", "db.internal", "10.0.0.1:5432", seen), flow("tcp", "DB.internal", "10.0.0.2:5432", ok)}, []string{"tcp db.internal:5432"}},
		"tcp and udp alike":  {[]wire.FlowRecord{flow("tcp", "", "10.0.0.1:53", ok), flow("udp", "", "10.0.0.1:53", ok)}, []string{"tcp,udp 10.0.0.1:53"}},
		"tcp and udp differ": {[]wire.FlowRecord{flow("tcp", "", "10.0.0.1:53", ok), flow("udp", "", "10.0.0.1:54", ok)}, []string{"tcp 10.0.0.1:53", "udp 10.0.0.1:54"}},
		"ports": {[]wire.FlowRecord{flow("tcp", "x.corp", "10.0.0.1:8002", ok), flow("tcp", "x.corp", "10.0.0.1:8000", ok), flow("tcp", "x.corp", "10.0.0.1:8001", ok), flow("tcp", "x.corp", "10.0.0.1:443", ok)},
			[]string{"tcp x.corp:443,8000-8002"}},
		"ping":              {[]wire.FlowRecord{flow("icmp", "", "10.0.0.1:0", ok), flow("icmp", "", "[fd00::1]:0", ok)}, []string{"icmp 10.0.0.1", "icmp [fd00::1]"}},
		"halves of a range": {[]wire.FlowRecord{flow("tcp", "", "10.0.0.0:1", ok), flow("tcp", "", "10.0.0.1:1", ok), flow("tcp", "", "10.0.0.2:1", ok), flow("tcp", "", "10.0.0.3:1", ok), flow("tcp", "", "10.0.0.4:1", ok)}, []string{"tcp 10.0.0.0/30:1", "tcp 10.0.0.4:1"}},
		"not halves":        {[]wire.FlowRecord{flow("tcp", "", "10.0.0.1:1", ok), flow("tcp", "", "10.0.0.2:1", ok)}, []string{"tcp 10.0.0.1:1", "tcp 10.0.0.2:1"}},
		"only by name":      {[]wire.FlowRecord{flow("tcp", "", "169.254.1.0:1", ok), flow("tcp", "", "169.254.1.1:1", ok)}, []string{"tcp 169.254.1.0:1", "tcp 169.254.1.1:1"}},
		"mapped":            {[]wire.FlowRecord{flow("tcp", "", "[::ffff:10.0.0.1]:1", ok)}, []string{"tcp 10.0.0.1:1"}},
		"denied":            {[]wire.FlowRecord{flow("tcp", "", "10.0.0.1:1", no), flow("dns", "evil.corp", "", no)}, nil},
	} {
		if got := allowed(suggested(t, false, c.flows...)); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	failed := flow("tcp", "", "10.0.0.1:1", ok)
	failed.Cause = wire.CauseTimeout
	if g := suggested(t, false, failed, flow("tcp", "", "10.0.0.9:1", no)); len(g.Lines) != 0 || len(g.Failed) != 1 || len(g.Denied) != 1 {
		t.Errorf("%+v", g)
	}
	if got := allowed(suggested(t, true, flow("tcp", "", "10.0.0.9:1", no))); !slices.Equal(got, []string{"tcp 10.0.0.9:1"}) {
		t.Errorf("denied ones asked for: %q", got)
	}
}

func TestSuggestCountsOnce(t *testing.T) {
	open := flow("tcp", "", "10.0.0.1:1", wire.FlowAllowed)
	open.Flow, open.Cause = 7, wire.CauseOpen
	closed := open
	closed.Cause = wire.CauseClosed
	many := flow("tcp", "", "10.0.0.1:1", wire.FlowAllowed)
	many.Count = 10
	if g := suggested(t, false, open, closed, many); g.Flows != 11 || g.Sessions != 1 {
		t.Errorf("%+v", g)
	}
	var b strings.Builder
	g := suggested(t, false, flow("tcp", "", "10.0.0.1:1", wire.FlowObserved), flow("tcp", "a\nb", "10.0.0.1:1", wire.FlowRefused))
	if err := g.Write(&b); err != nil || !strings.Contains(b.String(), "allow:\n  - \"tcp 10.0.0.1:1\" # not allowed yet\n# denied") || strings.Contains(b.String(), "a\nb") {
		t.Errorf("%s %v", b.String(), err)
	}
}

// TestSuggestionsSayWhatIsNew: beside a line stands what is not plain from it, for whoever has some of its parts in a rule already.
func TestSuggestionsSayWhatIsNew(t *testing.T) {
	ok, seen, no := wire.FlowAllowed, wire.FlowObserved, wire.FlowRefused
	over := wire.FlowOverLimits
	for name, c := range map[string]struct {
		flows []wire.FlowRecord
		want  string
	}{
		"nothing":         {[]wire.FlowRecord{flow("tcp", "x.corp", "10.0.0.1:1", ok)}, ""},
		"over the limits": {[]wire.FlowRecord{flow("tcp", "x.corp", "10.0.0.1:1", over)}, ""},
		"all":             {[]wire.FlowRecord{flow("tcp", "x.corp", "10.0.0.1:1", seen)}, " # not allowed yet"},
		"denied":          {[]wire.FlowRecord{flow("tcp", "x.corp", "10.0.0.1:1", no)}, " # not allowed yet"},
		"allowed since":   {[]wire.FlowRecord{flow("tcp", "x.corp", "10.0.0.1:1", seen), flow("tcp", "x.corp", "10.0.0.1:1", ok)}, " # not allowed yet"},
		"one port of two": {[]wire.FlowRecord{flow("tcp", "x.corp", "10.0.0.1:1", seen), flow("tcp", "x.corp", "10.0.0.1:2", ok)}, " # of it not allowed yet: tcp x.corp:1"},
		"one protocol":    {[]wire.FlowRecord{flow("tcp", "x.corp", "10.0.0.1:1", ok), flow("udp", "x.corp", "10.0.0.1:1", seen)}, " # of it not allowed yet: udp x.corp:1"},
		"a range":         {[]wire.FlowRecord{flow("icmp", "", "10.0.0.2:0", ok), flow("icmp", "", "10.0.0.3:0", ok)}, " # 10.0.0.2 to 10.0.0.3, of which each was used"},
		"one of a range":  {[]wire.FlowRecord{flow("tcp", "", "[fd00::2]:1", ok), flow("tcp", "", "[fd00::3]:1", seen)}, " # fd00::2 to fd00::3, of which each was used; of it not allowed yet: tcp [fd00::3]:1"},
	} {
		g := suggested(t, true, c.flows...)
		if len(g.Lines) != 1 || g.Lines[0].Flows != uint64(len(c.flows)) {
			t.Errorf("%s: %+v", name, g.Lines)
		}
		var b strings.Builder
		if err := g.Write(&b); err != nil || !strings.HasSuffix(b.String(), "\""+c.want+"\n") {
			t.Errorf("%s: %s%v", name, b.String(), err)
		}
	}
	s := Suggester{}
	for _, repository := range []string{"acme/shop", "acme/cart"} {
		r := Record{Event: Flows, Session: &Session{UID: repository}, Unmapped: Unmapped{Network: "corp", Job: &Job{Repository: repository}, Flows: []wire.FlowRecord{flow("tcp", "x.corp", "10.0.0.1:1", ok)}}}
		body, err := encode(r, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		line, _ := link(nil, head{}, Flows, []byte(`"n1"`), body)
		s.Learn(line)
	}
	var b strings.Builder
	if err := s.Suggestions()[0].Write(&b); err != nil || !strings.Contains(b.String(), "of 2 repositories") || !strings.Contains(b.String(), "--repository takes one: acme/cart, acme/shop\n") {
		t.Errorf("%s%v", b.String(), err)
	}
}

// TestSuggestionsAreSmallest: the lines are a policy that allows every flow that was used and none that was not, and each of them is
// needed.
func TestSuggestionsAreSmallest(t *testing.T) {
	protos := map[string]policy.Proto{"tcp": policy.TCP, "udp": policy.UDP, "icmp": policy.ICMP}
	rapid.Check(t, func(t *rapid.T) {
		gen := rapid.Custom(func(t *rapid.T) wire.FlowRecord {
			proto := rapid.SampledFrom([]string{"tcp", "udp", "icmp"}).Draw(t, "proto")
			port := uint16(rapid.IntRange(1, 5).Draw(t, "port"))
			if proto == "icmp" {
				port = 0
			}
			addr := rapid.SampledFrom([]string{"10.0.0.", "169.254.169.", "198.51.100.", "127.0.0."}).Draw(t, "net")
			a := netip.MustParseAddr(addr + string(rune('0'+rapid.IntRange(0, 7).Draw(t, "host"))))
			if rapid.Bool().Draw(t, "v6") {
				a = netip.MustParseAddr("fd00::" + string(rune('0'+rapid.IntRange(0, 7).Draw(t, "host6"))))
			}
			return wire.FlowRecord{Session: "s1", Proto: proto, Addr: netip.AddrPortFrom(a, port), Verdict: wire.FlowAllowed}
		})
		flows := rapid.SliceOfN(gen, 1, 40).Draw(t, "flows")
		s := Suggester{}
		s.Learn(flowLine(t, flows...))
		lines := s.Suggestions()[0].Lines
		scope := func(skip int) *policy.Scope {
			var grants []wire.Grant
			for i, l := range lines {
				if i != skip {
					grants = append(grants, wire.Grant{Rule: "r", Allow: l.Allow})
				}
			}
			g, err := policy.ParseGrant(grants)
			if err != nil {
				t.Fatalf("%v: %v", lines, err)
			}
			return &policy.Scope{Offered: g, Local: g}
		}
		covers := func(s *policy.Scope, f wire.FlowRecord) bool {
			return s.Decide(policy.Flow{Proto: protos[f.Proto], Dst: f.Addr}).Allowed
		}
		all := scope(-1)
		for _, f := range flows {
			if !covers(all, f) {
				t.Fatalf("%v does not cover %s %s", lines, f.Proto, f.Addr)
			}
		}
		total := uint64(0)
		for _, l := range lines {
			if total += l.Flows; len(l.New) > 0 {
				t.Fatalf("%s: all was allowed, and this is new: %q", l.Allow, l.New)
			}
		}
		if total != uint64(len(flows)) {
			t.Fatalf("%v have %d flows, want %d", lines, total, len(flows))
		}
		for i := range lines {
			if without := scope(i); !slices.ContainsFunc(flows, func(f wire.FlowRecord) bool { return !covers(without, f) }) {
				t.Fatalf("%v: %s is not needed", lines, lines[i].Allow)
			}
		}
		other := gen.Draw(t, "other")
		usedToo := slices.ContainsFunc(flows, func(f wire.FlowRecord) bool { return f.Proto == other.Proto && f.Addr == other.Addr })
		if !usedToo && covers(all, other) {
			t.Fatalf("%v covers %s %s, which nobody used", lines, other.Proto, other.Addr)
		}
	})
}

// What is closed whatever is granted is told of and never offered as a line, by address and by name: a list is copied into a rule.
func TestSuggestsNothingClosed(t *testing.T) {
	because := func(reason string, f wire.FlowRecord) wire.FlowRecord {
		f.Reason = reason
		return f
	}
	g := suggested(t, true,
		because("not granted", flow("tcp", "", "10.0.0.9:22", wire.FlowRefused)),
		because("not granted by this name", flow("tcp", "db.internal", "10.0.0.5:22", wire.FlowRefused)),
		because("cloud metadata address", flow("tcp", "", "169.254.169.254:80", wire.FlowRefused)),
		because("the gateway's own address", flow("tcp", "", "[::1]:80", wire.FlowRefused)),
		because("its name leads to: cloud metadata address", flow("tcp", "x.internal", "198.19.0.7:80", wire.FlowRefused)))
	if got, want := allowed(g), []string{"tcp 10.0.0.9:22", "tcp db.internal:22"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if want := "tcp [::1]:80 (the gateway's own address)"; len(g.Denied) != 3 || !slices.Contains(g.Denied, want) {
		t.Errorf("%q, want %q among three", g.Denied, want)
	}
}

func FuzzSuggest(f *testing.F) {
	f.Add([]byte(`{"unmapped":{"network":"corp","flows":[{"proto":"tcp","addr":"10.0.0.1:1","verdict":"allowed"}]}}`))
	f.Add([]byte(`{"unmapped":{"flows":[{"proto":"icmp","name":"..","addr":"[fe80::1%e]:0","verdict":"observed","count":18446744073709551615}]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := Suggester{Denied: true}
		s.Learn(data)
		for _, g := range s.Suggestions() {
			if err := g.Write(&strings.Builder{}); err != nil {
				t.Error(err)
			}
		}
		_ = json.Valid(data)
	})
}
