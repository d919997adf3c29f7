package session

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func mustVerify(b *bench, j *job) *claims.Claims {
	b.t.Helper()
	c, err := b.m.Rules().Verifier.Verify(b.t.Context(), j.token().Reveal(), wire.Audience("https://culvert.test", j.key))
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

// held is what a gateway says of a session of its own.
func held(key wire.Key, v4 string) wire.Held {
	a := netip.MustParseAddr(v4)
	b := a.As4()
	six := netip.MustParseAddr("fd63:756c:7665:7274::").As16()
	copy(six[12:], b[:])
	return wire.Held{Session: key.SessionID(), Key: key, Addresses: []netip.Addr{a, netip.AddrFrom16(six)},
		Rules: []string{"deploy"}, Expires: time.Now().Add(5 * time.Minute), Ends: time.Now().Add(time.Hour)}
}

func (b *bench) reconcile(g *gateway, list ...wire.Held) []string {
	b.t.Helper()
	over, err := b.m.Reconcile(b.t.Context(), g.who, list)
	if err != nil {
		b.t.Fatal(err)
	}
	return over
}

func TestReconcileAdopts(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	j := b.job()
	if over := b.reconcile(g, held(j.key, "198.18.0.5")); len(over) != 0 {
		t.Fatalf("over: %v", over)
	}
	l, err := b.store.Lease(t.Context(), j.key.SessionID())
	if err != nil || l.Gateway != g.who.Instance || l.Addresses[0].String() != "198.18.0.5" {
		t.Fatalf("lease %+v, %v", l, err)
	}
	// Nobody holds its secret.
	_, err = b.m.Update(t.Context(), j.key.SessionID(), "", wire.Update{})
	wantCode(t, err, problem.SessionUnknown)
	// A renewal tells whose it is, and from then on it must stay that job's.
	if err := b.m.Renewed(t.Context(), g.who, wire.Renewed{Session: j.key.SessionID(), Token: j.token()}); err != nil {
		t.Fatal(err)
	}
	l, _ = b.store.Lease(t.Context(), j.key.SessionID())
	if l.Claims["run_id"] != "1001" {
		t.Errorf("claims %v", l.Claims)
	}
	j.claims["run_id"] = "2"
	wantCode(t, b.m.Renewed(t.Context(), g.who, wire.Renewed{Session: j.key.SessionID(), Token: j.token()}), problem.TokenInvalid)
}

func TestReconcileRefusesToAdopt(t *testing.T) {
	b := newBench(t, Options{})
	b.gateway("a")
	taken := b.job().mustJoin()
	g := b.gateway("z") // what it does not speak of is another's
	for name, edit := range map[string]func(h *wire.Held){
		"another key's id":       func(h *wire.Held) { h.Session = wire.Key{7}.SessionID() },
		"no key":                 func(h *wire.Held) { h.Key = wire.Key{} },
		"expired":                func(h *wire.Held) { h.Expires = time.Now().Add(-time.Second) },
		"past its end":           func(h *wire.Held) { h.Ends = time.Now().Add(-time.Second) },
		"outside the range":      func(h *wire.Held) { *h = held(h.Key, "198.18.1.5") },
		"the gateways' address":  func(h *wire.Held) { *h = held(h.Key, "198.18.0.1") },
		"no address":             func(h *wire.Held) { h.Addresses = nil },
		"too many addresses":     func(h *wire.Held) { h.Addresses = append(h.Addresses, h.Addresses...) },
		"another session's":      func(h *wire.Held) { *h = held(h.Key, taken.Addresses[0].String()) },
		"families that disagree": func(h *wire.Held) { h.Addresses[1] = held(h.Key, "198.18.0.6").Addresses[1] },
	} {
		key := b.job().key
		h := held(key, "198.18.0.5")
		if taken.Addresses[0] == h.Addresses[0] {
			h = held(key, "198.18.0.7")
		}
		edit(&h)
		if over := b.reconcile(g, h); !slices.Equal(over, []string{h.Session}) {
			t.Errorf("%s: over %v", name, over)
		}
	}
	if n := leases(b); n != 1 {
		t.Errorf("%d leases", n)
	}
}

func TestAdoptionIsBounded(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	h := held(b.job().key, "198.18.0.5")
	h.Expires, h.Ends = time.Now().Add(1000*time.Hour), time.Now().Add(10000*time.Hour)
	b.reconcile(g, h)
	l, err := b.store.Lease(t.Context(), h.Session)
	if err != nil || time.Until(l.Expires) > 10*time.Minute || time.Until(l.Ends) > 5*24*time.Hour {
		t.Errorf("lease %+v, %v", l, err)
	}
}

// TestReconcileKnown: a gateway that lost its stream says what it holds.
func TestReconcileKnown(t *testing.T) {
	b := newBench(t, Options{})
	g, other := b.gateway("a"), b.gateway("z")
	heldOf := func(s wire.Session, key wire.Key) wire.Held {
		return wire.Held{Session: s.ID, Key: key, Addresses: s.Addresses, Expires: s.Expires, Ends: s.Ends}
	}
	keepJob, overJob := b.job(), b.job()
	keep, over := keepJob.mustJoin(), overJob.mustJoin()
	if err := b.m.End(t.Context(), over.ID, over.Secret); err != nil {
		t.Fatal(err)
	}
	list := []wire.Held{heldOf(keep, keepJob.key), heldOf(over, overJob.key)}
	if got := b.reconcile(g, list...); !slices.Equal(got, []string{over.ID}) {
		t.Errorf("over %v, want %v", got, over.ID)
	}
	if _, err := b.store.Lease(t.Context(), over.ID); err == nil {
		t.Error("the ended session's lease stays although its gateway has heard")
	}
	if got := b.reconcile(other, list[0]); !slices.Equal(got, []string{keep.ID}) {
		t.Errorf("another gateway keeps a session that is not its own: over %v", got)
	}
	list[0].Addresses = held(keepJob.key, "198.18.0.13").Addresses
	if got := b.reconcile(g, list[0]); len(got) != 1 && !slices.Equal(keep.Addresses, list[0].Addresses) {
		t.Errorf("kept with other addresses")
	}
}

// TestReconcileEndsWhatNobodyHolds: a coordinator that dies between a lease and the gateway's answer leaves a lease that names the gateway. The gateway's
// next hello says that it holds no such session; until then, and while it is being offered, it stays.
func TestReconcileEndsWhatNobodyHolds(t *testing.T) {
	b := newBench(t, Options{})
	g, other := b.gateway("a"), b.gateway("z")
	var of func(j *job) wire.Session
	of = func(j *job) wire.Session { // the one that "a" gets
		s := j.mustJoin()
		if l, err := b.store.Lease(t.Context(), s.ID); err != nil || l.Gateway != g.who.Instance {
			*j = *b.job()
			return of(j)
		}
		return s
	}
	keepJob, offeredJob, lostJob := b.job(), b.job(), b.job()
	keep, offered, lost := of(keepJob), of(offeredJob), of(lostJob)
	b.m.beginOffer(offered.ID)
	b.reconcile(other)
	b.reconcile(g, wire.Held{Session: keep.ID, Key: keepJob.key, Addresses: keep.Addresses, Expires: keep.Expires, Ends: keep.Ends})
	for name, c := range map[string]struct {
		id    string
		there bool
	}{"held": {keep.ID, true}, "being offered": {offered.ID, true}, "held by nobody": {lost.ID, false}} {
		if _, err := b.store.Lease(t.Context(), c.id); (err == nil) != c.there {
			t.Errorf("%s: %v", name, err)
		}
	}
	if !strings.Contains(b.log.String(), endedUnheld) {
		t.Errorf("nothing is said of it: %s", b.log)
	}
}

// TestReconcileTakesTunnelRenewals: while the coordinator was away the session was renewed with its gateway.
func TestReconcileTakesTunnelRenewals(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	j := b.job()
	s := j.mustJoin()
	short, _ := b.store.Lease(t.Context(), s.ID)
	short.Expires = time.Now().Add(time.Minute)
	if _, err := b.store.UpdateLease(t.Context(), short); err != nil {
		t.Fatal(err)
	}
	h := wire.Held{Session: s.ID, Key: j.key, Addresses: s.Addresses, Expires: time.Now().Add(8 * time.Minute), Ends: s.Ends}
	if over := b.reconcile(g, h); len(over) != 0 {
		t.Fatalf("over %v", over)
	}
	if l, _ := b.store.Lease(t.Context(), s.ID); time.Until(l.Expires) < 7*time.Minute {
		t.Errorf("the lease ends in %s", time.Until(l.Expires))
	}
}

// TestRestartedGateway: a new instance of the same name holds nothing; the old one's sessions died with it.
func TestRestartedGateway(t *testing.T) {
	b := newBench(t, Options{})
	old := b.gateway("a")
	s := b.job().mustJoin()
	next := &gateway{who: Gateway{Network: "corp", Name: "a", Instance: "a-next-next-next-next"}}

	b.reconcile(next)
	if _, err := b.store.Lease(t.Context(), s.ID); err != nil {
		t.Fatalf("the old instance is live, two gateways share a name: %v", err)
	}
	if err := b.store.DropPresence(t.Context(), old.who.Instance); err != nil {
		t.Fatal(err)
	}
	b.eventually("the old instance is gone", func() bool { return len(b.store.Gateways("corp")) == 0 })
	b.reconcile(&gateway{who: Gateway{Network: "corp", Name: "b", Instance: "b-next-next-next-next"}})
	if _, err := b.store.Lease(t.Context(), s.ID); err != nil {
		t.Fatalf("another gateway's start ended the session: %v", err)
	}
	b.reconcile(next)
	if _, err := b.store.Lease(t.Context(), s.ID); err == nil {
		t.Error("the lease outlives its gateway")
	}
}

func TestRenewedByGateway(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	other := Gateway{Network: "corp", Name: "z", Instance: "z-z-z-z-z-z-z-z-z-z"}
	j := b.job()
	s := j.mustJoin()
	short, _ := b.store.Lease(t.Context(), s.ID)
	short.Expires = time.Now().Add(time.Minute)
	if _, err := b.store.UpdateLease(t.Context(), short); err != nil {
		t.Fatal(err)
	}
	renewed := wire.Renewed{Session: s.ID, Token: j.token()}
	wantCode(t, b.m.Renewed(t.Context(), other, renewed), problem.SessionUnknown)
	wantCode(t, b.m.Renewed(t.Context(), g.who, wire.Renewed{Session: "../x", Token: j.token()}), problem.SessionUnknown)
	wantCode(t, b.m.Renewed(t.Context(), g.who, wire.Renewed{Session: s.ID, Token: b.job().token()}), problem.TokenAudience)
	if err := b.m.Renewed(t.Context(), g.who, wire.Renewed{Session: wire.Key{9}.SessionID(), Token: j.token()}); err != ErrResync {
		t.Errorf("an unknown session: %v", err)
	}
	if err := b.m.Renewed(t.Context(), g.who, renewed); err != nil {
		t.Fatal(err)
	}
	if l, _ := b.store.Lease(t.Context(), s.ID); time.Until(l.Expires) < 9*time.Minute {
		t.Errorf("the lease ends in %s", time.Until(l.Expires))
	}
	next := b.rules(strings.Replace(rulesV1, "refs/heads/main", "refs/heads/release", 1))
	b.m.rules.Store(&next)
	wantCode(t, b.m.Renewed(t.Context(), g.who, renewed), problem.Denied)
	if n := len(got[wire.End](g, wire.FrameEnd)); n != 1 {
		t.Errorf("the gateway was told %d times", n)
	}
}

func TestEndedByGateway(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	s := b.job().mustJoin()
	other := Gateway{Network: "lab", Name: "a", Instance: g.who.Instance}
	wantCode(t, b.m.Ended(t.Context(), other, wire.End{Session: s.ID}), problem.SessionUnknown)
	for range 2 { // idempotent
		if err := b.m.Ended(t.Context(), g.who, wire.End{Session: s.ID, Reason: "lease over"}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.store.Lease(t.Context(), s.ID); err == nil {
		t.Error("the lease is still there")
	}
}

// TestSetRules ends exactly the sessions that the new rules no longer carry.
func TestSetRules(t *testing.T) {
	for _, c := range []struct {
		name, old, new string
		ends           bool
	}{
		{"the same", "", "", false},
		{"rule renamed", "name: deploy", "name: ship", false},
		{"grant added", `allow: [`, `allow: ["tcp 10.20.0.6:80", `, false},
		{"claim required that it has", "ref: refs/heads/main", "ref: refs/heads/main, run_id: 1001", false},
		{"grant gone", `"tcp 10.20.0.5:5432", `, "", true},
		{"grant shrunk", `5432`, "5433", true},
		{"job no longer matched", "refs/heads/main", "refs/heads/release", true},
		{"network no longer given", "network: corp", "network: lab", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, Options{})
			g := b.gateway("a")
			s := b.job().mustJoin()
			b.eventually("the mirror has it", func() bool { return b.m.Held(g.who.Instance) == 1 })
			b.m.SetRules(t.Context(), b.rules(strings.Replace(rulesV1, c.old, c.new, 1)))
			l, err := b.store.Lease(t.Context(), s.ID)
			if err != nil || (l.Over != "") != c.ends || len(got[wire.End](g, wire.FrameEnd)) != map[bool]int{true: 1}[c.ends] {
				t.Errorf("lease %+v, %v, ends %v", l, err, got[wire.End](g, wire.FrameEnd))
			}
		})
	}
}

// TestExpiredRule: no session outlasts the rule that it came in by, and one that a rule has since been bounded ends.
func TestExpiredRule(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	last := policy.NewDate(time.Now().Add(24 * time.Hour))
	expiring := strings.Replace(rulesV1, "max_session: 2h", "max_session: 100h\n    expires: "+last.String(), 1)
	b.m.SetRules(t.Context(), b.rules(expiring))
	s := b.job().mustJoin()
	if l, err := b.store.Lease(t.Context(), s.ID); err != nil || !l.Ends.Equal(last.End()) {
		t.Errorf("the session may last until %s, its rule until %s, %v", l.Ends, last.End(), err)
	}
	if o := got[wire.Offer](g, wire.FrameOffer); len(o) != 1 || time.Duration(o[0].MaxSession) > 48*time.Hour {
		t.Errorf("the gateway is offered %+v", o)
	}
	b.eventually("the mirror has it", func() bool { return b.m.Held(g.who.Instance) == 1 })
	b.m.Reevaluate(t.Context())
	if n := len(got[wire.End](g, wire.FrameEnd)); n != 0 {
		t.Fatalf("%d sessions ended before their rule expired", n)
	}
	at := last.End()
	b.now.Store(&at)
	b.m.Reevaluate(t.Context())
	if n := len(got[wire.End](g, wire.FrameEnd)); n != 1 {
		t.Errorf("%d sessions ended when their rule expired, want 1", n)
	}
	_, err := b.job().join()
	wantCode(t, err, problem.Denied)
}

// A new rule may match on claims that no rule asked for when the session began.
func TestSetRulesKnowsCustomProperties(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	gold := b.job("repo_property_tier", "gold").mustJoin()
	b.job("repo_property_tier", "tin").mustJoin()
	b.eventually("the mirror has both", func() bool { return b.m.Held(g.who.Instance) == 2 })
	b.m.SetRules(t.Context(), b.rules(strings.Replace(rulesV1, "ref: refs", "repo_property_tier: gold, ref: refs", 1)))
	ends := got[wire.End](g, wire.FrameEnd)
	if len(ends) != 1 || ends[0].Session == gold.ID {
		t.Errorf("ended %+v, want only the one that is not gold", ends)
	}
}

// TestEndIsKeptForAbsentGateway: the gateway is away when its session ends and hears of it when it is back.
func TestEndIsKeptForAbsentGateway(t *testing.T) {
	b := newBench(t, Options{})
	absent := Gateway{Network: "corp", Name: "a", Instance: "away-away-away-away"}
	j := b.job()
	h := held(j.key, "198.18.0.5")
	if _, err := b.m.Reconcile(t.Context(), absent, []wire.Held{h}); err != nil {
		t.Fatal(err)
	}
	l, _ := b.store.Lease(t.Context(), h.Session)
	if err := b.m.finish(t.Context(), l, endedByPolicy, byCoordinator); err != nil {
		t.Fatal(err)
	}
	l, err := b.store.Lease(t.Context(), h.Session)
	if err != nil || l.Over != endedByPolicy || time.Until(l.Expires) < 4*time.Minute {
		t.Fatalf("lease %+v, %v: want it kept as long as the gateway may serve it", l, err)
	}
	if n := b.m.Held(absent.Instance); n != 0 {
		t.Errorf("%d sessions count as held", n)
	}
	over, err := b.m.Reconcile(t.Context(), absent, []wire.Held{h})
	if err != nil || !slices.Equal(over, []string{h.Session}) {
		t.Errorf("over %v, %v", over, err)
	}
	b.eventually("the lease is freed", func() bool {
		n := 0
		b.store.Leases(func(state.Lease) bool { n++; return true })
		return n == 0
	})
}

// forgetful is a store whose first word on a lease is that there is none, as that of a server of its cluster that leads no longer.
type forgetful struct {
	Store
	said bool
}

func (f *forgetful) Lease(ctx context.Context, id string) (state.Lease, error) {
	if !f.said {
		f.said = true
		return state.Lease{}, state.ErrNotFound
	}
	return f.Store.Lease(ctx, id)
}

// TestReconcileBelievesNoContradiction: a session that cannot be adopted because it is there is not ended.
func TestReconcileBelievesNoContradiction(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	s := b.job().mustJoin()
	l, err := b.store.Lease(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	b.m.opts.Store = &forgetful{Store: b.store}
	held := []wire.Held{{Session: l.Session, Key: l.Key, Addresses: l.Addresses, Expires: l.Expires, Ends: l.Ends}}
	if over, err := b.m.Reconcile(t.Context(), g.who, held); err == nil || len(over) != 0 {
		t.Fatalf("%v are over, %v", over, err)
	}
	if over, err := b.m.Reconcile(t.Context(), g.who, held); err != nil || len(over) != 0 {
		t.Fatalf("%v are over, %v", over, err)
	}
}

// TestEndedBeforeItWasThrough: a join whose session somebody with a say in it has ended has failed for good; where the gateway did, or the state changed hands,
// another one may do.
func TestEndedBeforeItWasThrough(t *testing.T) {
	b := newBench(t, Options{})
	g := Gateway{Network: "corp", Name: "a", Instance: "away-away-away-away"}
	for i, c := range []struct {
		over string
		want problem.Code
	}{
		{endedByClient, problem.SessionOver}, {endedByPolicy, problem.SessionOver}, {endedByTime, problem.SessionOver},
		{"ended by its gateway", problem.Unreachable}, {endedByBreak, problem.Unreachable}, {endedByRestart, problem.Unreachable}, {"", problem.Unreachable},
	} {
		h := held(b.job().key, fmt.Sprintf("198.18.0.%d", 5+i))
		if _, err := b.m.Reconcile(t.Context(), g, []wire.Held{h}); err != nil {
			t.Fatal(err)
		}
		l, err := b.store.Lease(t.Context(), h.Session)
		if err != nil {
			t.Fatal(err)
		}
		if c.over != "" {
			if err := b.m.finish(t.Context(), l, c.over, byCoordinator); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.m.endedBefore(t.Context(), &admission{lease: l}, state.ErrConflict); problem.CodeOf(err) != c.want {
			t.Errorf("%q: %v", c.over, err)
		}
	}
}
