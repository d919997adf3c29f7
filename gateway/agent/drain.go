package agent

import (
	"context"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	// drainSettle is how long a session without connections is given to find another gateway before it is not waited for.
	drainSettle = 3 * time.Second
	// drainLinger is how long sessions whose time is up are given to go.
	drainLinger = 2 * time.Second
	drainLook   = 50 * time.Millisecond
	drainPace   = 500 // sessions that are told at once, each drainLook
	// leaveWait bounds one question for leave; the client asks again.
	leaveWait = 10 * time.Second
	// leaveHold is how long a session that may leave begins no flow here.
	leaveHold = 2 * time.Second
)

// draining is when a gateway that drains stops at the latest; nil while it does not.
type draining struct{ until atomic.Pointer[time.Time] }

// Draining reports whether the gateway takes no sessions any more because it is about to stop.
func (g *Gateway) Draining() bool { return g.door.draining.until.Load() != nil }

// Drain takes no new sessions and has those that it carries move to another gateway or finish, until none would be cut by stopping,
// [Options.Drain] is over, or ctx ends. [Gateway.Close] is to follow.
func (g *Gateway) Drain(ctx context.Context) {
	if g.opts.Drain <= 0 {
		return
	}
	began := time.Now()
	until := began.Add(g.opts.Drain)
	g.door.draining.until.Store(&until)
	g.table.drain()
	g.out.leave()
	untold := g.table.carried()
	g.log.Info("gateway drains", "gateway", g.opts.Name, "sessions", len(untold), "until", until)
	untold = append(untold, g.table.spares()...) // they had better not come over
	tick := time.NewTicker(drainLook)
	defer tick.Stop()
	for {
		now := min(len(untold), drainPace)
		for _, s := range untold[:now] {
			s.carrier.Leave()
		}
		untold = untold[now:]
		if g.drained(time.Since(began)) {
			g.log.Info("gateway has drained", "gateway", g.opts.Name, "sessions", g.table.size())
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// drained reports whether there is nothing left to wait for.
func (g *Gateway) drained(since time.Duration) bool {
	carried := g.table.carried()
	switch {
	case len(carried) == 0 || since > g.opts.Drain+drainLinger:
		return true
	case since < drainSettle:
		return false
	}
	for _, s := range carried {
		if s.carrier.Connections() > 0 {
			return false
		}
	}
	return true
}

// serveTake makes this gateway the one that carries the session that asks; until now it stood by, unless the session is the successor of one
// that has ended. What the job has remembered of names stays right.
func (d *door) serveTake(r *http.Request, s *session) (any, error) {
	var req wire.InsideTake
	if r.ContentLength != 0 { // an earlier client's word is empty
		if err := decode(r.Body, &req); err != nil {
			return nil, err
		}
	}
	s.carrier.Restore(req.Names)
	if d.table.take(s) {
		d.log.Info("session taken over", "session", s.id, "repository", s.repo, "run_id", s.who.run)
		d.taken(wire.Taken{Session: s.id})
	}
	return d.serveMe(r, s)
}

// serveLeave answers once the session may go without cutting a connection, or when it has to. From then on no flow of it begins here
// for a moment.
func (d *door) serveLeave(r *http.Request, s *session) (any, error) {
	until := d.draining.until.Load()
	if until == nil {
		return nil, problem.New(problem.BadRequest, "the gateway is not about to stop", "stay")
	}
	ctx, cancel := context.WithTimeout(r.Context(), leaveWait)
	defer cancel()
	tick := time.NewTicker(drainLook)
	defer tick.Stop()
	for {
		open := s.carrier.HoldIfQuiet(leaveHold)
		if open == 0 || time.Now().After(*until) {
			return wire.Left{Go: true, Open: uint64(open)}, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return wire.Left{Open: uint64(open)}, nil
		}
	}
}
