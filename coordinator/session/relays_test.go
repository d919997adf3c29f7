package session

import (
	"crypto/ed25519"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// claimsOf verifies a ticket as a relay does.
func claimsOf(t *testing.T, b *bench, g wire.RelayGrant, at time.Time) relay.Claims {
	t.Helper()
	ticket, err := relay.DecodeTicket(g.Ticket)
	if err != nil {
		t.Fatal(err)
	}
	key, err := b.store.TicketKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c, err := relay.Verify(ticket, []ed25519.PublicKey{key.Public().(ed25519.PublicKey)}, at)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func relayNames(grants []wire.RelayGrant) []string {
	var out []string
	for _, g := range grants {
		out = append(out, g.Name)
	}
	return out
}

// TestTicketsForBothSides: client and gateway get tickets for the same relays, each for its own key, until the session's end;
// the client has them with the first line already.
func TestTicketsForBothSides(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	j := b.job()
	r := j.request()
	r.Relays = []string{"near", "nowhere", "near"}
	r.Mapping = wire.MappingEasy
	var first wire.Session
	r.Admitted = func(s wire.Session) error { first = s; return nil }
	s, err := b.m.Join(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	offer := got[wire.Offer](g, wire.FrameOffer)[0]
	want := []string{"near", "coordinator", "far"} // what the client has measured first, then as listed
	for name, grants := range map[string][]wire.RelayGrant{"first line": first.Relays, "session": s.Relays, "offer": offer.Relays} {
		if !slices.Equal(relayNames(grants), want) {
			t.Fatalf("%s: relays %q, want %q", name, relayNames(grants), want)
		}
		side, key := relay.Client, j.key
		if name == "offer" {
			side, key = relay.Gateway, g.key
		}
		for i, grant := range grants {
			c := claimsOf(t, b, grant, time.Now())
			if c.Session != s.ID || c.Side != side || c.Key != key || !grant.Expires.Equal(first.Ends) {
				t.Errorf("%s: relay %d: claims %+v until %s", name, i, c, grant.Expires)
			}
			if d := time.Until(c.Expires); d < 119*time.Minute || d > 2*time.Hour {
				t.Errorf("%s: valid for %s, and the session may last 2 h", name, d)
			}
		}
		if grants[0].Relay != testRelays[2] {
			t.Errorf("%s: relay %+v", name, grants[0].Relay)
		}
	}
	if offer.Mapping != wire.MappingEasy || first.Gateways[0].Mapping != wire.MappingHard {
		t.Errorf("the gateway is told %q, the client %q", offer.Mapping, first.Gateways[0].Mapping)
	}
}

// TestEachGatewayGetsItsOwnTicket: the second gateway that is asked has another key.
func TestEachGatewayGetsItsOwnTicket(t *testing.T) {
	b := newBench(t, Options{})
	one, two := b.gateway("a"), b.gateway("b")
	one.set(one.refuse(problem.GatewayRefused))
	b.job().mustJoin()
	for _, g := range []*gateway{one, two} {
		offers := got[wire.Offer](g, wire.FrameOffer)
		if len(offers) != 1 || claimsOf(t, b, offers[0].Relays[0], time.Now()).Key != g.key {
			t.Errorf("gateway %s: %d offers, or a ticket for another key", g.who.Name, len(offers))
		}
	}
}

func TestNoRelays(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	rules := b.m.Rules()
	rules.Relays = nil
	b.m.SetRules(t.Context(), rules)
	s := b.job().mustJoin()
	if offer := got[wire.Offer](g, wire.FrameOffer)[0]; len(s.Relays)+len(offer.Relays) != 0 {
		t.Errorf("relays %v and %v", s.Relays, offer.Relays)
	}
}

func TestPick(t *testing.T) {
	for _, c := range []struct {
		named, want []string
	}{
		{nil, []string{"coordinator", "far", "near"}},
		{[]string{"far"}, []string{"far", "coordinator", "near"}},
		{[]string{"near", "far", "coordinator"}, []string{"near", "far", "coordinator"}},
		{[]string{"x", "", "near", "near"}, []string{"near", "coordinator", "far"}},
	} {
		var names []string
		for _, r := range pick(c.named, testRelays) {
			names = append(names, r.Name)
		}
		if !slices.Equal(names, c.want) {
			t.Errorf("%q: %q, want %q", c.named, names, c.want)
		}
	}
	if got := pick([]string{"near"}, nil); got != nil {
		t.Errorf("of none: %v", got)
	}
}

// TestPickProperties: whatever a client names, it gets up to four different relays of those that are listed, and its own order
// holds for those that it named.
func TestPickProperties(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		names := rapid.SliceOf(rapid.StringMatching(`[abcdefg]`)).Draw(rt, "named")
		var listed []wire.Relay
		for _, n := range rapid.SliceOfDistinct(rapid.StringMatching(`[abcdefg]`), rapid.ID).Draw(rt, "listed") {
			listed = append(listed, wire.Relay{Name: n})
		}
		out := pick(names, listed)
		if len(out) != min(maxRelays, len(listed)) {
			rt.Fatalf("%d of %d", len(out), len(listed))
		}
		at := func(r wire.Relay) int {
			if i := slices.Index(names, r.Name); i >= 0 {
				return i
			}
			return len(names) + slices.Index(listed, r)
		}
		for i, r := range out {
			if !slices.Contains(listed, r) || i > 0 && at(out[i-1]) >= at(r) {
				rt.Fatalf("%v of %v and %v", out, names, listed)
			}
		}
	})
}

func TestRelaysAndMappingRefused(t *testing.T) {
	b := newBench(t, Options{})
	b.gateway("a")
	for name, c := range map[string]struct {
		edit func(*Join)
		code problem.Code
	}{
		"many relays":  {func(j *Join) { j.Relays = make([]string, wire.MaxRelays+1) }, problem.TooLarge},
		"a long name":  {func(j *Join) { j.Relays = []string{strings.Repeat("x", 64)} }, problem.BadRequest},
		"a mapping":    {func(j *Join) { j.Mapping = "sideways" }, problem.BadRequest},
		"a kind":       {func(j *Join) { j.Candidates[0].Kind = wire.Relayed }, problem.BadRequest},
		"another kind": {func(j *Join) { j.Candidates[0].Kind = wire.Observed }, problem.BadRequest},
	} {
		r := b.job().request()
		r.Candidates = []wire.Candidate{{Kind: wire.Host, Addr: netip.MustParseAddrPort("192.0.2.1:1")}}
		c.edit(&r)
		_, err := b.m.Join(t.Context(), r)
		if problem.CodeOf(err) != c.code {
			t.Errorf("%s: got %v, want %s", name, err, c.code)
		}
	}
}

// TestGatewaysAnswerIsCleaned: a client is told no more of a gateway than it can use, and the name that it is enrolled with.
func TestGatewaysAnswerIsCleaned(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	good := wire.Candidate{Kind: wire.Mapped, Addr: netip.MustParseAddrPort("192.0.2.1:1")}
	g.set(func(kind wire.FrameType, body json.RawMessage) *wire.Answer {
		a := g.accept(kind, body)
		a.Gateway.Name, a.Gateway.Mapping = "\n::error::", "sideways"
		a.Gateway.Candidates = append([]wire.Candidate{{Kind: "relay", Addr: good.Addr}, {Kind: wire.Host}}, slices.Repeat([]wire.Candidate{good}, 60)...)
		return a
	})
	w := b.job().mustJoin().Gateways[0]
	if w.Name != "a" || w.Mapping != wire.MappingUnknown || len(w.Candidates) != wire.MaxCandidates-2 || w.Candidates[0] != good {
		t.Errorf("the client is told %+v", w)
	}
}

// TestMappingLater: what a client learns of its NAT later reaches its gateway, alone or with candidates, and also while the
// session is still being offered.
func TestMappingLater(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	asked, going := make(chan struct{}), make(chan struct{})
	g.set(func(kind wire.FrameType, body json.RawMessage) *wire.Answer {
		close(asked)
		<-going
		return g.accept(kind, body)
	})
	j := b.job()
	r := j.request()
	var secret wire.Secret
	r.Admitted = func(s wire.Session) error { secret = s.Secret; return nil }
	joined := make(chan error, 1)
	go func() { _, err := b.m.Join(t.Context(), r); joined <- err }()
	<-asked
	_, err := b.m.Update(t.Context(), j.key.SessionID(), secret, wire.Update{Mapping: wire.MappingHard})
	close(going)
	if err := <-joined; err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.m.Update(t.Context(), j.key.SessionID(), secret, wire.Update{Mapping: wire.MappingEasy}); err != nil {
		t.Fatal(err)
	}
	told := got[wire.Trickle](g, wire.FrameCandidates)
	if len(told) != 2 || told[0].Mapping != wire.MappingHard || told[1].Mapping != wire.MappingEasy {
		t.Errorf("the gateway was told %+v", told)
	}
	_, err = b.m.Update(t.Context(), j.key.SessionID(), secret, wire.Update{Mapping: "sideways"})
	wantCode(t, err, problem.BadRequest)
}
