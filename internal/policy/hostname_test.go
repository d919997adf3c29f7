package policy

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestDecideName(t *testing.T) {
	const db = "tcp db.internal:5432"
	tests := []struct {
		offered, local, name, flow string
		rule                       string // "" means refused
		reason                     string // if refused; default: not granted
	}{
		{db, "", "db.internal", "tcp 10.0.0.5:5432", "r1", ""},
		{db, "", "db.internal", "tcp 8.8.8.8:5432", "r1", ""},
		{db, "", "db.internal", "tcp [fd00::5]:5432", "r1", ""},
		{db, "", "db.internal", "tcp 10.0.0.5:5433", "", ""},
		{db, "", "db.internal", "udp 10.0.0.5:5432", "", ""},
		{db, "", "db.internal", "icmp 10.0.0.5", "", ""},
		{"icmp db.internal", "", "db.internal", "icmp 10.0.0.5", "r1", ""},
		{db, "", "xdb.internal", "tcp 10.0.0.5:5432", "", ""},
		{db, "", "db.internal.evil", "tcp 10.0.0.5:5432", "", ""},
		{db, "", "a.db.internal", "tcp 10.0.0.5:5432", "", ""},
		{db, "", "internal", "tcp 10.0.0.5:5432", "", ""},
		{db, "", "", "tcp 10.0.0.5:5432", "", ""},

		// a wildcard is every name below its domain, at any depth, and not the domain
		{"tcp *.svc.corp:443", "", "a.svc.corp", "tcp 10.0.0.5:443", "r1", ""},
		{"tcp *.svc.corp:443", "", "a.b.svc.corp", "tcp 10.0.0.5:443", "r1", ""},
		{"tcp *.svc.corp:443", "", "svc.corp", "tcp 10.0.0.5:443", "", ""},
		{"tcp *.svc.corp:443", "", "evilsvc.corp", "tcp 10.0.0.5:443", "", ""},
		{"tcp *.svc.corp:443", "", "a.svc.corp.evil", "tcp 10.0.0.5:443", "", ""},
		{"tcp *.svc.corp:443", "", "corp", "tcp 10.0.0.5:443", "", ""},

		// the first line names the rule
		{"tcp *.corp:*|tcp db.corp:1", "", "db.corp", "tcp 10.0.0.5:1", "r1", ""},
		{"tcp db.corp:1|tcp *.corp:*", "", "db.corp", "tcp 10.0.0.5:1", "r1", ""},
		{"tcp *.a.corp:1|tcp *.corp:1", "", "x.a.corp", "tcp 10.0.0.5:1", "r1", ""},
		{"tcp *.a.corp:2|tcp *.corp:1", "", "x.a.corp", "tcp 10.0.0.5:1", "r2", ""},

		// a range does not grant names, and a name grants no address
		{"tcp 10.0.0.0/8:*", "", "db.internal", "tcp 10.0.0.5:5432", "", ""},

		// the gateway's own policy covers by name or by address
		{db, db, "db.internal", "tcp 10.0.0.5:5432", "r1", ""},
		{db, "tcp *.internal:*", "db.internal", "tcp 10.0.0.5:5432", "r1", ""},
		{db, "tcp 10.0.0.0/24:*", "db.internal", "tcp 10.0.0.5:5432", "r1", ""},
		{db, "tcp 10.0.0.0/24:*", "db.internal", "tcp 10.0.1.5:5432", "", ""},
		{db, "tcp other.internal:*", "db.internal", "tcp 10.0.0.5:5432", "", ""},
		{db, "tcp db.internal:1", "db.internal", "tcp 10.0.0.5:5432", "", ""},
		{"tcp 10.0.0.0/8:*", db, "db.internal", "tcp 10.0.0.5:5432", "", ""},

		// whatever DNS says, closed addresses stay closed unless a line names them
		{db, "", "db.internal", "tcp 127.0.0.1:5432", "", reasonLoopback},
		{db, db, "db.internal", "tcp 127.0.0.1:5432", "", reasonLoopback},
		{db + "|tcp 127.0.0.1:5432", "", "db.internal", "tcp 127.0.0.1:5432", "", reasonLoopback},
		{db + "|tcp 127.0.0.1:5432", "tcp 127.0.0.1:5432", "db.internal", "tcp 127.0.0.1:5432", "r2", ""},
		{db, everything, "db.internal", "tcp 169.254.169.254:5432", "", reasonMetadata},
		{db, "", "db.internal", "tcp 169.254.1.1:5432", "", reasonLinkLocal},
		{db + "|tcp 169.254.1.1:5432", "", "db.internal", "tcp 169.254.1.1:5432", "r2", ""},
		{db, "", "db.internal", "tcp 224.0.0.1:5432", "", reasonMulticast},
		{db, "", "db.internal", "tcp 0.0.0.0:5432", "", reasonUnspecified},
		{db, "", "db.internal", "tcp 10.9.9.9:5432", "", reasonOwn},
		{db, db, "db.internal", "tcp 198.18.0.7:5432", "", reasonOverlay},
		{db, "", "db.internal", "tcp 198.19.0.7:5432", "", reasonOverlay},
		{db, "", "db.internal", "tcp [::ffff:127.0.0.1]:5432", "", reasonLoopback},
		{db, "", "db.internal", "tcp [64:ff9b::7f00:1]:5432", "", reasonLoopback},
		{db, "", "db.internal", "tcp [64:ff9b::a9fe:a9fe]:5432", "", reasonMetadata},
		{db, "", "db.internal", "tcp [64:ff9b::10.0.0.5]:5432", "r1", ""},
		{db, "tcp [64:ff9b::/96]:*", "db.internal", "tcp [64:ff9b::10.0.0.5]:5432", "", ""},
	}
	for _, tt := range tests {
		v := scopeOf(t, tt.offered, tt.local).DecideName(tt.name, flowOf(t, tt.flow))
		if v.Allowed != (tt.rule != "") || v.Rule != tt.rule {
			t.Errorf("%s (own policy %q): %s at %s gives %+v, want rule %q", tt.offered, tt.local, tt.name, tt.flow, v, tt.rule)
		}
		want := tt.reason
		if want == "" {
			want = reasonNotGranted
		}
		if !v.Allowed && v.Reason != want {
			t.Errorf("%s: %s at %s is refused as %q, want %q", tt.offered, tt.name, tt.flow, v.Reason, want)
		}
	}
}

func TestNames(t *testing.T) {
	tests := []struct{ offered, local, exact, below string }{
		{"tcp 10.0.0.1:1", "", "", ""},
		{"tcp b.corp:1|tcp a.corp:1|udp A.corp:2|tcp *.svc.corp:1", "", "a.corp b.corp", "svc.corp"},
		{"tcp a.corp:1|tcp b.corp:1", "tcp a.corp:9", "a.corp", ""},
		{"tcp a.corp:1|tcp *.x.corp:1", "tcp *.corp:1", "a.corp", "x.corp"},
		{"tcp *.corp:1", "tcp a.corp:1", "", "corp"},
		{"tcp *.corp:1", "tcp a.other:1", "", ""},
		{"tcp a.corp:1", "tcp 10.0.0.0/8:1", "a.corp", ""},
		{"tcp a.corp:1", "tcp internet:1", "a.corp", ""},
		{"tcp 10.0.0.0/8:1", "tcp a.corp:1", "", ""},
	}
	for _, tt := range tests {
		s := scopeOf(t, tt.offered, tt.local)
		exact, below := s.Names()
		if strings.Join(exact, " ") != tt.exact || strings.Join(below, " ") != tt.below {
			t.Errorf("%s (own policy %q): %q and below %q", tt.offered, tt.local, exact, below)
		}
		if s.Empty() != (tt.exact+tt.below == "" && len(s.Routes()) == 0) {
			t.Errorf("%s (own policy %q): empty is %v", tt.offered, tt.local, s.Empty())
		}
	}
	var zero Scope
	if exact, below := zero.Names(); exact != nil || below != nil || !zero.Empty() {
		t.Errorf("the zero scope knows %q and %q", exact, below)
	}
}

// A wildcard covers what its own names say, and only below.
func TestHostCoversAgreesWithNames(t *testing.T) {
	name := rapid.StringMatching(`[ab](\.[ab]){0,3}`)
	rapid.Check(t, func(t *rapid.T) {
		h := hostName{name.Draw(t, "name"), rapid.Bool().Draw(t, "wild")}
		o := hostName{name.Draw(t, "other"), rapid.Bool().Draw(t, "other wild")}
		stands := func(h hostName, n string) bool {
			labels, own := strings.Split(n, "."), strings.Split(h.name, ".")
			if !h.wild {
				return n == h.name
			}
			return len(labels) > len(own) && slices.Equal(labels[len(labels)-len(own):], own)
		}
		if o.wild {
			o := o
			for _, n := range []string{"x." + o.name, "x.y." + o.name} { // whatever o stands for, h does
				if h.covers(o) != stands(h, n) {
					t.Fatalf("%s covers %s: %v, but %s", h, o, h.covers(o), n)
				}
			}
		} else if h.covers(o) != stands(h, o.name) {
			t.Fatalf("%s covers %s: %v", h, o, h.covers(o))
		}
		f := Flow{TCP, netip.MustParseAddrPort("10.0.0.1:1")}
		s := Scope{Offered: mustGrant("tcp " + h.String() + ":1")}
		if got := s.DecideName(o.name, f).Allowed; got != stands(h, o.name) {
			t.Fatalf("%s granted, %s allowed: %v", h, o.name, got)
		}
	})
}

func TestDecideNameDoesNotAllocate(t *testing.T) {
	s := scopeOf(t, "tcp *.svc.corp:443", "tcp *.corp:443")
	f := flowOf(t, "tcp 10.0.0.1:443")
	if n := testing.AllocsPerRun(100, func() { s.DecideName("a.b.svc.corp", f) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
