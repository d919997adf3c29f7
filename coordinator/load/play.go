package load

import (
	"context"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	fillers    = 64     // joins in progress while sessions are made that are not measured
	maxFlying  = 20_000 // joins in progress at most; more are errors
	maxSamples = 500    // sessions that are asked for at the end
	tick       = time.Millisecond
	firstAgain = 100 * time.Millisecond // before a join is tried again
	slack      = 5 * time.Second        // by which a coordinator's clock and its word may differ from the job's
)

// play runs the phases that are asked for.
func (p *player) play(ctx context.Context) (r Report, err error) {
	r.Gateways = len(p.gateways)
	phase := func(name string, f func(context.Context) (Phase, error)) error {
		p.log.Info("phase begins", "phase", name)
		got, err := f(ctx)
		got.Name = name
		r.Phases = append(r.Phases, got)
		return err
	}
	if p.opts.Sessions > 0 {
		if err := phase("fill", p.fill); err != nil {
			return r, err
		}
	}
	if p.opts.Burst > 0 {
		if err := phase("burst", p.burst); err != nil {
			return r, err
		}
	}
	if p.opts.Rate > 0 {
		if err := phase("steady", p.steady); err != nil {
			return r, err
		}
	}
	p.count(ctx, &r)
	return r, nil
}

// fill joins sessions as fast as the coordinator takes them.
func (p *player) fill(ctx context.Context) (Phase, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	n := p.opts.Sessions
	s := p.issuer.supply(ctx, p.spare(n), 1000, runtime.GOMAXPROCS(0))
	defer s.wg.Wait()
	defer cancel()
	m := newMeter(n)
	var wg sync.WaitGroup
	var taken atomic.Int64
	for range fillers {
		wg.Go(func() {
			for i := taken.Add(1); i <= int64(n) && ctx.Err() == nil; i = taken.Add(1) {
				p.one(ctx, m, s, int(i), time.Now())
			}
		})
	}
	wg.Wait()
	p.live.spread(time.Now())
	return m.phase(), ctx.Err()
}

// burst joins many jobs at once.
func (p *player) burst(ctx context.Context) (Phase, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	n := p.opts.Burst
	s := p.issuer.supply(ctx, p.spare(n), float64(n), runtime.GOMAXPROCS(0))
	defer s.wg.Wait()
	defer cancel()
	if err := s.wait(ctx); err != nil {
		return Phase{}, err
	}
	m := newMeter(n)
	var wg sync.WaitGroup
	began := time.Now()
	for i := range n {
		wg.Go(func() { p.one(ctx, m, s, i, began) })
	}
	wg.Wait()
	return m.phase(), ctx.Err()
}

// spare is how many tickets n joins may need: a retry takes another one.
func (p *player) spare(n int) int {
	if p.opts.Retry {
		return 2*n + 100
	}
	return n
}

// steady joins at the rate, whatever becomes of the joins before, while sessions renew. Each join is timed from the moment at
// which it was to begin.
func (p *player) steady(ctx context.Context) (Phase, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	n := max(int(p.opts.Rate*p.opts.Duration.Seconds()), 1)
	s := p.issuer.supply(ctx, p.spare(n), p.opts.Rate, runtime.GOMAXPROCS(0))
	defer s.wg.Wait()
	defer cancel()
	if err := p.signAhead(ctx, s); err != nil {
		return Phase{}, err
	}
	runtime.GC() // of what signing left, so that it does not fall into what is measured
	m := newMeter(n)
	var renewing, joining sync.WaitGroup
	over, stop := context.WithCancel(ctx)
	defer stop()
	began := time.Now()
	p.live.spread(began)
	renewing.Go(func() { p.renewAll(over) })
	var flying atomic.Int64
	for i := range n {
		at := began.Add(time.Duration(float64(i) / p.opts.Rate * float64(time.Second)))
		if !sleepUntil(ctx, at) || p.enough() {
			break
		}
		if flying.Add(1) > maxFlying {
			flying.Add(-1)
			m.failed("too-many-in-progress")
			continue
		}
		joining.Go(func() {
			defer flying.Add(-1)
			p.one(ctx, m, s, i, at)
		})
	}
	joining.Wait()
	m.end = time.Now()
	stop()
	renewing.Wait()
	return m.phase(), ctx.Err()
}

// enough reports whether the rate is to end before its time.
func (p *player) enough() bool {
	select {
	case <-p.opts.Enough:
		return true
	default:
		return false
	}
}

// signAhead waits for the joins' tokens and signs those of the renewals that fall into the run.
func (p *player) signAhead(ctx context.Context, s *supply) error {
	if err := s.wait(ctx); err != nil {
		return err
	}
	p.live.spread(time.Now())
	within := min(p.opts.Duration, ahead)
	var wg sync.WaitGroup
	list := p.live.dueBefore(time.Now().Add(within))
	var taken atomic.Int64
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for i := taken.Add(1) - 1; i < int64(len(list)) && ctx.Err() == nil; i = taken.Add(1) - 1 {
				list[i].job, _ = p.issuer.tokenFor(list[i].job) // signed when it is needed where this failed
			}
		})
	}
	wg.Wait()
	return ctx.Err()
}

func sleepUntil(ctx context.Context, at time.Time) bool {
	wait := time.Until(at)
	if wait <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// one plays a job that is to join at a time.
func (p *player) one(ctx context.Context, m *meter, tickets *supply, n int, at time.Time) {
	late := time.Since(at)
	s, err := p.join(ctx, tickets, n, m)
	if err != nil {
		if ctx.Err() == nil {
			m.failed(string(problem.CodeOf(err)))
			p.log.Debug("a join failed", "code", problem.CodeOf(err), "err", err)
		}
		return
	}
	m.joined(time.Since(at), late)
	p.live.add(s, time.Now().Add(p.opts.RenewEvery))
	if p.opts.Hold > 0 && sleepUntil(ctx, time.Now().Add(p.opts.Hold)) && p.live.remove(s.id) {
		if err := p.jobs.end(ctx, n, s); err != nil {
			m.failed("end: " + string(problem.CodeOf(err)))
		}
	}
}

// join joins, again with a new key and at the next coordinator where that is asked for and the error passes.
func (p *player) join(ctx context.Context, tickets *supply, n int, m *meter) (s *session, err error) {
	ctx, cancel := context.WithTimeout(ctx, p.opts.Timeout)
	defer cancel()
	for retries := 0; ; retries++ {
		var t ticket
		if t, err = tickets.next(ctx); err != nil {
			return nil, err
		}
		try, cancel := context.WithTimeout(ctx, p.tryFor())
		s, err = p.jobs.join(try, n+retries, t)
		cancel()
		if err == nil || !p.opts.Retry || !problem.Temporary(err) {
			return s, err
		}
		m.retried(string(problem.CodeOf(err)))
		again := firstAgain << min(retries, 4) // as clients do: the longer it fails, the more of them are at it
		if !sleepUntil(ctx, time.Now().Add(again/2+rand.N(again))) {
			return nil, err
		}
	}
}

// tryFor is how long one try may take: with another coordinator to ask, not all of the time.
func (p *player) tryFor() time.Duration {
	if p.opts.Retry && len(p.opts.Coordinators) > 1 {
		return max(p.opts.Timeout/10, time.Second)
	}
	return p.opts.Timeout
}

// renewAll renews sessions when they are due, until ctx ends.
func (p *player) renewAll(ctx context.Context) {
	byKey := map[wire.Key]*gateway{}
	for _, g := range p.gateways {
		byKey[g.hello.Key] = g
	}
	work := make(chan *session)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(work)
	for range len(p.gateways) {
		wg.Go(func() {
			for s := range work {
				p.renewOne(context.WithoutCancel(ctx), byKey[s.gateway], s)
			}
		})
	}
	for sleepUntil(ctx, time.Now().Add(tick)) {
		for _, s := range p.live.next(time.Now()) {
			select {
			case work <- s:
			case <-ctx.Done():
				return
			}
		}
	}
}

func (p *player) renewOne(ctx context.Context, g *gateway, s *session) {
	job, err := s.job, error(nil)
	s.job.token = ""
	if job.token == "" {
		job, err = p.issuer.tokenFor(job)
	}
	if err == nil {
		err = g.pass(ctx, s.id, job.token)
	}
	code := ""
	if err != nil {
		code = string(problem.CodeOf(err))
	}
	p.live.renewed(s, code)
}

// count fills in what is known when all is over: whether the coordinator knows of the sessions and of their renewals.
func (p *player) count(ctx context.Context, r *Report) {
	samples := p.live.sample(maxSamples)
	deadline := time.Now().Add(p.opts.Timeout) // renewals may still be on their way
	for i, s := range samples {
		for {
			l, err := p.jobs.lease(ctx, i, s)
			if err == nil && l.Expires.After(s.renewed.Add(s.lease-slack)) {
				break
			}
			if ctx.Err() != nil || time.Now().After(deadline) {
				r.Missing++
				p.log.Warn("a session is not as its job knows it", "session", s.id, "renewed", s.renewed, "expires", l.Expires, "err", err)
				break
			}
			sleepUntil(ctx, time.Now().Add(50*time.Millisecond))
		}
	}
	for _, g := range p.gateways {
		r.Verified += g.verified.Load()
	}
	r.KeyFetches = p.issuer.fetches.Load()
	l := p.live
	l.mu.Lock()
	defer l.mu.Unlock()
	r.Sessions, r.Sampled, r.Lost, r.Clashes, r.Renewals, r.RenewalErrors = len(l.byID), len(samples), l.lost, l.clashes, l.renewals, l.renewErrs
}
