package agent

import (
	"context"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// renewAs renews a session with a fresh token of its run.
func (r *rig) renewAs(s *session, over map[string]any) (wire.Lease, error) {
	return r.door.renew(context.Background(), s, r.token(s.key, over))
}

func TestLeaseEndsAtItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "", ownerID)
		o := r.fresh()
		o.Lease = wire.Duration(30 * time.Second)
		r.mustAdmit(o)
		time.Sleep(30*time.Second - time.Nanosecond)
		synctest.Wait()
		if r.plane.get(o.Session).isClosed() {
			t.Fatal("ended before the deadline")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if !r.plane.get(o.Session).isClosed() || r.door.table.size() != 0 {
			t.Fatal("lives on after the deadline")
		}
		if got := r.reasonOf(o.Session); got != "lease ran out" {
			t.Errorf("reason %q", got)
		}
	})
}

func TestRenewalsReachTheEndAndNoFurther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "", ownerID)
		o := r.fresh()
		o.Lease, o.MaxSession = wire.Duration(time.Minute), wire.Duration(5*time.Minute)
		s := r.mustAdmit(o)
		began := time.Now()
		for !r.plane.get(o.Session).isClosed() {
			time.Sleep(40 * time.Second)
			synctest.Wait()
			if r.plane.get(o.Session).isClosed() {
				break
			}
			lease, err := r.renewAs(s, nil)
			if err != nil {
				t.Fatal(err)
			}
			if want := earlier(time.Now().Add(time.Minute), began.Add(5*time.Minute)); !lease.Expires.Equal(want) {
				t.Fatalf("expires %v, want %v", lease.Expires.Sub(began), want.Sub(began))
			}
		}
		if got := r.reasonOf(o.Session); got != "longest session reached" {
			t.Errorf("reason %q", got)
		}
		if _, err := r.renewAs(s, nil); problem.CodeOf(err) != problem.SessionOver {
			t.Errorf("renewal of a dead session: %v", err)
		}
	})
}

func TestLeaseBounds(t *testing.T) {
	for name, c := range map[string]struct{ lease, max, expires, ends time.Duration }{
		"defaults":         {0, 0, 10 * time.Minute, 6 * time.Hour},
		"too short":        {time.Millisecond, time.Hour, time.Second, time.Hour},
		"too long":         {100 * time.Hour, 1000 * time.Hour, time.Hour, 120 * time.Hour},
		"longer than ends": {10 * time.Minute, time.Minute, time.Minute, time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, "", ownerID)
				o := r.fresh()
				o.Lease, o.MaxSession = wire.Duration(c.lease), wire.Duration(c.max)
				a, err := r.admit(o)
				if err != nil {
					t.Fatal(err)
				}
				if got := time.Until(a.Lease.Expires); got != c.expires {
					t.Errorf("expires in %v, want %v", got, c.expires)
				}
				if got := time.Until(a.Lease.Ends); got != c.ends {
					t.Errorf("ends in %v, want %v", got, c.ends)
				}
				r.door.table.close("test")
			})
		})
	}
}

func TestRenewalRefused(t *testing.T) {
	for name, c := range map[string]struct {
		token func(*rig, *session) wire.Secret
		code  problem.Code
	}{
		"another run":        {func(r *rig, s *session) wire.Secret { return r.token(s.key, map[string]any{"run_id": "1002"}) }, problem.GatewayRefused},
		"another repository": {func(r *rig, s *session) wire.Secret { return r.token(s.key, map[string]any{"repository_id": "75"}) }, problem.GatewayRefused},
		"another owner": {func(r *rig, s *session) wire.Secret {
			return r.token(s.key, map[string]any{"repository_owner_id": "1"})
		}, problem.GatewayRefused},
		"another key": {func(r *rig, _ *session) wire.Secret { return r.token(newKey(r.t), nil) }, problem.TokenAudience},
		"no token":    {func(*rig, *session) wire.Secret { return "" }, problem.TokenInvalid},
		"policy changed its mind": {func(r *rig, s *session) wire.Secret {
			return r.token(s.key, map[string]any{"repository": "acme/renamed"})
		}, problem.Denied},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, ownRules)
				s := r.mustAdmit(r.fresh())
				before := r.door.table.leaseOf(s)
				time.Sleep(time.Minute)
				if _, err := r.door.renew(context.Background(), s, c.token(r, s)); problem.CodeOf(err) != c.code {
					t.Errorf("got %v, want %s", err, c.code)
				}
				if r.door.table.leaseOf(s) != before {
					t.Error("a refused renewal moved the deadline")
				}
				if !r.plane.get(s.id).allows("10.20.0.5:5432") {
					t.Error("a refused renewal changed the scope")
				}
				r.door.table.close("test")
			})
		})
	}
}

func TestRenewalsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "", ownerID)
		s := r.mustAdmit(r.fresh())
		var refused int
		for range 20 {
			if _, err := r.renewAs(s, nil); problem.CodeOf(err) == problem.RateLimited {
				refused++
			}
		}
		if refused != 15 {
			t.Errorf("%d of 20 renewals at once refused, want 15", refused)
		}
		r.door.table.close("test")
	})
}

// TestChangedPolicy takes up a new file: sessions are narrowed, bounded or ended; a broken file changes nothing.
func TestChangedPolicy(t *testing.T) {
	for name, c := range map[string]struct {
		rules string
		over  bool
		allow bool // 10.20.0.5:5432
		ends  time.Duration
	}{
		"narrower": {rules: strings.Replace(ownRules, "10.20.0.0/24", "10.20.0.9", 1), ends: 30 * time.Minute},
		"shorter":  {rules: strings.Replace(ownRules, "30m", "20m", 1), allow: true, ends: 20 * time.Minute},
		"longer":   {rules: strings.Replace(ownRules, "30m", "3h", 1), allow: true, ends: 30 * time.Minute},
		"without":  {rules: strings.Replace(ownRules, "acme/shop", "acme/other", 1), over: true},
		"broken":   {rules: "rules: [", allow: true, ends: 30 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, ownRules)
				s := r.mustAdmit(r.fresh())
				file := t.TempDir() + "/policy.yaml"
				if err := os.WriteFile(file, []byte(c.rules), 0o600); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan struct{})
				go func() {
					defer close(done)
					r.door.watchPolicy(ctx, file)
				}()
				time.Sleep(policyEvery)
				synctest.Wait()
				if _, live := r.door.table.get(s.id); live == c.over {
					t.Fatalf("live: %t", live)
				}
				if !c.over {
					if got := r.plane.get(s.id).allows("10.20.0.5:5432"); got != c.allow {
						t.Errorf("allowed: %t, want %t", got, c.allow)
					}
					if got := r.door.table.leaseOf(s).Ends.Sub(s.admitted); got != c.ends {
						t.Errorf("ends after %v, want %v", got, c.ends)
					}
				}
				if name == "broken" {
					time.Sleep(10 * policyEvery)
					if n := strings.Count(r.log.String(), "refused"); n != 1 {
						t.Errorf("a broken file is logged %d times, want once", n)
					}
				}
				cancel()
				<-done
				r.door.table.close("test")
			})
		})
	}
}

// TestExpiredRule ends a session within seconds of the last day of the only rule that admits it. The test's clock begins
// at midnight.
func TestExpiredRule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rules := strings.Replace(ownRules, "max_session: 30m", "expires: "+time.Now().UTC().Format(time.DateOnly), 1)
		if rules == ownRules {
			t.Fatal("the rules do not expire")
		}
		file := t.TempDir() + "/policy.yaml"
		if err := os.WriteFile(file, []byte(rules), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(24*time.Hour - 5*time.Minute)
		r := newRig(t, rules)
		s := r.mustAdmit(r.fresh())
		if s.ends.After(time.Now().Add(5 * time.Minute)) {
			t.Errorf("the session may last until %s, beyond its rule", s.ends)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			r.door.watchPolicy(ctx, file)
		}()
		time.Sleep(5*time.Minute - time.Second)
		synctest.Wait()
		if _, live := r.door.table.get(s.id); !live {
			t.Error("over before its rule is")
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if _, live := r.door.table.get(s.id); live {
			t.Error("outlives its rule")
		}
		if _, err := r.door.admit(t.Context(), r.fresh()); problem.CodeOf(err) != problem.GatewayRefused {
			t.Errorf("admitted under an expired rule: %v", err)
		}
		cancel()
		<-done
		r.door.table.close("test")
	})
}
