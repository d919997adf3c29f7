package session

import (
	"context"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestRenew(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	j := b.job()
	s := j.mustJoin()
	before, _ := b.store.Lease(t.Context(), s.ID)
	fresh := j.token()
	lease, err := b.m.Update(t.Context(), s.ID, s.Secret, wire.Update{Token: fresh})
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(lease.Expires); left > 9*time.Minute || left < 8*time.Minute {
		t.Errorf("the client is told %s, not the gateway's own word of 9 minutes", left)
	}
	after, _ := b.store.Lease(t.Context(), s.ID)
	if !after.Expires.After(before.Expires) || after.Over != "" {
		t.Errorf("the lease went from %s to %s", before.Expires, after.Expires)
	}
	renews := got[wire.Renewed](g, wire.FrameRenew)
	if len(renews) != 1 || renews[0].Token != fresh || renews[0].Session != s.ID {
		t.Errorf("the gateway got %+v", renews)
	}
}

func TestRenewRefusals(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	j := b.job()
	s := j.mustJoin()
	with := func(key string, value any) wire.Secret {
		other := &job{b, j.key, map[string]any{}}
		for k, v := range j.claims {
			other.claims[k] = v
		}
		other.claims[key] = value
		return other.token()
	}
	for _, c := range []struct {
		name  string
		token wire.Secret
		want  problem.Code
	}{
		{"another key's token", b.job().token(), problem.TokenAudience},
		{"another run", with("run_id", "1002"), problem.TokenInvalid},
		{"another attempt", with("run_attempt", "2"), problem.TokenInvalid},
		{"another job of the run", with("check_run_id", "5006"), problem.TokenInvalid},
		{"another repository", with("repository_id", "75"), problem.TokenInvalid},
		{"identity missing", with("run_id", nil), problem.TokenInvalid},
		{"older than the last", with("iat", time.Now().Add(-time.Minute).Unix()), problem.TokenInvalid},
		{"oversized", wire.Secret(strings.Repeat("x", wire.MaxToken+1)), problem.TooLarge},
	} {
		_, err := b.m.Update(t.Context(), s.ID, s.Secret, wire.Update{Token: c.token})
		if problem.CodeOf(err) != c.want {
			t.Errorf("%s: got %v, want %s", c.name, err, c.want)
		}
	}
	if n := len(got[wire.Renewed](g, wire.FrameRenew)); n != 0 {
		t.Errorf("%d refused tokens went on to the gateway", n)
	}
	if n := len(got[wire.End](g, wire.FrameEnd)); n != 0 {
		t.Errorf("a refused token ended the session")
	}
	g.set(g.refuse(problem.GatewayRefused))
	_, err := b.m.Update(t.Context(), s.ID, s.Secret, wire.Update{Token: j.token()})
	wantCode(t, err, problem.GatewayRefused)
}

func TestRenewalPastPolicyEnds(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	j := b.job()
	s := j.mustJoin()
	next := b.rules(strings.Replace(rulesV1, `, "udp 10.20.0.5:53"`, "", 1))
	b.m.rules.Store(&next)
	_, err := b.m.Update(t.Context(), s.ID, s.Secret, wire.Update{Token: j.token()})
	wantCode(t, err, problem.Denied)
	if ends := got[wire.End](g, wire.FrameEnd); len(ends) != 1 || ends[0].Session != s.ID {
		t.Errorf("the gateway was told %+v", ends)
	}
	if err := b.m.Ended(t.Context(), g.who, wire.End{Session: s.ID, Reason: "as told"}); err != nil { // as the gateway says at once
		t.Fatal(err)
	}
	_, err = b.m.Update(t.Context(), s.ID, s.Secret, wire.Update{Token: j.token()})
	wantCode(t, err, problem.SessionOver)
	if message := problem.From(err).Message; !strings.Contains(message, endedByPolicy) {
		t.Errorf("the client is told %q", message)
	}
	l, err := b.store.Lease(t.Context(), s.ID)
	if left := time.Until(l.Expires); err != nil || left > time.Minute {
		t.Errorf("it is remembered for %v, %v", left, err)
	}
}

func TestLongestSession(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	j := b.job()
	s := j.mustJoin()
	late := time.Now().Add(115 * time.Minute)
	b.now.Store(&late)
	l, err := b.m.opts.Store.Lease(t.Context(), s.ID)
	if err == nil {
		l, err = b.m.extend(t.Context(), l, mustVerify(b, j), b.m.Rules())
	}
	if err != nil || !l.Expires.Equal(l.Ends) {
		t.Errorf("renewed at 1h55 until %s, %v; the session ends at %s", l.Expires, err, l.Ends)
	}
	over := time.Now().Add(121 * time.Minute)
	b.now.Store(&over)
	_, err = b.m.Update(t.Context(), s.ID, s.Secret, wire.Update{Token: j.token()})
	wantCode(t, err, problem.SessionOver)
	if n := len(got[wire.End](g, wire.FrameEnd)); n != 1 {
		t.Errorf("the gateway was told %d times", n)
	}
}

func TestSecrets(t *testing.T) {
	b := newBench(t, Options{})
	b.gateway("a")
	one, two := b.job().mustJoin(), b.job().mustJoin()
	var answers []string
	for _, c := range []struct {
		id     string
		secret wire.Secret
	}{
		{one.ID, two.Secret}, {one.ID, ""}, {one.ID, one.Secret + "x"}, {"AAAAAAAAAAAAAAAAAAAAAA", one.Secret},
		{"", one.Secret}, {"session.*", one.Secret}, {strings.Repeat("A", 5000), one.Secret},
	} {
		_, err := b.m.Update(t.Context(), c.id, c.secret, wire.Update{})
		wantCode(t, err, problem.SessionUnknown)
		answers = append(answers, err.Error(), b.m.End(t.Context(), c.id, c.secret).Error())
	}
	if slices.Sort(answers); answers[0] != answers[len(answers)-1] {
		t.Errorf("the answers differ: %q and %q", answers[0], answers[len(answers)-1])
	}
	if _, err := b.m.Update(t.Context(), one.ID, one.Secret, wire.Update{}); err != nil {
		t.Errorf("its own secret: %v", err)
	}
	if len(one.Secret) != 43 || one.Secret == two.Secret {
		t.Errorf("secrets of %d characters", len(one.Secret))
	}
}

func TestEnd(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	s := b.job().mustJoin()
	if err := b.m.End(t.Context(), s.ID, s.Secret); err != nil {
		t.Fatal(err)
	}
	if ends := got[wire.End](g, wire.FrameEnd); len(ends) != 1 || ends[0].Session != s.ID {
		t.Errorf("the gateway was told %+v", ends)
	}
	wantCode(t, b.m.End(t.Context(), s.ID, s.Secret), problem.SessionOver)
	l, err := b.store.Lease(t.Context(), s.ID)
	if err != nil || l.Over == "" || time.Until(l.Expires) > time.Minute {
		t.Errorf("lease %+v, %v: want it remembered for a minute", l, err)
	}
}

func TestCandidatesLater(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	s := b.job().mustJoin()
	list := []wire.Candidate{{Kind: wire.Reflexive, Addr: netip.MustParseAddrPort("203.0.113.5:4444")}}
	lease, err := b.m.Update(t.Context(), s.ID, s.Secret, wire.Update{Candidates: list})
	if err != nil || lease.Expires.IsZero() {
		t.Errorf("got %+v, %v", lease, err)
	}
	if got := got[wire.Trickle](g, wire.FrameCandidates); len(got) != 1 || !slices.Equal(got[0].Candidates, list) {
		t.Errorf("the gateway got %+v", got)
	}
	_, err = b.m.Update(t.Context(), s.ID, s.Secret, wire.Update{Candidates: make([]wire.Candidate, 99)})
	wantCode(t, err, problem.TooLarge)
}

// during is a verifier that does something else first.
type during struct {
	Verifier
	do func()
}

func (d *during) Verify(ctx context.Context, token, audience string) (*claims.Claims, error) {
	d.do()
	return d.Verifier.Verify(ctx, token, audience)
}

// TestNoRenewalOvertakesAnEnd: a session that ends while its renewal is being judged, by whichever way that came, is over and stays so.
func TestNoRenewalOvertakesAnEnd(t *testing.T) {
	for name, renew := range map[string]func(b *bench, g *gateway, j *job, s wire.Session, end func()) error{
		"in the tunnel": func(b *bench, g *gateway, j *job, s wire.Session, end func()) error {
			rules := b.m.Rules()
			rules.Verifier = &during{rules.Verifier, end}
			b.m.rules.Store(&rules)
			return b.m.Renewed(t.Context(), g.who, wire.Renewed{Session: s.ID, Token: j.token()})
		},
		"at the coordinator": func(b *bench, g *gateway, j *job, s wire.Session, end func()) error {
			g.set(func(f wire.FrameType, body json.RawMessage) *wire.Answer {
				if f == wire.FrameRenew {
					end()
				}
				return g.accept(f, body)
			})
			_, err := b.m.Update(t.Context(), s.ID, s.Secret, wire.Update{Token: j.token()})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, Options{})
			g, j := b.gateway("a"), b.job()
			s := j.mustJoin()
			err := renew(b, g, j, s, func() {
				if err := b.m.End(t.Context(), s.ID, s.Secret); err != nil {
					t.Error(err)
				}
			})
			wantCode(t, err, problem.SessionOver)
			l, err := b.store.Lease(t.Context(), s.ID)
			if err != nil || l.Over != endedByClient || l.Expires.After(time.Now().Add(2*time.Minute)) {
				t.Errorf("the lease is over because of %q and lives until %v (%v)", l.Over, l.Expires, err)
			}
		})
	}
}

// TestShorterSessionsEndLongOnes: a rule that lets sessions last less long ends those that have lasted longer.
func TestShorterSessionsEndLongOnes(t *testing.T) {
	b := newBench(t, Options{})
	g := b.gateway("a")
	b.job().mustJoin()
	later := time.Now().Add(90 * time.Minute)
	b.now.Store(&later)
	b.m.SetRules(t.Context(), b.rules(rulesV1))
	if ends := got[wire.End](g, wire.FrameEnd); len(ends) != 0 {
		t.Fatalf("ended within its time: %v", ends)
	}
	b.m.SetRules(t.Context(), b.rules(strings.Replace(rulesV1, "max_session: 2h", "max_session: 1h", 1)))
	if ends := got[wire.End](g, wire.FrameEnd); len(ends) != 1 || ends[0].Reason != endedByTime {
		t.Errorf("the gateway heard %v", ends)
	}
}
