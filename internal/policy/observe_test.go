package policy

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/wire"
)

// watched is a scope of allow lines and observe lines, those of the gateway's own policy behind a slash.
func watched(t testing.TB, allow, observe, ownAllow, ownObserve string) *Scope {
	t.Helper()
	grant := func(allow, observe string) *Grant {
		lines := wireLines(split(allow)...)
		for _, o := range split(observe) {
			lines = append(lines, wire.Grant{Rule: "seen", Observe: o})
		}
		g, err := ParseGrant(lines)
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	s := scopeOf(t, "", "")
	s.Offered = grant(allow, observe)
	if ownAllow+ownObserve != "" {
		s.Local = grant(ownAllow, ownObserve)
	}
	return s
}

func TestObserve(t *testing.T) {
	tests := []struct {
		allow, observe, ownAllow, ownObserve, flow string
		rule                                       string // "" means refused
		observed                                   bool
	}{
		{"tcp 10.0.0.5:1", "10.0.0.0/8", "", "", "tcp 10.0.0.5:1", "r1", false},
		{"tcp 10.0.0.5:1", "10.0.0.0/8", "", "", "tcp 10.0.0.5:2", "seen", true},
		{"tcp 10.0.0.5:1", "10.0.0.0/8", "", "", "udp 10.0.0.5:1", "seen", true},
		{"tcp 10.0.0.5:1", "10.0.0.0/8", "", "", "icmp 10.0.0.5", "seen", true},
		{"tcp 10.0.0.5:1", "10.0.0.0/8", "", "", "tcp 11.0.0.5:1", "", false},
		{"", "internet", "", "", "udp 8.8.8.8:53", "seen", true},
		{"", "internet", "", "", "udp 10.0.0.1:53", "", false},
		{"", "fd00::/8", "", "", "tcp [fd00::1]:65535", "seen", true},
		{"", "10.1.2.3", "", "", "tcp 10.1.2.3:1", "seen", true},
		{"", "10.0.0.0/8", "tcp 10.0.0.5:1", "", "tcp 10.0.0.5:1", "seen", true},
		{"", "10.0.0.0/8", "tcp 10.0.0.5:1", "", "tcp 10.0.0.5:2", "", false},
		{"tcp 10.0.0.5:1", "", "", "10.0.0.0/8", "tcp 10.0.0.5:1", "r1", true},
		{"tcp 10.0.0.5:1", "", "", "11.0.0.0/8", "tcp 10.0.0.5:1", "", false},

		// never what only an exact line opens, in whatever spelling
		{"", "0.0.0.0/0", "", "0.0.0.0/0", "tcp 169.254.169.254:80", "", false},
		{"", "0.0.0.0/0", "", "0.0.0.0/0", "tcp 169.254.1.1:80", "", false},
		{"", "0.0.0.0/0", "", "0.0.0.0/0", "tcp 127.0.0.1:80", "", false},
		{"", "0.0.0.0/0", "", "0.0.0.0/0", "tcp 168.63.129.16:80", "", false},
		{"", "0.0.0.0/0", "", "0.0.0.0/0", "tcp 224.0.0.1:80", "", false},
		{"", "0.0.0.0/0", "", "0.0.0.0/0", "tcp 10.9.9.9:80", "", false},
		{"", "0.0.0.0/0", "", "0.0.0.0/0", "tcp 198.18.0.7:80", "", false},
		{"", "0.0.0.0/0|::/0", "", "0.0.0.0/0|::/0", "tcp [64:ff9b::7f00:1]:80", "", false},
		{"", "::/0", "", "", "tcp [64:ff9b::10.0.0.1]:80", "", false},
		{"", "0.0.0.0/0|::/0", "", "", "tcp [64:ff9b::10.0.0.1]:80", "seen", true},
	}
	for _, tt := range tests {
		v := watched(t, tt.allow, tt.observe, tt.ownAllow, tt.ownObserve).Decide(flowOf(t, tt.flow))
		if v.Allowed != (tt.rule != "") || v.Rule != tt.rule || v.Observed != tt.observed {
			t.Errorf("%+v: got %+v", tt, v)
		}
	}
}

// A name that the gateway's own policy covers only by a range that it observes is reached, and marked.
func TestObserveByTheGatewayCoversNames(t *testing.T) {
	s := watched(t, "tcp db.internal:5432", "", "", "10.0.0.0/8")
	if v := s.DecideName("db.internal", flowOf(t, "tcp 10.0.0.5:5432")); !v.Allowed || !v.Observed || v.Rule != "r1" {
		t.Errorf("%+v", v)
	}
	if v := s.DecideName("db.internal", flowOf(t, "tcp 11.0.0.5:5432")); v.Allowed {
		t.Errorf("%+v", v)
	}
	if exact, _ := s.Names(); !slices.Equal(exact, []string{"db.internal"}) {
		t.Errorf("names %q", exact)
	}
}

func TestObservedRangesAreRoutes(t *testing.T) {
	s := watched(t, "tcp 10.0.0.5:1", "10.1.0.0/16|169.0.0.0/8", "", "")
	routes := s.Routes()
	for _, want := range []string{"10.0.0.5/32", "10.1.0.0/16"} {
		if !slices.Contains(routes, netip.MustParsePrefix(want)) {
			t.Errorf("%s is not in %v", want, routes)
		}
	}
	if contains(routes, netip.MustParseAddr("169.254.169.254")) || !contains(routes, netip.MustParseAddr("169.253.0.1")) {
		t.Errorf("routes %v", routes)
	}
	if s.Empty() || !watched(t, "", "", "", "").Empty() {
		t.Error("a scope does not know whether it is empty")
	}
}

func TestParseObserveRefuses(t *testing.T) {
	for text, message := range map[string]string{
		"":                        "no address",
		"tcp 10.0.0.0/8":          "no range to observe",
		"10.0.0.0/8:443":          "no CIDR",
		"db.internal":             "is a name",
		"*.svc.corp":              "is a name",
		"10.0.0.1/8":              "bits set",
		"169.254.0.0/16":          "never opens",
		"127.0.0.1":               "never opens",
		"fe80::/64":               "never opens",
		"::ffff:10.0.0.1":         "IPv6 dress",
		strings.Repeat("1", 2000): "longer than",
	} {
		if _, err := parseObserve(text); err == nil || !strings.Contains(err.Message, message) || err.Next == "" {
			t.Errorf("%.40q: %v", text, err)
		}
	}
	if _, err := ParseGrant([]wire.Grant{{Rule: "r", Allow: "tcp 10.0.0.1:1", Observe: "10.0.0.0/8"}}); err == nil {
		t.Error("a grant that allows and observes was taken")
	}
}

func TestCompileObserve(t *testing.T) {
	r := Rule{Name: "r", Match: map[string]Values{"repository_owner_id": {"1"}}, Observe: []string{" 10.0.0.0/8 "}}
	p, err := Compile([]Rule{r}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := p.Evaluate(today, "n", claimSet{"iss": GitHub, "repository_owner_id": "1"})
	if !d.Allowed || len(d.Grants) != 1 || d.Grants[0] != (wire.Grant{Rule: "r", Observe: "10.0.0.0/8"}) {
		t.Errorf("%+v", d)
	}
	r.Observe = []string{"10.0.0.0/8", "nonsense/1"}
	_, err = Compile([]Rule{r}, Options{})
	if e, ok := errors.AsType[*Error](err); !ok || e.Path != "$.rules[0].observe[1]" {
		t.Errorf("%v", err)
	}
}

// What may be asked for and what may be opened agree: a name is known exactly if some port of it is offered.
func TestKnowingNames(t *testing.T) {
	name := rapid.StringMatching(`[ab](\.[ab]){0,2}`)
	rapid.Check(t, func(t *rapid.T) {
		lines := func(label string) *Grant {
			var out []wire.Grant
			for range rapid.IntRange(0, 3).Draw(t, label) {
				wild := rapid.SampledFrom([]string{"", "*."}).Draw(t, "wild")
				out = append(out, wire.Grant{Rule: "r", Allow: "tcp " + wild + name.Draw(t, "granted") + ":1"})
			}
			g, err := ParseGrant(out)
			if err != nil {
				t.Fatal(err)
			}
			return g
		}
		s := &Scope{Offered: lines("offered")}
		if rapid.Bool().Draw(t, "own policy") {
			s.Local = lines("local")
		}
		n := name.Draw(t, "asked")
		offers := s.OffersName(n, TCP, 1).Allowed
		if decided := s.DecideName(n, Flow{TCP, netip.MustParseAddrPort("10.0.0.1:1")}).Allowed; offers != s.KnowsName(n) || offers != decided {
			t.Fatalf("%s: offered %v, known %v, decided %v", n, offers, s.KnowsName(n), decided)
		}
		if s.ExactName(n) && !s.Offered.hasName(n) {
			t.Fatalf("%s is spelt out but not known", n)
		}
	})
}
