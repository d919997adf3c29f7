package api

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/session"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// workTimeout bounds what one of a gateway's messages may take.
const workTimeout = 15 * time.Second

// loadEvery is how often a changed load is said: for each session it would be a write to the state for each join. Nor is anything else that
// changes said more often, whatever a gateway sends.
const loadEvery = 250 * time.Millisecond

// workRetry is how long whoever has found the state away waits before he goes on. It is away for a moment while its cluster elects a leader.
const workRetry = 250 * time.Millisecond

// take puts a gateway's message into the inbox and has somebody work it off. It waits for room, and says no once the stream is over.
func (s *stream) take(ctx context.Context, f wire.Frame) bool {
	switch f.Type {
	case wire.FrameEnd:
		s.load.Add(-1)
	case wire.FrameTaken:
		s.load.Add(1)
	}
	for {
		taken, line, starts := s.inbox.put(f)
		if starts {
			s.workers.Go(func() { s.work(ctx, line) })
		}
		if taken {
			return true
		}
		select {
		case <-s.inbox.room:
		case <-time.After(workRetry): // there may be room in the inboxes of others with the same enrolment
		case <-s.over:
			return false
		}
	}
}

// work works lines of the inbox off, until there are none or the stream is over.
func (s *stream) work(ctx context.Context, line string) {
	for more := true; more; {
		f := s.inbox.first(line)
		again := s.judge(f, s.workOne(ctx, f))
		wait := time.Duration(0)
		if again {
			wait = workRetry
		}
		select {
		case <-s.over:
			return
		case <-time.After(wait):
		}
		line, more = s.inbox.done(line, again)
	}
}

// judge looks at what became of a message, and reports whether it has to be worked on again: what must not be lost is, for as long as the
// stream lasts. It is not ended for that. The gateway would come back with whole state, which is more work for a state that is away.
func (s *stream) judge(f wire.Frame, err error) (again bool) {
	switch {
	case err == nil:
	case errors.Is(err, session.ErrResync):
		s.end(resync)
	case problem.Temporary(err) && (asserted(f) || f.Type == wire.FrameFlows):
		return true
	default:
		s.log.Warn("gateway's message refused", "type", f.Type, "code", problem.CodeOf(err), "err", err)
	}
	return false
}

func (s *stream) workOne(ctx context.Context, f wire.Frame) error {
	ctx, cancel := context.WithTimeout(ctx, workTimeout)
	defer cancel()
	switch f.Type {
	case wire.FrameRenewed:
		var r wire.Renewed
		if err := parse(f, &r); err != nil {
			return err
		}
		return s.api.opts.Sessions.Renewed(ctx, s.who, r)
	case wire.FrameEnd:
		var e wire.End
		if err := parse(f, &e); err != nil {
			return err
		}
		return s.api.opts.Sessions.Ended(ctx, s.who, e)
	case wire.FrameTaken:
		var t wire.Taken
		if err := parse(f, &t); err != nil {
			return err
		}
		return s.api.opts.Sessions.Taken(ctx, s.who, t)
	case wire.FrameCandidates:
		var t wire.Trickle
		if err := parse(f, &t); err != nil {
			return err
		}
		s.moved(t)
	case wire.FrameFlows:
		var batch wire.Flows
		if err := parse(f, &batch); err != nil {
			return err
		}
		return s.recordFlows(ctx, batch)
	case wire.FrameCredential:
		var c wire.Credential
		if err := parse(f, &c); err != nil {
			return err
		}
		return s.prove(ctx, c)
	case wire.FrameLeaving:
		s.mu.Lock()
		s.presence.Leaving = true
		s.mu.Unlock()
		s.log.Info("gateway is leaving")
		s.changed()
	}
	return nil
}

// prove takes a gateway's fresh credential. One that is refused changes nothing: the last one holds until it runs out.
func (s *stream) prove(ctx context.Context, c wire.Credential) error {
	if !s.proofs.Allow() {
		return problem.New(problem.RateLimited, "the gateway proves too often who it is", "send a credential when its file has changed")
	}
	e, err := s.api.enrolledBy(ctx, s.network, c.Authorization.Reveal())
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.enrolled = e
	s.mu.Unlock()
	s.log.Debug("gateway has proven again who it is", "expires", e.expires)
	return nil
}

// enrolledIn reports whether a configuration still knows the enrolment.
func (s *stream) enrolledIn(c *config.Config) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return enrolledIn(c, s.network, s.enrolled.Enrolment)
}

// runOut reports whether the credential has expired, and the time to send another one is over.
func (s *stream) runOut(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.enrolled.expires.IsZero() && now.After(s.enrolled.expires.Add(s.api.opts.ExpiryLeeway))
}

func parse(f wire.Frame, v any) error {
	if err := json.Unmarshal(f.Body, v); err != nil {
		return problem.Wrap(err, problem.BadRequest, "a frame's body does not parse", "update the gateway")
	}
	return nil
}

// recordFlows stores a batch of flow records and lets the gateway forget it. What came already on this stream is only
// acknowledged.
func (s *stream) recordFlows(ctx context.Context, f wire.Flows) error {
	if f.Seq > s.flows {
		if err := s.api.opts.Sessions.Flows(ctx, s.who, f); err != nil {
			return err
		}
		s.flows = f.Seq
	}
	raw, err := json.Marshal(wire.FlowsAck{Seq: s.flows})
	if err != nil {
		return err
	}
	return s.enqueue(wire.Frame{Type: wire.FrameFlowsAck, Body: raw})
}

// moved takes the gateway's new candidates and mapping; joins from now on are told these.
func (s *stream) moved(t wire.Trickle) {
	s.mu.Lock()
	s.presence.Candidates, s.presence.Mapping = usable(t.Candidates), sane(t.Mapping)
	s.mu.Unlock()
	s.changed()
}

// changed has the keeper say soon what is new.
func (s *stream) changed() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// keep says again and again that the gateway is live, and finds out when it no longer is.
func (s *stream) keep(ctx context.Context) error {
	pings := time.NewTicker(s.api.opts.PingEvery)
	defer pings.Stop()
	presences := time.NewTicker(s.api.opts.PresenceEvery)
	defer presences.Stop()
	loads := time.NewTicker(loadEvery)
	defer loads.Stop()
	pinged := make(chan error, 1)
	pinging := false
	s.announce(ctx)
	news, last := false, time.Now()
	for {
		select {
		case <-s.over:
			if pinging {
				<-pinged
			}
			return nil
		case <-s.kick:
			if news = time.Since(last) < loadEvery; !news {
				s.announce(ctx)
				last = time.Now()
			}
		case <-loads.C:
			if news || s.load.Load() != s.said.Load() {
				s.announce(ctx)
				news, last = false, time.Now()
			}
		case <-presences.C:
			if s.runOut(s.api.opts.Now()) {
				return expired
			}
			s.load.Store(int64(s.api.opts.Sessions.Held(s.who.Instance)))
			s.announce(ctx)
			s.renewStanding()
		case <-pings.C:
			if !pinging {
				pinging = true
				go func() { pinged <- s.ping(ctx) }()
			}
		case err := <-pinged:
			pinging = false
			if err != nil {
				return silent
			}
		}
	}
}

// standing gives the gateway's ticket for relays and notes when the next one is due. nil where there is none to give.
func (s *stream) standing() *wire.Standing {
	if s.api.opts.Standing == nil || len(s.api.rules.Load().Relays) == 0 {
		return nil
	}
	t, err := s.api.opts.Standing(s.presence.Key)
	if err != nil {
		s.log.Warn("the gateway gets no ticket to keep relays ready with", "err", err)
		return nil
	}
	s.renew = s.api.opts.Now().Add(time.Duration(t.Life) / 3)
	return &t
}

// renewStanding sends the gateway a fresh ticket for relays when a third of the last one's life is over.
func (s *stream) renewStanding() {
	if s.api.opts.Now().Before(s.renew) {
		return
	}
	t := s.standing()
	if t == nil {
		return
	}
	if raw, err := json.Marshal(t); err == nil {
		_ = s.enqueue(wire.Frame{Type: wire.FrameStanding, Body: raw}) // else the stream is over
	}
}

func (s *stream) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.api.opts.PingEvery)
	defer cancel()
	return s.conn.Ping(ctx)
}

// announce writes the gateway's presence.
func (s *stream) announce(ctx context.Context) {
	s.mu.Lock()
	p := s.presence
	s.mu.Unlock()
	p.Counted = s.api.opts.Now()
	load := s.load.Load()
	s.said.Store(load)
	p.Sessions = max(0, int(load))
	ctx, cancel := context.WithTimeout(ctx, s.api.opts.PresenceEvery)
	defer cancel()
	if err := s.api.opts.Store.PutPresence(ctx, p, s.api.opts.PresenceTTL); err != nil && ctx.Err() == nil {
		s.log.Warn("gateway's presence not written", "err", err)
	}
}
