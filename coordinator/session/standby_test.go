package session

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// standby asks for a session's second gateway.
func (j *job) standby(s wire.Session, not ...wire.Key) (wire.Standby, error) {
	return j.b.m.Standby(j.b.t.Context(), s.ID, s.Secret, wire.StandbyRequest{Token: j.token(), Relays: []string{"near"}, Not: not})
}

// pair is a session on two gateways.
type pair struct {
	*bench
	job            *job
	session        wire.Session
	first, second  *gateway
	offeredStandby wire.Standby
}

func newPair(t *testing.T, opts Options) *pair {
	t.Helper()
	p := &pair{bench: newBench(t, opts)}
	p.first, p.second = p.gateway("a"), p.gateway("b")
	p.job = p.bench.job()
	p.session = p.job.mustJoin()
	var err error
	if p.offeredStandby, err = p.job.standby(p.session); err != nil {
		t.Fatalf("standby: %v", err)
	}
	return p
}

// lease reads the session's.
func (p *pair) lease() state.Lease {
	p.t.Helper()
	l, err := p.store.Lease(p.t.Context(), p.session.ID)
	if err != nil {
		p.t.Fatal(err)
	}
	return l
}

// carried says by whom the session is to be carried, and who is to stand by.
func (p *pair) carried(by, standby *gateway) {
	p.t.Helper()
	l, want := p.lease(), ""
	if standby != nil {
		want = standby.who.Instance
	}
	if l.Gateway != by.who.Instance || l.GatewayName != by.who.Name || l.Standby != want {
		p.t.Errorf("carried by %s (%s), standby %q; want %s and %q", l.Gateway, l.GatewayName, l.Standby, by.who.Instance, want)
	}
}

// TestStandbyIsOffered: the second gateway gets the session with the job's address and a token to judge, both sides get tickets for paths
// of their own, and the first hears nothing of it.
func TestStandbyIsOffered(t *testing.T) {
	p := newPair(t, Options{})
	if !p.session.Standby || p.offeredStandby.Gateway.Key != p.second.key {
		t.Fatalf("session %+v, standby %+v", p.session, p.offeredStandby)
	}
	offers := got[wire.Offer](p.second, wire.FrameOffer)
	if len(offers) != 1 || len(got[wire.Offer](p.first, wire.FrameOffer)) != 1 {
		t.Fatalf("offers %+v", offers)
	}
	o := offers[0]
	if !o.Standby || o.Token == "" || o.Key != p.job.key || !slices.Equal(o.Addresses, p.session.Addresses) || len(o.Grants) != 2 {
		t.Errorf("offer %+v", o)
	}
	way := wire.StandbyID(p.job.key, p.second.key)
	sides := map[relay.Side]struct {
		grants []wire.RelayGrant
		key    wire.Key
	}{relay.Client: {p.offeredStandby.Relays, p.job.key}, relay.Gateway: {o.Relays, p.second.key}}
	for side, s := range sides {
		if len(s.grants) < 2 || s.grants[0].Name != "near" {
			t.Fatalf("%s: relays %+v", side, s.grants)
		}
		c := claimsOf(t, p.bench, s.grants[0], time.Now())
		if c.Session != way || c.Side != side || c.Key != s.key {
			t.Errorf("%s: ticket for %+v", side, c)
		}
	}
	p.carried(p.first, p.second)
}

// TestStandbyIsRefused: for whom, and with what.
func TestStandbyIsRefused(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	j := b.job()
	s := j.mustJoin()
	if s.Standby {
		t.Error("a network of one gateway offers a standby")
	}
	_, err := j.standby(s)
	wantCode(t, err, problem.NoGateway)
	b.gateway("b")
	_, err = j.standby(s, g.key, wire.Key{9})
	if err != nil {
		t.Errorf("with gateways ruled out that are not asked anyway: %v", err)
	}
	_, err = j.standby(s, b.store.Gateways("corp")[1].Key)
	wantCode(t, err, problem.NoGateway)
	_, err = b.m.Standby(t.Context(), s.ID, s.Secret, wire.StandbyRequest{Token: j.token(), Only: []wire.Key{{9}}})
	wantCode(t, err, problem.NoGateway)
	wrong := s
	wrong.Secret = "another"
	_, err = j.standby(wrong)
	wantCode(t, err, problem.SessionUnknown)
	other := b.job("run_id", "2")
	other.key = j.key
	_, err = other.standby(s)
	wantCode(t, err, problem.TokenInvalid)
	_, err = b.m.Standby(t.Context(), s.ID, s.Secret, wire.StandbyRequest{Token: b.job().token()})
	wantCode(t, err, problem.TokenAudience)
	_, err = b.m.Standby(t.Context(), s.ID, s.Secret, wire.StandbyRequest{Token: j.token(), Not: make([]wire.Key, wire.MaxCandidates+1)})
	wantCode(t, err, problem.TooLarge)
}

// TestStandbyThatFails: the next is asked, and the one that failed is told to forget it.
func TestStandbyThatFails(t *testing.T) {
	b := newBench(t, Options{})
	first, deaf, last := b.gateway("a"), b.gateway("b"), b.gateway("c")
	j := b.job()
	s := j.mustJoin()
	others := []*gateway{first, deaf, last}
	others = slices.DeleteFunc(others, func(g *gateway) bool { return g.key == s.Gateways[0].Key })
	for _, g := range others {
		g.set(g.refuse(problem.GatewayRefused))
	}
	_, err := j.standby(s)
	wantCode(t, err, problem.GatewayRefused)
	for _, g := range others {
		if len(got[wire.End](g, wire.FrameEnd)) != 1 {
			t.Errorf("%s was not told", g.who.Name)
		}
	}
	l, err := b.store.Lease(t.Context(), s.ID)
	if err != nil || l.Standby != "" {
		t.Errorf("lease %+v, %v", l, err)
	}
}

// TestStandbyTakesOver: by its word the session is its own, it goes on record, and the former gateway is told to let go. What that one
// still says is no end of the session.
func TestStandbyTakesOver(t *testing.T) {
	log := &auditor{}
	p := newPair(t, Options{Audit: log})
	if err := p.m.Taken(t.Context(), p.second.who, wire.Taken{Session: p.session.ID}); err != nil {
		t.Fatal(err)
	}
	p.carried(p.second, nil)
	if ends := got[wire.End](p.first, wire.FrameEnd); len(ends) != 1 || ends[0].Session != p.session.ID {
		t.Errorf("the former gateway was told %+v", ends)
	}
	moved := log.of(audit.Moved)
	if len(moved) != 1 || moved[0].Unmapped.Gateway != "b" || moved[0].Unmapped.Job == nil {
		t.Errorf("on record: %+v", moved)
	}
	flows := wire.Flows{Seq: 1, Records: []wire.FlowRecord{{Session: p.session.ID, Proto: "tcp", Verdict: wire.FlowAllowed, Cause: wire.CauseSession}}}
	if err := errors.Join(p.m.Ended(t.Context(), p.first.who, wire.End{Session: p.session.ID}), p.m.Flows(t.Context(), p.first.who, flows)); err != nil {
		t.Errorf("the former gateway's last words: %v", err)
	}
	if n := len(log.of(audit.Flows)); n != 1 {
		t.Errorf("%d records of its flows", n)
	}
	p.carried(p.second, nil)
	if over := p.reconcile(p.first, heldBy(p)); !slices.Equal(over, []string{p.session.ID}) {
		t.Errorf("the former gateway, back again, keeps the session: %v", over)
	}
	if err := p.m.Taken(t.Context(), p.second.who, wire.Taken{Session: p.session.ID}); err != nil || len(log.of(audit.Moved)) != 1 {
		t.Errorf("said twice: %v", err)
	}
}

// TestStandbyTookOverUnheard: a gateway that comes back and does not only stand by any more has taken over meanwhile.
func TestStandbyTookOverUnheard(t *testing.T) {
	p := newPair(t, Options{})
	h := heldBy(p)
	h.Standby = true
	if over := p.reconcile(p.second, h); len(over) != 0 {
		t.Fatalf("over: %v", over)
	}
	p.carried(p.first, p.second)
	h.Standby = false
	if over := p.reconcile(p.second, h); len(over) != 0 {
		t.Fatalf("over: %v", over)
	}
	p.carried(p.second, nil)
}

// TestOnlyTheStandbyTakesOver: no other gateway can.
func TestOnlyTheStandbyTakesOver(t *testing.T) {
	p := newPair(t, Options{})
	wantCode(t, p.m.Taken(t.Context(), p.gateway("z").who, wire.Taken{Session: p.session.ID}), problem.SessionUnknown)
	elsewhere := p.second.who
	elsewhere.Network = "lab"
	wantCode(t, p.m.Taken(t.Context(), elsewhere, wire.Taken{Session: p.session.ID}), problem.SessionUnknown)
	if err := p.m.Taken(t.Context(), p.first.who, wire.Taken{Session: p.session.ID}); err != nil {
		t.Errorf("said by the gateway that carries it: %v", err)
	}
	p.carried(p.first, p.second)
}

func heldBy(p *pair) wire.Held {
	return wire.Held{Session: p.session.ID, Key: p.job.key, Addresses: p.session.Addresses, Expires: p.session.Expires, Ends: p.session.Ends}
}

// TestStandbyOutlivesItsFirst: the gateway that carries a session ends it, or comes back without it; the session goes on.
func TestStandbyOutlivesItsFirst(t *testing.T) {
	for name, lose := range map[string]func(p *pair){
		"it says so": func(p *pair) {
			if err := p.m.Ended(p.t.Context(), p.first.who, wire.End{Session: p.session.ID, Reason: "gateway stops"}); err != nil {
				p.t.Fatal(err)
			}
		},
		"it was restarted": func(p *pair) {
			if err := p.store.DropPresence(p.t.Context(), p.first.who.Instance); err != nil {
				p.t.Fatal(err)
			}
			p.eventually("the first is gone", func() bool { return len(p.store.Gateways("corp")) == 1 })
			again := p.first.who
			again.Instance = "a-again-" + p.first.who.Instance
			if _, err := p.m.Reconcile(p.t.Context(), again, nil); err != nil {
				p.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, Options{})
			lose(p)
			p.carried(p.second, nil)
			if _, err := p.m.Update(t.Context(), p.session.ID, p.session.Secret, wire.Update{Token: p.job.token()}); err != nil {
				t.Errorf("a renewal afterwards: %v", err)
			}
			if n := len(got[wire.Renewed](p.second, wire.FrameRenew)); n != 1 {
				t.Errorf("the second was asked %d times to renew", n)
			}
		})
	}
}

// TestStandbyLost: a standby that lets go leaves the session where it is, and another can be had.
func TestStandbyLost(t *testing.T) {
	p := newPair(t, Options{})
	if err := p.m.Ended(t.Context(), p.second.who, wire.End{Session: p.session.ID}); err != nil {
		t.Fatal(err)
	}
	p.carried(p.first, nil)
	third := p.gateway("c")
	if _, err := p.job.standby(p.session, p.second.key); err != nil {
		t.Fatal(err)
	}
	p.carried(p.first, third)
	// One that is replaced is told.
	if _, err := p.job.standby(p.session, third.key); err != nil {
		t.Fatal(err)
	}
	p.carried(p.first, p.second)
	if ends := got[wire.End](third, wire.FrameEnd); len(ends) != 1 {
		t.Errorf("the one that was replaced was told %+v", ends)
	}
}

// TestStandbyHears: renewals, candidates and the end reach the standby too.
func TestStandbyHears(t *testing.T) {
	p := newPair(t, Options{})
	renewed := wire.Renewed{Session: p.session.ID, Token: p.job.token(), Lease: &wire.Lease{Expires: time.Now().Add(9 * time.Minute), Ends: time.Now().Add(time.Hour)}}
	if err := p.m.Renewed(t.Context(), p.first.who, renewed); err != nil {
		t.Fatal(err)
	}
	if _, err := p.m.Update(t.Context(), p.session.ID, p.session.Secret, wire.Update{Token: p.job.token(), Mapping: wire.MappingEasy}); err != nil {
		t.Fatal(err)
	}
	passed := got[wire.Renewed](p.second, wire.FrameRenewed)
	if len(passed) != 2 || passed[0].Token != renewed.Token || passed[1].Token == "" || passed[0].Session != p.session.ID {
		t.Errorf("renewals that reached it: %+v", passed)
	}
	if n := len(got[wire.Trickle](p.second, wire.FrameCandidates)); n != 1 {
		t.Errorf("%d times candidates", n)
	}
	if err := p.m.End(t.Context(), p.session.ID, p.session.Secret); err != nil {
		t.Fatal(err)
	}
	for _, g := range []*gateway{p.first, p.second} {
		if ends := got[wire.End](g, wire.FrameEnd); len(ends) != 1 {
			t.Errorf("%s heard of the end: %+v", g.who.Name, ends)
		}
		if err := p.m.Ended(t.Context(), g.who, wire.End{Session: p.session.ID}); err != nil {
			t.Errorf("%s confirms: %v", g.who.Name, err)
		}
	}
	if n := leases(p.bench); n != 0 {
		t.Errorf("%d leases are left", n)
	}
}

// TestPairIsAdopted: where the state was lost, both gateways keep the session in whatever order they come back, each in its role.
func TestPairIsAdopted(t *testing.T) {
	for _, standbyFirst := range []bool{true, false} {
		b := newBench(t, Options{})
		first, second := b.gateway("a"), b.gateway("b")
		one := held(b.job().key, "198.18.0.5")
		two := one
		two.Standby = true
		say := []func() []string{func() []string { return b.reconcile(first, one) }, func() []string { return b.reconcile(second, two) }}
		if standbyFirst {
			slices.Reverse(say)
		}
		for _, again := range []bool{false, true} {
			for _, s := range say {
				if over := s(); len(over) != 0 {
					t.Fatalf("standby first %v, again %v: over %v", standbyFirst, again, over)
				}
			}
		}
		l, err := b.store.Lease(t.Context(), one.Session)
		if err != nil || l.Gateway != first.who.Instance || l.GatewayName != "a" || l.Standby != second.who.Instance || l.StandbyName != "b" {
			t.Errorf("standby first %v: %+v, %v", standbyFirst, l, err)
		}
		if over := b.reconcile(b.gateway("c"), one); len(over) != 1 {
			t.Error("a third gateway keeps the session")
		}
	}
}

// of gives the records of an event.
func (a *auditor) of(e audit.Event) []audit.Record {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(a.stored), func(r audit.Record) bool { return r.Event != e })
}

// TestEndReachesWhoHoldsItByThen: what ended the session read its lease before somebody stood by, or before it moved.
func TestEndReachesWhoHoldsItByThen(t *testing.T) {
	b := newBench(t, Options{})
	both := []*gateway{b.gateway("a"), b.gateway("b")}
	j := b.job()
	s := j.mustJoin()
	before, err := b.store.Lease(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := j.standby(s); err != nil {
		t.Fatal(err)
	}
	if err := b.m.finish(t.Context(), before, endedByPolicy, byCoordinator); err != nil {
		t.Fatal(err)
	}
	for _, g := range both {
		if ends := got[wire.End](g, wire.FrameEnd); len(ends) != 1 || ends[0].Reason != endedByPolicy {
			t.Errorf("%s heard of the end: %+v", g.who.Name, ends)
		}
	}
}

// TestStandbyHoldsNoLonger: a gateway that stands by late in a session's life is given what is left of it, and not another whole one.
func TestStandbyHoldsNoLonger(t *testing.T) {
	late := time.Duration(0)
	b := newBench(t, Options{})
	now := b.m.opts.Now
	b.m.opts.Now = func() time.Time { return now().Add(late) }
	first, second := b.gateway("a"), b.gateway("b")
	j := b.job()
	s := j.mustJoin()
	l, err := b.store.Lease(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	late = 5 * time.Minute
	if _, err := j.standby(s); err != nil {
		t.Fatal(err)
	}
	left := l.Ends.Sub(b.m.opts.Now())
	for _, o := range append(got[wire.Offer](first, wire.FrameOffer), got[wire.Offer](second, wire.FrameOffer)...) {
		if d := time.Duration(o.MaxSession); o.Standby && (d > left+time.Minute || d < left-time.Minute) {
			t.Errorf("offered for %v; %v are left", d, left)
		}
	}
}

// TestStandbyIsLimitedLikeAJoin: each request has gateways verify a token.
func TestStandbyIsLimitedLikeAJoin(t *testing.T) {
	p := newPair(t, Options{Limits: Limits{Repository: 0.2}})
	var err error
	for range 30 {
		if _, err = p.job.standby(p.session); err != nil {
			break
		}
	}
	wantCode(t, err, problem.RateLimited)
	p.carried(p.first, p.second)
}
