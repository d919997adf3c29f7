package agent

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// kept is a keeper in a bubble of fake time.
type kept struct {
	*keeper
	began    time.Time
	renewals []time.Duration // when each was asked for
	failures []error
	away     bool // the coordinator does not answer
}

func keepFor(lease, whole, skew time.Duration) *kept {
	now := time.Now()
	k := &kept{keeper: newKeeper(), began: now}
	k.leased(wire.Session{
		Lease: wire.Duration(lease), Expires: now.Add(skew + lease), Ends: now.Add(skew + whole),
	}, now)
	k.path(true)
	return k
}

func (k *kept) run(ctx context.Context, renew func(n int) (wire.Lease, error)) (string, error) {
	return k.keeper.run(ctx, upkeep{
		renew: func(context.Context) (wire.Lease, error) {
			k.renewals = append(k.renewals, time.Since(k.began))
			return renew(len(k.renewals))
		},
		reachable: func(ctx context.Context) (bool, string) {
			if k.away {
				<-ctx.Done() // nothing answers
			}
			return !k.away, "there is no path to the gateway"
		},
		failed:  func(err error) { k.failures = append(k.failures, err) },
		renewed: func(time.Time) {},
	})
}

func (k *kept) end(want time.Duration, t *testing.T) {
	t.Helper()
	if got := time.Since(k.began); (got - want).Abs() > time.Second {
		t.Errorf("ended after %s, want %s", got, want)
	}
}

func TestRenewsAtHalfTheLeaseUntilTheEnd(t *testing.T) {
	for name, skew := range map[string]time.Duration{"same clock": 0, "behind": -time.Hour, "ahead": 3 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := keepFor(10*time.Minute, time.Hour, skew)
				_, err := k.run(t.Context(), func(int) (wire.Lease, error) {
					ends := k.began.Add(skew + time.Hour)
					expires := time.Now().Add(skew + 10*time.Minute)
					if expires.After(ends) {
						expires = ends
					}
					return wire.Lease{Expires: expires, Ends: ends}, nil
				})
				if problem.CodeOf(err) != problem.SessionOver {
					t.Errorf("error = %v", err)
				}
				k.end(time.Hour, t)
				last := time.Duration(0)
				for _, at := range k.renewals {
					if gap := at - last; gap < 4*time.Minute || gap > 5*time.Minute {
						t.Errorf("renewed after %s", gap)
					}
					last = at
				}
				if n := len(k.renewals); n < 10 || n > 14 {
					t.Errorf("%d renewals", n)
				}
			})
		})
	}
}

func TestFailedRenewalsAreRepeatedUntilTheLeaseRunsOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keepFor(10*time.Minute, time.Hour, 0)
		why, err := k.run(t.Context(), func(int) (wire.Lease, error) {
			return wire.Lease{}, problem.New(problem.Unreachable, "nobody there", "")
		})
		if err != nil || !strings.Contains(why, "lease ran out") {
			t.Errorf("%q, %v", why, err)
		}
		k.end(10*time.Minute, t)
		if n := len(k.renewals); n < 25 || n > 100 || len(k.failures) < n-1 {
			t.Errorf("%d renewals, %d failures told", n, len(k.failures))
		}
	})
}

func TestRefusedRenewalEndsWithTheLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keepFor(10*time.Minute, time.Hour, 0)
		_, err := k.run(t.Context(), func(int) (wire.Lease, error) {
			return wire.Lease{}, problem.New(problem.Denied, "the policy has changed", "")
		})
		if problem.CodeOf(err) != problem.Denied || len(k.renewals) != 1 {
			t.Errorf("%v after %d renewals", err, len(k.renewals))
		}
		k.end(10*time.Minute, t)
	})
}

func TestForgottenSessionIsLostAtOnce(t *testing.T) {
	for _, code := range []problem.Code{problem.SessionUnknown, problem.SessionOver} {
		synctest.Test(t, func(t *testing.T) {
			k := keepFor(10*time.Minute, time.Hour, 0)
			why, err := k.run(t.Context(), func(int) (wire.Lease, error) {
				return wire.Lease{}, problem.New(code, "gone", "")
			})
			if err != nil || why == "" || time.Since(k.began) > 5*time.Minute {
				t.Errorf("%q, %v after %s", why, err, time.Since(k.began))
			}
		})
	}
}

func TestPathLostForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keepFor(10*time.Minute, time.Hour, 0)
		time.AfterFunc(20*time.Second, func() { k.path(false) })
		time.AfterFunc(20*time.Second+lostAfter/2, func() { k.path(true) }) // too short to matter
		time.AfterFunc(60*time.Second, func() { k.path(false) })
		why, err := k.run(t.Context(), func(int) (wire.Lease, error) { return wire.Lease{}, errors.New("early") })
		if err != nil || !strings.Contains(why, "no path") {
			t.Errorf("%q, %v", why, err)
		}
		k.end(60*time.Second+lostAfter, t)
	})
}

// Without a coordinator there is no other session to be had, so the old one waits for its path.
func TestPathLostWhileTheCoordinatorIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keepFor(10*time.Minute, time.Hour, 0)
		k.away = true
		time.AfterFunc(20*time.Second, func() { k.path(false) })
		time.AfterFunc(3*time.Minute, func() { k.path(true) })
		ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
		defer cancel()
		if why, err := k.run(ctx, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%q, %v", why, err)
		}
	})
}

func TestKeepEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keepFor(10*time.Minute, time.Hour, 0)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := k.run(ctx, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error = %v", err)
		}
	})
}

func TestBackoffGrowsWithJitterAndHonoursCancellation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b backoff
		for i := range 20 {
			full := min(200*time.Millisecond<<i, 10*time.Second)
			if got := b.next(); got > full || got <= full/2 {
				t.Errorf("pause %d = %s of %s", i, got, full)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		began := time.Now()
		if err := b.wait(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > time.Millisecond {
			t.Errorf("%v after %s", err, time.Since(began))
		}
	})
}

// TestShortLeasesDoNotDriveRenewals: every renewal takes a token of the issuer's.
func TestShortLeasesDoNotDriveRenewals(t *testing.T) {
	now := time.Now()
	k := newKeeper()
	k.leased(wire.Session{Lease: wire.Duration(10 * time.Minute), Expires: now.Add(10 * time.Minute), Ends: now.Add(time.Hour)}, now)
	k.renewed(wire.Lease{Expires: now.Add(time.Millisecond), Ends: now.Add(time.Hour)})
	if at, ok := k.due(now); !ok || at.Before(now.Add(soonest)) {
		t.Errorf("the next renewal is due %v after the last", at.Sub(now))
	}
}
