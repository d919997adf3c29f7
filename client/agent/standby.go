package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"time"

	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	// standbyLost is how long a standby may be without a path, while the session has one, before another is asked for.
	standbyLost = 10 * time.Second
	// standbyAgain is how often a coordinator is asked again that had no other gateway.
	standbyAgain = 30 * time.Second
	// tokenReuse is how old a token may be that is shown once more.
	tokenReuse = 2 * time.Minute
	takeTries  = 8 // to tell a gateway that it carries the session now
)

// companion looks after a second gateway that holds the session as well: it asks for one, keeps it ready, and moves the session there
// when the first is lost or about to stop. All of that is done by one goroutine, [session.accompany].
//
//	nobody ──asked for──► standing by ──first lost, or leaving──► carries the session; nobody stands by
//	   ▲                       │
//	   └──── lost, leaving ────┘
type companion struct {
	way   *way // that stands by; nil for nobody. Guarded by the session's mu
	kick  chan struct{}
	asked bool // since the last renewal. Guarded by the session's mu

	not   []wire.Key // gateways that could not be reached
	pause backoff
	again *alarm
	lost  *alarm
	going chan going // answers of a gateway that is left
	leave bool       // such an answer is awaited
}

// going is a gateway's word that the session may go, or that it need not be asked any longer.
type going struct {
	from *way
	cut  bool // connections are cut then
}

func newCompanion() *companion {
	return &companion{asked: true, kick: make(chan struct{}, 1), again: newAlarm(), lost: newAlarm(), going: make(chan going, 1)}
}

// accompany keeps a standby for as long as the session lasts.
func (s *session) accompany(ctx context.Context) error {
	c := s.companion
	defer c.again.stop()
	defer c.lost.stop()
	if s.Standby {
		c.again.set(time.Now())
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.kick:
		case <-c.again.C():
			c.again.clear()
			s.findStandby(ctx)
		case <-c.lost.C():
			c.lost.clear()
			s.dropStandby("there is no path to it")
		case g := <-c.going:
			c.leave = false
			if s.uses(g.from) { // else it was lost meanwhile, and who carries the session now has not said that
				s.takeOver("its gateway is about to stop", g.cut)
			}
		}
		s.look(ctx)
	}
}

// look decides what is to be done, after anything has changed.
func (s *session) look(ctx context.Context) {
	c := s.companion
	s.mu.Lock()
	carrier := s.way
	first, second := *carrier, way{}
	spare := c.way
	if spare != nil {
		second = *spare
	}
	asked := c.asked
	c.asked = true
	s.mu.Unlock()
	if spare == nil {
		if (!asked || first.left) && !c.again.on {
			c.again.set(time.Now())
		}
		return
	}
	c.lost.hold(!second.up && first.up, standbyLost)
	switch {
	case second.left:
		s.dropStandby("it is about to stop")
	case second.up && first.met && !first.up:
		s.takeOver("the path to its gateway is lost", true)
	case second.up && first.left && !c.leave:
		c.leave = true
		s.start(func(ctx context.Context) error {
			select {
			case c.going <- going{carrier, s.askLeave(ctx, carrier)}:
			case <-ctx.Done():
			}
			return nil
		})
	}
}

// takeOver moves the session to its standby, if there is one with a path, and looks for the next.
func (s *session) takeOver(why string, cut bool) {
	s.mu.Lock()
	w := s.companion.way
	ready := w != nil && w.up
	s.mu.Unlock()
	if !ready {
		return
	}
	began := time.Now()
	if err := s.move(w, cut); err != nil {
		s.cancel(problem.Wrap(err, problem.Failed, "the session cannot move to its standby gateway: "+err.Error(), "look at the log for more"))
		return
	}
	s.agent.note(control.Up, fmt.Sprintf("moved to gateway %s: %s", w.gateway.Name, why))
	s.agent.log.Warn("moved to the standby gateway", "session", s.ID, "gateway", w.gateway.Name, "reason", why, "took", time.Since(began))
	s.companion.not, s.companion.pause = nil, backoff{}
	s.companion.again.set(time.Now().Add(time.Second)) // where the first has died, the coordinator has noticed by then
	s.start(func(ctx context.Context) error {
		s.take(ctx)
		return nil
	})
}

// take tells the gateway that it carries the session now, and what the job has heard of names.
func (s *session) take(ctx context.Context) {
	var pause backoff
	var err error
	for range takeTries {
		var me wire.InsideSession
		if err = s.post(ctx, wire.PathTake, wire.InsideTake{Names: s.agent.granted.Heard()}, &me); err == nil || pause.wait(ctx) != nil {
			return
		}
	}
	s.agent.log.Warn("the new gateway does not know that it carries the session", "session", s.ID, "err", err)
}

// uses reports whether a way carries the session.
func (s *session) uses(w *way) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.way == w
}

// askLeave asks a gateway that is about to stop until the session may go, and says whether connections are cut then.
func (s *session) askLeave(ctx context.Context, from *way) (cut bool) {
	var pause backoff
	for s.uses(from) {
		var left wire.Left
		err := s.post(ctx, wire.PathLeave, struct{}{}, &left)
		switch {
		case err == nil && left.Go:
			return left.Open > 0
		case err == nil: // it has taken its time to say so, as long as it is honest
			pause = backoff{}
		case ctx.Err() != nil || !errors.Is(err, errSilent):
			return true
		}
		if pause.wait(ctx) != nil {
			return true
		}
	}
	return true
}

// findStandby asks for a second gateway.
func (s *session) findStandby(ctx context.Context) {
	c := s.companion
	s.mu.Lock()
	have, wanted := c.way != nil, s.Standby || s.way.left
	s.mu.Unlock()
	if have {
		return
	}
	err := s.addStandby(ctx)
	later := standbyAgain + rand.N(standbyAgain/2)
	switch code := problem.CodeOf(err); {
	case err == nil:
		c.pause = backoff{}
		return
	case ctx.Err() != nil || forgotten(err):
		return // the keeper sees to that
	case problem.Temporary(err) && code != problem.NoGateway:
		c.again.set(time.Now().Add(c.pause.next()))
	case wanted || len(c.not) > 0: // else with the next renewal
		c.not = nil
		c.again.set(time.Now().Add(later))
	}
	s.agent.log.Info("no standby gateway", "session", s.ID, "code", problem.CodeOf(err), "err", err)
}

// addStandby is one try to get a second gateway. What it says of itself is held against the same rules as the first one's.
func (s *session) addStandby(ctx context.Context) error {
	a := s.agent
	token, err := s.recentToken(ctx)
	if err != nil {
		return err
	}
	found := s.gather.all()
	answer, err := a.api.standby(ctx, s.ID, s.Secret, wire.StandbyRequest{
		Token: token, Candidates: found.Candidates, Mapping: found.Mapping, Relays: nearest(a.tunnel), Only: a.opts.Pins[:min(len(a.opts.Pins), wire.MaxCandidates)], Not: s.companion.not,
	})
	if err != nil {
		return err
	}
	gw := answer.Gateway
	if err := checkStandby(gw, s.key.Public(), answer.Relays); err != nil {
		return err
	}
	first, peer := s.at()
	if pins := a.opts.Pins; len(pins) > 0 && !slices.Contains(pins, gw.Key) || gw.Key == first.Key {
		return problem.New(problem.GatewayKey, fmt.Sprintf("the standby gateway %q has another key than the pinned ones, or the first one's", gw.Name),
			"the session goes on without a standby; compare --gateway-key with what the gateway prints at its start")
	}
	w := &way{gateway: gw, id: wire.StandbyID(s.key.Public(), gw.Key), granted: map[string]bool{}}
	w.peer, err = a.tunnel.AddPeer(s.events(w, tunnel.PeerOptions{Key: gw.Key, Session: w.id, Candidates: gw.Candidates, Initiate: true}))
	if err != nil {
		return problem.Wrap(err, problem.Failed, "the standby gateway cannot be put in place: "+err.Error(), "")
	}
	s.mu.Lock()
	s.companion.way = w
	s.mu.Unlock()
	peer.SetSuccessor(w.peer)
	s.ticketsFor(w, answer.Relays)
	a.log.Info("a standby gateway holds the session too", "session", s.ID, "gateway", gw.Name)
	return nil
}

// ticketsFor lets a standby's peer use the relays that there are tickets for.
func (s *session) ticketsFor(w *way, grants []wire.RelayGrant) {
	for _, g := range grants {
		if len(s.gather.sound([]wire.Relay{g.Relay})) != 1 || len(g.Ticket) > maxTicket {
			continue
		}
		w.granted[g.Name] = true
		s.start(func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, stunLimit)
			defer cancel()
			w.peer.AddRelays([]tunnel.Grant{{
				Relay: s.gather.relay(ctx, g.Relay), Ticket: g.Ticket, Expires: time.Now().Add(ticketLife),
			}})
			return nil
		})
	}
}

// dropStandby lets a standby go and looks for another.
func (s *session) dropStandby(why string) {
	s.mu.Lock()
	w := s.companion.way
	s.companion.way = nil
	peer := s.peer
	s.mu.Unlock()
	if w == nil {
		return
	}
	peer.SetSuccessor(nil)
	s.agent.tunnel.RemovePeer(w.peer)
	s.companion.lost.clear()
	if len(s.companion.not) < wire.MaxCandidates {
		s.companion.not = append(s.companion.not, w.gateway.Key)
	}
	s.companion.again.set(time.Now())
	s.agent.log.Info("the standby gateway is let go", "session", s.ID, "gateway", w.gateway.Name, "reason", why)
}

// renewed has a session without a standby ask for one again.
func (s *session) renewed() {
	s.mu.Lock()
	s.companion.asked = false
	s.mu.Unlock()
	s.poke()
}

// checkStandby refuses an answer that no coordinator in its right mind gives.
func checkStandby(gw wire.Gateway, key wire.Key, relays []wire.RelayGrant) error {
	if len(relays) > wire.MaxRelays {
		return senseless("it gives tickets for too many relays")
	}
	return checkGateway(gw, key)
}

// recentToken gives the last token once more while it is young, else a fresh one.
func (s *session) recentToken(ctx context.Context) (wire.Secret, error) {
	s.mu.Lock()
	token, young := s.token, time.Since(s.tokenAt) < tokenReuse
	s.mu.Unlock()
	if token != "" && young {
		return token, nil
	}
	return s.freshToken(ctx)
}

// freshToken asks the issuer for a token.
func (s *session) freshToken(ctx context.Context) (wire.Secret, error) {
	token, err := s.agent.tokens.Token(ctx, wire.Audience(s.agent.opts.Coordinator, s.key.Public()))
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	s.token, s.tokenAt = token, time.Now()
	s.mu.Unlock()
	return token, nil
}

// standby asks for a second gateway.
func (c *coordinator) standby(ctx context.Context, id string, secret wire.Secret, r wire.StandbyRequest) (wire.Standby, error) {
	var out wire.Standby
	err := c.call(ctx, http.MethodPost, wire.PathSessions+"/"+id+wire.PathStandby, secret, r, &out)
	return out, err
}
