package policy

import (
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// Whoever is refused is told whose policy refuses, and what line would be needed there.
func TestRemedy(t *testing.T) {
	const wide = "tcp 10.0.0.0/8:*"
	for _, c := range []struct {
		offered, local, flow string
		want                 []string // all of these; none for what is let through
	}{
		{"tcp 10.0.0.5:80", "", "tcp 10.0.0.5:80", nil},
		{"tcp 10.0.0.5:80", "", "tcp 10.0.0.5:81", []string{remedyRule}},
		{wide, "tcp 10.1.0.0/16:*", "tcp 10.0.0.5:80", []string{remedyLocal}},
		{"tcp 10.1.0.0/16:*", wide, "tcp 10.0.0.5:80", []string{remedyRule}},
		{"tcp 10.1.0.0/16:*", "tcp 10.1.0.0/16:*", "tcp 10.0.0.5:80", []string{remedyBoth}},
		{wide, "", "tcp 198.18.0.9:80", []string{remedyNone}},
		// the gateway's own address
		{wide, "", "tcp 10.9.9.9:80", []string{"exactly 10.9.9.9", "the coordinator's policy has none, and this gateway runs without a --policy"}},
		{"tcp 10.9.9.9:80", "", "tcp 10.9.9.9:80", []string{"exactly 10.9.9.9", "own --policy; this gateway runs without a --policy of its own"}},
		{"tcp 10.9.9.9:80", wide, "tcp 10.9.9.9:80", []string{"exactly 10.9.9.9", "own --policy; the gateway's own --policy has none"}},
		{wide, "tcp 10.9.9.9:80", "tcp 10.9.9.9:80", []string{"exactly 10.9.9.9", "own --policy; the coordinator's policy has none"}},
		{wide, wide, "tcp 10.9.9.9:80", []string{"the coordinator's policy has none, and the gateway's own --policy has none"}},
		{"tcp 10.9.9.9:80", "tcp 10.9.9.9:80", "tcp 10.9.9.9:80", nil},
		{wide, wide, "tcp [::ffff:10.9.9.9]:80", []string{"exactly 10.9.9.9"}},
		{"tcp [64:ff9b::/96]:80", "", "tcp [64:ff9b::10.9.9.9]:80", []string{"exactly 10.9.9.9"}},
		// other closed addresses
		{"tcp 169.254.0.0/16:80", "", "tcp 169.254.169.254:80", []string{"exactly 169.254.169.254", "without a --policy of its own"}},
		{"tcp 169.254.0.0/16:80", "", "tcp 169.254.1.1:80", []string{"exactly 169.254.1.1 opens it, in the coordinator's policy; the coordinator's policy has none"}},
	} {
		f := flowOf(t, c.flow)
		s := scopeOf(t, c.offered, c.local)
		got := s.Remedy(f)
		if (got == "") != s.Decide(f).Allowed || (got == "") != (len(c.want) == 0) {
			t.Errorf("%s of %q and %q: %q, and allowed is %v", c.flow, c.offered, c.local, got, s.Decide(f).Allowed)
		}
		for _, want := range c.want {
			if !strings.Contains(got, want) {
				t.Errorf("%s of %q and %q: %q, want %q in it", c.flow, c.offered, c.local, got, want)
			}
		}
	}
}

func TestRemedyForNames(t *testing.T) {
	const db = "tcp db.internal:80"
	for _, c := range []struct {
		offered, local, addr, want string
	}{
		{db, "", "10.0.0.5", ""},
		{db, "tcp 10.1.0.0/16:80", "10.0.0.5", remedyLocal},
		{db, "tcp 10.1.0.0/16:80", "10.1.0.5", ""},
		{db, "tcp other.internal:80", "10.0.0.5", remedyLocal},
		{"tcp other.internal:80", db, "10.0.0.5", remedyRule},
		{"tcp other.internal:80", "", "10.0.0.5", remedyRule},
		{db, "", "10.9.9.9", "only a line that names exactly 10.9.9.9 opens it, in the coordinator's policy and in the gateway's own --policy; the coordinator's policy has none, and this gateway runs without a --policy of its own"},
		{db + "|tcp 10.9.9.9:80", db, "10.9.9.9", "only a line that names exactly 10.9.9.9 opens it, in the coordinator's policy and in the gateway's own --policy; the gateway's own --policy has none"},
		{db + "|tcp 10.9.9.9:80", db + "|tcp 10.9.9.9:80", "10.9.9.9", ""},
	} {
		s := scopeOf(t, c.offered, c.local)
		f := Flow{TCP, netip.AddrPortFrom(netip.MustParseAddr(c.addr), 80)}
		if got := s.RemedyName("db.internal", f); got != c.want || (got == "") != s.DecideName("db.internal", f).Allowed {
			t.Errorf("%s of %q and %q: %q, allowed is %v", c.addr, c.offered, c.local, got, s.DecideName("db.internal", f).Allowed)
		}
		if offer := s.RemedyOffer("db.internal", TCP, 80); (offer == "") != s.OffersName("db.internal", TCP, 80).Allowed {
			t.Errorf("the offer of %q and %q: %q", c.offered, c.local, offer)
		}
	}
}

// There is something to be done exactly where something is refused.
func TestRemedyAgreesWithDecide(t *testing.T) {
	lines := []string{"", "tcp 10.0.0.0/8:80", "tcp 10.9.9.9:80", "tcp 10.0.0.5:80", "tcp 169.254.0.0/16:*|tcp 169.254.169.254:80", "tcp db.internal:80", "tcp internet:*", "tcp [::/0]:*", "tcp 0.0.0.0/0:*"}
	addrs := []string{"10.9.9.9", "10.0.0.5", "169.254.169.254", "169.254.7.7", "198.18.3.3", "8.8.8.8", "64:ff9b::10.9.9.9", "2002:0a09:0909::1", "2001:db8:9::9", "::1", "224.0.0.1", "0.0.0.0"}
	rapid.Check(t, func(r *rapid.T) {
		s := scopeOf(t, rapid.SampledFrom(lines).Draw(r, "offered"), rapid.SampledFrom(lines).Draw(r, "local"))
		f := Flow{TCP, netip.AddrPortFrom(netip.MustParseAddr(rapid.SampledFrom(addrs).Draw(r, "addr")), 80)}
		if got := s.Remedy(f); (got == "") != s.Decide(f).Allowed || strings.HasSuffix(got, "; ") {
			r.Fatalf("%q, and allowed is %v", got, s.Decide(f).Allowed)
		}
		if got := s.RemedyName("db.internal", f); (got == "") != s.DecideName("db.internal", f).Allowed || strings.HasSuffix(got, "; ") {
			r.Fatalf("by name: %q, and allowed is %v", got, s.DecideName("db.internal", f).Allowed)
		}
		if got := s.RemedyOffer("db.internal", TCP, 80); (got == "") != s.OffersName("db.internal", TCP, 80).Allowed {
			r.Fatalf("the offer: %q", got)
		}
	})
}
