package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestJoin(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("east")
	j := b.job()
	var admitted wire.Session
	r := j.request()
	r.Admitted = func(s wire.Session) error {
		admitted = s
		if n := len(got[wire.Offer](g, wire.FrameOffer)); n != 0 {
			t.Errorf("the gateway was asked before the client was told")
		}
		return nil
	}
	s, err := b.m.Join(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if s.ID != j.key.SessionID() || s.Secret == "" || len(s.Addresses) != 2 || len(s.Gateways) != 1 || s.Gateways[0].Key != g.key {
		t.Errorf("session %+v", s)
	}
	if admitted.ID != s.ID || admitted.Secret != s.Secret || !slices.Equal(admitted.Addresses, s.Addresses) ||
		admitted.Gateways[0].Key != g.key || len(admitted.Gateways[0].Candidates) != 1 {
		t.Errorf("admitted %+v does not announce %+v", admitted, s)
	}
	offers := got[wire.Offer](g, wire.FrameOffer)
	if len(offers) != 1 || offers[0].Token != r.Token || offers[0].Key != j.key || len(offers[0].Grants) != 2 ||
		time.Duration(offers[0].MaxSession) != 2*time.Hour || time.Duration(offers[0].Lease) != 10*time.Minute {
		t.Errorf("offers %+v", offers)
	}
	l, err := b.store.Lease(t.Context(), s.ID)
	if err != nil || l.Gateway != g.who.Instance || l.GatewayName != "east" || l.Claims["run_id"] != "1001" || len(l.Grants) != 2 {
		t.Errorf("lease %+v, %v", l, err)
	}
	if left := time.Until(l.Expires); left < 9*time.Minute || left > 10*time.Minute {
		t.Errorf("the lease lasts %s", left)
	}
}

func TestNothingSecretIsLogged(t *testing.T) {
	b := newBench(t, Options{})
	b.gateway("east")
	j := b.job()
	r := j.request()
	s, err := b.m.Join(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = b.job("ref", "refs/heads/other").join()
	_, _ = b.m.Update(t.Context(), s.ID, "wrong", wire.Update{Token: j.token()})
	_ = b.m.End(t.Context(), s.ID, s.Secret)
	log := b.log.String()
	if !strings.Contains(log, "session admitted") || !strings.Contains(log, "session ended") || !strings.Contains(log, "repository=acme/shop") {
		t.Errorf("the log misses decisions:\n%s", log)
	}
	if !strings.Contains(log, "run_id=1001 network=corp code=denied") || !strings.Contains(log, "claim=ref") {
		t.Errorf("the log does not say whom policy refused, and why:\n%s", log)
	}
	for _, secret := range []string{r.Token.Reveal(), s.Secret.Reveal(), strings.Split(r.Token.Reveal(), ".")[2]} {
		if strings.Contains(log, secret) {
			t.Errorf("a secret is in the log:\n%s", log)
		}
	}
}

func TestJoinRefusals(t *testing.T) {
	b := newBench(t, Options{})
	b.gateway("east")
	other := b.job()
	audience := func(j *job) string { return wire.Audience("https://culvert.test", j.key) }
	at := func(off time.Duration) int64 { return time.Now().Add(off).Unix() }
	for _, c := range []struct {
		name string
		edit func(j *job, r *Join)
		want problem.Code
	}{
		{"expired", func(j *job, r *Join) {
			j.claims["exp"], j.claims["iat"], j.claims["nbf"] = at(-5*time.Minute), at(-10*time.Minute), at(-20*time.Minute)
			r.Token = j.token()
		}, problem.TokenExpired},
		{"from the future", func(j *job, r *Join) { j.claims["nbf"] = at(10 * time.Minute); r.Token = j.token() }, problem.TokenEarly},
		{"another issuer", func(j *job, r *Join) {
			i := claimstest.Start(t)
			r.Token = wire.Secret(i.Sign(audience(j), j.claims))
		}, problem.TokenIssuer},
		{"another coordinator", func(j *job, r *Join) {
			r.Token = wire.Secret(b.issuer.Sign(wire.Audience("https://other.test", j.key), j.claims))
		}, problem.TokenAudience},
		{"replayed with another key", func(j *job, r *Join) { r.Token = other.token() }, problem.TokenAudience},
		{"alg none", func(j *job, r *Join) {
			r.Token = wire.Secret(b.issuer.Forge(claimstest.AlgNone, audience(j), j.claims))
		}, problem.TokenInvalid},
		{"alg HS256", func(j *job, r *Join) {
			r.Token = wire.Secret(b.issuer.Forge(claimstest.HS256Public, audience(j), j.claims))
		}, problem.TokenInvalid},
		{"forged", func(j *job, r *Join) {
			r.Token = wire.Secret(b.issuer.Forge(claimstest.OtherKey, audience(j), j.claims))
		}, problem.TokenInvalid},
		{"unknown key id", func(j *job, r *Join) {
			r.Token = wire.Secret(b.issuer.Forge(claimstest.UnknownKey, audience(j), j.claims))
		}, problem.TokenUnknownKey},
		{"oversized token", func(j *job, r *Join) { r.Token = wire.Secret(strings.Repeat("x", wire.MaxToken+1)) }, problem.TooLarge},
		{"no token", func(j *job, r *Join) { r.Token = "" }, problem.BadRequest},
		{"no key", func(j *job, r *Join) { r.Key = wire.Key{} }, problem.BadRequest},
		{"too many candidates", func(j *job, r *Join) { r.Candidates = make([]wire.Candidate, wire.MaxCandidates+1) }, problem.TooLarge},
		{"empty candidate", func(j *job, r *Join) { r.Candidates = make([]wire.Candidate, 1) }, problem.BadRequest},
		{"another branch", func(j *job, r *Join) { j.claims["ref"] = "refs/heads/x"; r.Token = j.token() }, problem.Denied},
		{"claim missing", func(j *job, r *Join) { j.claims["ref"] = nil; r.Token = j.token() }, problem.Denied},
		{"pull_request_target", func(j *job, r *Join) { j.claims["event_name"] = "pull_request_target"; r.Token = j.token() }, problem.Denied},
		{"another network", func(j *job, r *Join) { r.Network = "lab" }, problem.Denied},
		{"no such network", func(j *job, r *Join) { r.Network = "nowhere" }, problem.NoNetwork},
		{"no network named", func(j *job, r *Join) { r.Network = "" }, problem.NoNetwork},
	} {
		t.Run(c.name, func(t *testing.T) {
			j := b.job()
			r := j.request()
			r.Admitted = func(wire.Session) error { t.Error("admitted"); return nil }
			c.edit(j, &r)
			_, err := b.m.Join(t.Context(), r)
			wantCode(t, err, c.want)
		})
	}
	if n := leases(b); n != 0 {
		t.Errorf("%d leases are left of refused joins", n)
	}
}

func leases(b *bench) (n int) {
	b.store.Leases(func(state.Lease) bool { n++; return true })
	return n
}

// TestStrangersLearnNothing: only a job whose owner some rule pins is told what differed, and what networks there are.
func TestStrangersLearnNothing(t *testing.T) {
	b := newBench(t, Options{})
	b.gateway("east")
	_, err := b.job("ref", "refs/heads/x").join()
	d := problem.From(err).Denial
	if d == nil || d.Rule != "deploy" || d.Claim != "ref" || d.Got != "refs/heads/x" || !slices.Equal(d.Expected, []string{"refs/heads/main"}) {
		t.Errorf("denial %+v", d)
	}
	stranger := b.job("repository_owner_id", "666", "repository_owner", "mallory", "repository", "mallory/x")
	_, known := stranger.join()
	r := stranger.request()
	r.Network = "nowhere"
	_, unknown := b.m.Join(t.Context(), r)
	for _, err := range []error{known, unknown} {
		if p := problem.From(err); p.Code != problem.Denied || p.Denial != nil || strings.Contains(p.Error(), "corp") {
			t.Errorf("a stranger is told %v", err)
		}
	}
	if known.Error() != unknown.Error() {
		t.Errorf("a stranger can tell networks apart: %v, %v", known, unknown)
	}
}

func TestKeyInUse(t *testing.T) {
	b := newBench(t, Options{})
	b.gateway("east")
	j := b.job()
	j.mustJoin()
	_, err := j.join()
	wantCode(t, err, problem.KeyInUse)
	if _, err := b.store.Lease(t.Context(), j.key.SessionID()); err != nil {
		t.Errorf("the second join took the first one's lease along: %v", err)
	}
}

func TestNoGateway(t *testing.T) {
	b := newBench(t, Options{})
	_, err := b.job().join()
	wantCode(t, err, problem.NoGateway)
}

func TestAddressesRunOutAndComeBack(t *testing.T) {
	b := newBench(t, Options{Afterlife: time.Nanosecond})
	g := b.gateway("east")
	var first wire.Session
	for i := 0; ; i++ {
		s, err := b.job().join()
		if err != nil {
			wantCode(t, err, problem.NoAddress)
			if i != 13 { // a /28 less its own, the gateways' and the last
				t.Errorf("the range held %d sessions", i)
			}
			break
		}
		first = s
	}
	if err := b.m.Ended(t.Context(), g.who, wire.End{Session: first.ID}); err != nil {
		t.Fatal(err)
	}
	if s := b.job().mustJoin(); !slices.Equal(s.Addresses, first.Addresses) {
		t.Errorf("got %v, want the freed %v", s.Addresses, first.Addresses)
	}
}

// TestOfferFails has the first gateway fail in every way, and wants the second asked and the first told to forget it.
func TestOfferFails(t *testing.T) {
	for name, c := range map[string]struct {
		answer func(g *gateway) func(wire.FrameType, json.RawMessage) *wire.Answer
		alone  problem.Code // what a job is told where there is no other gateway
	}{
		"refuses": {func(g *gateway) func(wire.FrameType, json.RawMessage) *wire.Answer {
			return g.refuse(problem.GatewayRefused)
		}, problem.GatewayRefused},
		"silent": {func(*gateway) func(wire.FrameType, json.RawMessage) *wire.Answer {
			return func(wire.FrameType, json.RawMessage) *wire.Answer { return nil }
		}, problem.GatewayTimeout},
		"answers without a key": {func(*gateway) func(wire.FrameType, json.RawMessage) *wire.Answer {
			return func(wire.FrameType, json.RawMessage) *wire.Answer { return &wire.Answer{} }
		}, problem.Incompatible},
		"poses as another": {func(g *gateway) func(wire.FrameType, json.RawMessage) *wire.Answer {
			return func(wire.FrameType, json.RawMessage) *wire.Answer {
				return &wire.Answer{Gateway: &wire.Gateway{Key: wire.Key{1}}}
			}
		}, problem.Incompatible},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, Options{OfferTimeout: 300 * time.Millisecond})
			first := b.gateway("a")
			first.set(c.answer(first))
			_, err := b.job().join()
			wantCode(t, err, c.alone)
			if n := leases(b); n != 0 {
				t.Errorf("%d leases are left", n)
			}
			second := b.gateway("b")
			b.m.placed.forget() // or the second would be asked first
			j := b.job()
			if s := j.mustJoin(); s.Gateways[0].Key != second.key {
				t.Errorf("got gateway %v", s.Gateways)
			}
			if ends := got[wire.End](first, wire.FrameEnd); len(ends) != 2 || ends[1].Session != j.key.SessionID() {
				t.Errorf("the gateway that failed was told %+v", ends)
			}
		})
	}
}

func TestRefusalBeatsSilence(t *testing.T) {
	b := newBench(t, Options{OfferTimeout: 200 * time.Millisecond})
	b.gateway("a").set(func(wire.FrameType, json.RawMessage) *wire.Answer { return nil })
	g := b.gateway("b")
	g.set(g.refuse(problem.GatewayRefused))
	_, err := b.job().join()
	wantCode(t, err, problem.GatewayRefused)
}

// TestGatewayIsGone: its presence is still there, but no node holds its stream.
func TestGatewayIsGone(t *testing.T) {
	b := newBench(t, Options{})
	b.present(&gateway{who: Gateway{Network: "corp", Name: "a", Instance: "gone-gone-gone-gone"}, key: wire.Key{1}})
	_, err := b.job().join()
	wantCode(t, err, problem.GatewayTimeout)
}

func TestClientGoesAway(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	ctx, cancel := context.WithCancel(t.Context())
	g.set(func(wire.FrameType, json.RawMessage) *wire.Answer { cancel(); return nil })
	_, err := b.m.Join(ctx, b.job().request())
	wantCode(t, err, problem.Cancelled)
	b.eventually("the lease is freed", func() bool { return leases(b) == 0 })
	if n := len(got[wire.End](g, wire.FrameEnd)); n != 1 {
		t.Errorf("the gateway was told %d times", n)
	}
	r := b.job().request()
	r.Admitted = func(wire.Session) error { return errors.New("broken pipe") }
	_, err = b.m.Join(t.Context(), r)
	wantCode(t, err, problem.Cancelled)
}

// TestCandidatesWhileOffered: the client has its secret before the gateway has answered.
func TestCandidatesWhileOffered(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	j := b.job()
	r := j.request()
	late := []wire.Candidate{{Kind: wire.Reflexive, Addr: b.store.Gateways("corp")[0].Candidates[0].Addr}}
	r.Admitted = func(s wire.Session) error {
		_, err := b.m.Update(t.Context(), s.ID, s.Secret, wire.Update{Candidates: late})
		if err != nil {
			return fmt.Errorf("candidates while offered: %w", err)
		}
		_, err = b.m.Update(t.Context(), s.ID, s.Secret, wire.Update{Token: r.Token})
		wantCode(t, err, problem.GatewayTimeout)
		return nil
	}
	s, err := b.m.Join(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	trickles := got[wire.Trickle](g, wire.FrameCandidates)
	if len(trickles) != 1 || trickles[0].Session != s.ID || !slices.Equal(trickles[0].Candidates, late) {
		t.Errorf("the gateway got %+v", trickles)
	}
}

// TestEndWhileOffered: the owner ends the session before the gateway has answered; the answer finds it over.
func TestEndWhileOffered(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	r := b.job().request()
	r.Admitted = func(s wire.Session) error { return b.m.End(t.Context(), s.ID, s.Secret) }
	_, err := b.m.Join(t.Context(), r)
	wantCode(t, err, problem.SessionOver)
	if n := len(got[wire.End](g, wire.FrameEnd)); n == 0 { // twice: before the offer, and after the answer
		t.Error("the gateway was not told")
	}
	b.eventually("the lease is freed", func() bool { return leases(b) == 0 })
}

// TestLeaseNamesWhoIsAsked: it names the gateway that is being asked, so that a join need not write it again; a gateway that was passed over
// has no say any more.
func TestLeaseNamesWhoIsAsked(t *testing.T) {
	b := newBench(t, Options{})
	list := []*gateway{b.gateway("a"), b.gateway("b")}
	var asked []string
	for _, g := range list {
		g.set(func(ft wire.FrameType, body json.RawMessage) *wire.Answer {
			var o wire.Offer
			if err := json.Unmarshal(body, &o); err != nil {
				t.Error(err)
			}
			l, err := b.store.Lease(t.Context(), o.Session)
			if err != nil || l.Gateway != g.who.Instance || l.GatewayName != g.who.Name {
				t.Errorf("while %s is asked, the lease names %q, %v", g.who.Name, l.Gateway, err)
			}
			if asked = append(asked, g.who.Instance); len(asked) == 1 {
				return g.refuse(problem.Denied)(ft, body)
			}
			former := list[slices.IndexFunc(list, func(o *gateway) bool { return o != g })]
			if err := b.m.Ended(t.Context(), former.who, wire.End{Session: o.Session, Reason: "withdrawn"}); err == nil {
				t.Error("who was passed over ends the session")
			}
			if over, err := b.m.Reconcile(t.Context(), former.who, []wire.Held{held(o.Key, "198.18.0.5")}); err != nil || len(over) != 1 {
				t.Errorf("who was passed over keeps the session: %v, %v", over, err)
			}
			mine := held(o.Key, o.Addresses[0].String())
			mine.Addresses = o.Addresses
			if over, err := b.m.Reconcile(t.Context(), g.who, []wire.Held{mine}); err != nil || len(over) != 0 {
				t.Errorf("who is asked loses the session: %v, %v", over, err)
			}
			return g.accept(ft, body)
		})
	}
	s := b.job().mustJoin()
	l, err := b.store.Lease(t.Context(), s.ID)
	if err != nil || len(asked) != 2 || l.Gateway != asked[1] || time.Until(l.Expires) < 9*time.Minute {
		t.Errorf("lease %+v, %v; asked %v", l, err, asked)
	}
	if n := len(got[wire.End](list[slices.IndexFunc(list, func(g *gateway) bool { return g.who.Instance == asked[0] })], wire.FrameEnd)); n != 1 {
		t.Errorf("who was passed over was told %d times", n)
	}
}

// TestGatewayEndsWhatItIsOffered: a gateway that says that the session is over, before its own answer is taken, is believed.
func TestGatewayEndsWhatItIsOffered(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	g.set(func(ft wire.FrameType, body json.RawMessage) *wire.Answer {
		var o wire.Offer
		if err := json.Unmarshal(body, &o); err != nil {
			t.Error(err)
		}
		if err := b.m.Ended(t.Context(), g.who, wire.End{Session: o.Session, Reason: "it drains"}); err != nil {
			t.Error(err)
		}
		return g.accept(ft, body)
	})
	_, err := b.job().join()
	wantCode(t, err, problem.Unreachable)
	b.eventually("the lease is freed", func() bool { return leases(b) == 0 })
}

// TestJoinWritesItsLeaseOnce: the state's revisions count writes.
func TestJoinWritesItsLeaseOnce(t *testing.T) {
	b := newBench(t, Options{})
	b.gateway("a")
	revision := func(s wire.Session) uint64 {
		l, err := b.store.Lease(t.Context(), s.ID)
		if err != nil {
			t.Fatal(err)
		}
		return l.Revision
	}
	first := revision(b.job().mustJoin())
	if second := revision(b.job().mustJoin()); second != first+1 {
		t.Errorf("revisions %d and %d", first, second)
	}
}

// TestPolicyChangesWhileOffered: the reload cannot see the session as held yet, so the join looks again.
func TestPolicyChangesWhileOffered(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	next := b.rules(strings.Replace(rulesV1, "refs/heads/main", "refs/heads/release", 1))
	g.set(func(ft wire.FrameType, body json.RawMessage) *wire.Answer {
		b.m.rules.Store(&next)
		return g.accept(ft, body)
	})
	_, err := b.job().join()
	wantCode(t, err, problem.SessionOver)
	if n := len(got[wire.End](g, wire.FrameEnd)); n != 1 {
		t.Errorf("the gateway was told %d times", n)
	}
}

// Another issuer's token with the same claims is another job's, though its signature is as good.
func TestJoinOfAnotherIssuer(t *testing.T) {
	b := newBench(t, Options{})
	b.gateway("a")
	other := claimstest.Start(t)
	doc := fmt.Sprintf(`
url: https://culvert.test
tls: {cert: c, key: k}
state: {dir: d}
issuers: [{name: ours, url: "%s"}, {name: theirs, url: "%s"}]
networks: {corp: {gateways: [{enrol_sha256: %s}]}}
rules:
  - {name: deploy, match: {iss: ours, repository_owner_id: 9919}, allow: ["tcp 10.20.0.5:5432"]}
  - {name: elsewhere, match: {iss: theirs, repository_owner_id: 1}, allow: ["tcp 10.20.0.6:5432"]}
`, b.issuer.URL(), other.URL(), strings.Repeat("ab", 32))
	cfg, err := config.Parse("culvert.yaml", []byte(doc))
	if err != nil {
		t.Fatal(err)
	}
	v, err := claims.New(claims.Options{Issuers: cfg.Issuers})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = v.Close() })
	b.m.SetRules(t.Context(), Rules{Config: cfg, Verifier: v})
	b.job().mustJoin()
	j := b.job()
	req := j.request()
	req.Token = wire.Secret(other.Sign(wire.Audience("https://culvert.test", j.key), j.claims))
	_, err = b.m.Join(t.Context(), req)
	wantCode(t, err, problem.Denied)
	if d := problem.From(err).Denial; d != nil {
		t.Errorf("a stranger of another issuer is told %+v", d)
	}
}
