package agent

import (
	"context"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// lostAfter is how long a session may be without any path before a new one is asked for. By then its checks have gone
// unanswered for more than a second, and have been repeated quickly since.
const lostAfter = 250 * time.Millisecond

// askEvery is how often a coordinator that does not answer is asked again while there is no path.
const askEvery = 2 * time.Second

// keeper keeps one session's lease: it renews at half of it, and says when the session is lost.
//
// It reckons in durations from when it heard, so that the clocks of job, gateway and coordinator need not agree.
type keeper struct {
	changed chan struct{} // has a token after path or lease changed

	mu      sync.Mutex
	up      bool      // there is a path
	lost    time.Time // since when there is none
	lease   time.Duration
	skew    time.Duration // the other side's clock minus ours
	expires time.Time     // by our clock
	ends    time.Time     // by our clock
}

func newKeeper() *keeper { return &keeper{changed: make(chan struct{}, 1)} }

// leased notes the lease that a session came with, heard at now.
func (k *keeper) leased(s wire.Session, now time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.lease = time.Duration(s.Lease)
	if k.lease <= 0 {
		k.lease = 10 * time.Minute
	}
	k.skew = s.Expires.Sub(now.Add(k.lease))
	if first := s.Ends.Sub(s.Expires); first <= 0 {
		k.skew = 0 // the first lease was cut short by the end, so it says nothing about the clock
	}
	k.expires, k.ends = s.Expires.Add(-k.skew), s.Ends.Add(-k.skew)
}

// renewed notes a lease that was given on top.
func (k *keeper) renewed(l wire.Lease) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.expires, k.ends = l.Expires.Add(-k.skew), l.Ends.Add(-k.skew)
}

// path notes whether there is a path.
func (k *keeper) path(up bool) {
	k.mu.Lock()
	if k.up && !up {
		k.lost = time.Now()
	}
	k.up = up
	k.mu.Unlock()
	select {
	case k.changed <- struct{}{}:
	default:
	}
}

// without tells for how long there has been no path, 0 while there is one.
func (k *keeper) without(now time.Time) time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.up || k.lost.IsZero() {
		return 0
	}
	return now.Sub(k.lost)
}

func (k *keeper) hasPath() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.up
}

// soonest bounds how often a gateway can have the job ask its issuer for tokens, by giving leases of no length.
const soonest = time.Second / 4

// due gives when to renew next: at half of the lease, give or take a tenth of it, or never where the end comes first.
func (k *keeper) due(now time.Time) (at time.Time, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.expires.Before(k.ends) {
		return time.Time{}, false
	}
	left := min(k.lease, k.expires.Sub(now))
	return now.Add(max(left/2-time.Duration(rand.Int64N(int64(max(left/10, 1)))), soonest)), true
}

func (k *keeper) times() (expires, ends time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.expires, k.ends
}

// keep holds the session until it is lost, which why tells, or over for good, which is an error.
func (s *session) keep(ctx context.Context) (why string, err error) {
	return s.keeper.run(ctx, upkeep{
		renew:     s.renew,
		reachable: s.worthLeaving,
		failed: func(err error) {
			s.agent.fail(err)
			s.agent.log.Warn("cannot renew", "session", s.ID, "code", problem.CodeOf(err), "err", err)
		},
		renewed: func(expires time.Time) {
			s.agent.recovered()
			s.renewed()
			s.agent.log.Info("renewed", "session", s.ID, "expires", expires)
		},
	})
}

// worthLeaving reports whether a session without a path is to be given up for a new one, and why: the coordinator has to answer, and where
// only the relays are gone, they are given time to come back, because a new session cuts every connection. A session that the coordinator
// has ended has no path for that reason.
func (s *session) worthLeaving(ctx context.Context) (leave bool, why string) {
	ctx, cancel := context.WithTimeout(ctx, askEvery)
	defer cancel()
	stand := make(chan bool, 1)
	go func() { stand <- s.relaysStand(ctx) }()
	_, err := s.agent.api.update(ctx, s.ID, s.Secret, wire.Update{})
	if problem.CodeOf(err) == problem.SessionOver {
		cancel()
		<-stand
		return true, strings.TrimPrefix(problem.From(err).Message, "the session has ended: ")
	}
	relays := <-stand
	there := err == nil || !problem.Temporary(err)
	return there && (relays || !s.hasRelays() || s.keeper.without(time.Now()) > relayPatience), "there is no path to the gateway"
}

// upkeep is what keeping a session needs of its surroundings.
type upkeep struct {
	renew     func(context.Context) (wire.Lease, error)
	reachable func(context.Context) (bool, string) // whether a new session, which the coordinator would have to give, is better than to wait, and why
	failed    func(error)
	renewed   func(expires time.Time)
}

// outcome is one renewal's.
type outcome struct {
	lease wire.Lease
	err   error
}

// finding is what came of asking about a session without a path.
type finding struct {
	leave bool
	why   string
}

// run is keep with its surroundings given. A session without a path is given up only for a coordinator that answers: while
// that is away, too, the old session may still come back, and no other can be had.
func (k *keeper) run(ctx context.Context, up upkeep) (why string, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var wait sync.WaitGroup
	defer wait.Wait()
	defer cancel()
	outcomes := make(chan outcome, 1)
	answers := make(chan finding, 1) // of the coordinator, to one question at a time
	asking := false
	var pause backoff
	var refused error // the last word on renewals, where that was no
	renewal, lost, over := newAlarm(), newAlarm(), newAlarm()
	defer renewal.stop()
	defer lost.stop()
	defer over.stop()
	if at, ok := k.due(time.Now()); ok {
		renewal.set(at)
	}
	expires, _ := k.times()
	over.set(expires)
	for {
		lost.hold(!k.hasPath() && !asking, lostAfter)
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-k.changed:
		case <-lost.C():
			lost.clear()
			asking = true
			wait.Go(func() {
				leave, why := up.reachable(ctx)
				answers <- finding{leave, why}
			})
		case a := <-answers:
			if a.leave && !k.hasPath() {
				return a.why, nil
			}
			asking = false
			lost.hold(!k.hasPath(), askEvery)
		case <-over.C():
			return k.expired(refused)
		case <-renewal.C():
			renewal.clear()
			wait.Go(func() {
				lease, err := up.renew(ctx)
				outcomes <- outcome{lease, err}
			})
		case o := <-outcomes:
			switch {
			case o.err == nil:
				pause = backoff{}
				k.renewed(o.lease)
				expires, _ := k.times()
				over.set(expires)
				if at, ok := k.due(time.Now()); ok {
					renewal.set(at)
				}
				up.renewed(expires)
			case forgotten(o.err):
				if _, ends := k.times(); time.Now().Before(ends) {
					return "the gateway does not know it any more", nil
				}
				return k.expired(o.err)
			default:
				up.failed(o.err)
				if !problem.Temporary(o.err) {
					refused = o.err // and the lease runs out
					continue
				}
				renewal.set(time.Now().Add(pause.next()))
			}
		}
	}
}

// forgotten reports that the session is gone where it was held, so that a new one may be had.
func forgotten(err error) bool {
	code := problem.CodeOf(err)
	return code == problem.SessionUnknown || code == problem.SessionOver
}

// expired says what the end of the lease means.
func (k *keeper) expired(refused error) (string, error) {
	if refused != nil && !forgotten(refused) {
		return "", refused
	}
	if expires, ends := k.times(); !expires.Before(ends) {
		return "", problem.New(problem.SessionOver, "the session has reached the longest time that its rules allow",
			"a job that needs longer needs a rule with a larger max_session")
	}
	return "the lease ran out before it could be renewed", nil
}

// alarm is a timer that can be off.
type alarm struct {
	timer *time.Timer
	on    bool
}

func newAlarm() *alarm {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return &alarm{timer: t}
}

// C fires when the alarm does; nil while it is off.
func (a *alarm) C() <-chan time.Time {
	if !a.on {
		return nil
	}
	return a.timer.C
}

func (a *alarm) set(at time.Time) {
	a.on = true
	a.timer.Reset(time.Until(at))
}

func (a *alarm) clear() {
	a.on = false
	a.timer.Stop()
}

// hold runs the alarm while cond holds: it starts once and is cleared when cond no longer does.
func (a *alarm) hold(cond bool, after time.Duration) {
	switch {
	case cond && !a.on:
		a.set(time.Now().Add(after))
	case !cond && a.on:
		a.clear()
	}
}

func (a *alarm) stop() { a.timer.Stop() }
