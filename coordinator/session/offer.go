package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// cleanupTime bounds what is done for a session after its caller has gone.
const cleanupTime = 5 * time.Second

// place offers an admitted session to gateways, best first, until one takes it. Neither client nor gateway hears of it before it is safe.
func (m *Manager) place(ctx context.Context, a *admission, gateways []state.Presence, safe func(context.Context) error) (wire.Session, error) {
	if err := safe(ctx); err != nil {
		return wire.Session{}, storeAway(err)
	}
	if err := a.announce(gateways[0]); err != nil {
		return wire.Session{}, problem.Wrap(err, problem.Cancelled, "the client went away", "join again")
	}
	var refusal error
	for i, g := range gateways {
		if i > 0 {
			if err := m.passOver(ctx, a, g); err != nil {
				return wire.Session{}, err
			}
		}
		answer, err := m.offer(ctx, a, g)
		if err == nil {
			s, err := m.settle(ctx, a, g, answer)
			if err == nil && i > 0 {
				r := a.record(audit.Placed)
				r.Succeeded()
				m.opts.Audit.Note(r)
			}
			return s, err
		}
		a.asked = g.Instance
		a.log().Warn("offer failed", "gateway", g.Name, "code", problem.CodeOf(err), "err", err)
		refusal = worse(refusal, err)
		if ctx.Err() != nil {
			return wire.Session{}, gone(ctx, refusal)
		}
	}
	return wire.Session{}, refusal
}

// passOver leaves the gateway that was asked last for the next one. The lease names that first: the former says that the session is over, when it
// is told so, and what the gateway says that a lease names counts.
func (m *Manager) passOver(ctx context.Context, a *admission, next state.Presence) error {
	if a.named {
		if err := m.name(ctx, a, next); err != nil {
			return err
		}
	}
	m.tell(ctx, a.asked, wire.FrameEnd, wire.End{Session: a.lease.Session, Reason: reasonWithdrawn})
	a.asked = ""
	return nil
}

// name has the lease say that a gateway holds the session.
func (m *Manager) name(ctx context.Context, a *admission, g state.Presence) error {
	a.lease.Gateway, a.lease.GatewayName = g.Instance, g.Name
	a.lease.Expires = m.deadline(a.rules.Config.Lease, a.lease.Ends)
	l, err := m.opts.Store.UpdateLease(ctx, a.lease)
	if err == nil {
		err = m.opts.Store.Saving()(ctx) // a session that its job knows of outlives a loss of power
	}
	if err != nil {
		return m.unnamed(ctx, a, err)
	}
	a.lease = l
	return nil
}

// unnamed says why a lease could not be written, or is no longer as it was written.
func (m *Manager) unnamed(ctx context.Context, a *admission, err error) error {
	if errors.Is(err, state.ErrNotFound) || errors.Is(err, state.ErrConflict) {
		return m.endedBefore(ctx, a, err)
	}
	return storeAway(err)
}

// gone says why a join stopped before every gateway was asked.
func gone(ctx context.Context, refusal error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return refusal
	}
	return problem.Wrap(ctx.Err(), problem.Cancelled, "the client went away", "join again")
}

// announce tells the client what it will get from the gateway that is asked first.
func (a *admission) announce(g state.Presence) error {
	if a.join.Admitted == nil {
		return nil
	}
	s := a.session()
	s.Gateways = []wire.Gateway{{Name: g.Name, Key: g.Key, Addresses: a.network.Gateway(), Candidates: g.Candidates, Mapping: g.Mapping}}
	return a.join.Admitted(s)
}

// offer asks one gateway.
func (m *Manager) offer(ctx context.Context, a *admission, g state.Presence) (wire.Answer, error) {
	longest := a.lease.Ends.Sub(a.lease.Created)
	if a.standby { // what is left of the session
		longest = max(a.lease.Ends.Sub(m.opts.Now()), time.Second)
	} else {
		answered := m.placed.note(g.Instance)
		defer func() { answered(m.opts.Now()) }()
	}
	answer, err := m.ask(ctx, g.Instance, wire.FrameOffer, wire.Offer{
		Standby:    a.standby,
		Session:    a.lease.Session,
		Key:        a.lease.Key,
		Token:      a.join.Token,
		Addresses:  a.lease.Addresses,
		Candidates: a.join.Candidates,
		Mapping:    a.join.Mapping,
		Relays:     m.tickets(a, relay.Gateway, g.Key),
		Grants:     a.decision.Grants,
		Lease:      wire.Duration(a.rules.Config.Lease),
		MaxSession: wire.Duration(longest),
	})
	if err != nil {
		return answer, err
	}
	if answer.Gateway == nil || answer.Gateway.Key != g.Key {
		return answer, problem.New(problem.Incompatible, fmt.Sprintf("gateway %q answered without its key", g.Name), "update the gateway")
	}
	clean(answer.Gateway, g)
	return answer, nil
}

// clean bounds what a gateway says of itself to a client. Its name is the one that it is enrolled with.
func clean(w *wire.Gateway, g state.Presence) {
	w.Name = g.Name
	w.Candidates = slices.DeleteFunc(w.Candidates[:min(len(w.Candidates), wire.MaxCandidates)], func(c wire.Candidate) bool {
		return !c.Kind.Valid() || !c.Addr.IsValid() || c.Addr.Port() == 0
	})
	if !w.Mapping.Valid() {
		w.Mapping = wire.MappingUnknown
	}
}

// settle writes down who holds the session and gives the client the whole of it.
func (m *Manager) settle(ctx context.Context, a *admission, g state.Presence, answer wire.Answer) (wire.Session, error) {
	var err error
	if !a.named {
		err = m.name(ctx, a, g)
	} else if !m.opts.Store.Stands(a.lease) {
		err = m.endedBefore(ctx, a, state.ErrConflict)
	}
	if err != nil {
		m.tell(ctx, g.Instance, wire.FrameEnd, wire.End{Session: a.lease.Session, Reason: "the session could not be kept"})
		return wire.Session{}, err
	}
	l := a.lease
	if now := m.Rules(); now.Config != a.rules.Config { // a reload that did not see this lease yet
		if reason := m.outgrown(now, l, a.claims); reason != "" {
			_ = m.finish(ctx, l, reason, byCoordinator)
			return wire.Session{}, problem.New(problem.SessionOver, "the session has ended: "+reason, "join again")
		}
	}
	s := a.session()
	s.Gateways = []wire.Gateway{*answer.Gateway}
	if answer.Lease != nil {
		s.Expires, s.Ends = answer.Lease.Expires, answer.Lease.Ends
	}
	if late, ok := m.dropOffer(l.Session).later(l.Session); ok {
		m.tell(ctx, g.Instance, wire.FrameCandidates, late)
	}
	if a.logger.Enabled(ctx, slog.LevelInfo) {
		a.log().Info("session admitted", "gateway", g.Name, "rule", l.Rules, "addresses", l.Addresses, "client", a.join.Client,
			"ends", l.Ends)
	}
	return s, nil
}

// endedBefore says why a session could not be written down as held. Where its client, the policy or its time ended it, that stands. Else its gateway did, told by a
// node that could not keep it, or the gateway's stream broke, and the lease may be gone by now for that, or the state changed hands; then another join may do.
func (m *Manager) endedBefore(ctx context.Context, a *admission, err error) error {
	l, gone := m.opts.Store.Lease(ctx, a.lease.Session)
	if gone == nil && (l.Over == endedByClient || l.Over == endedByPolicy || l.Over == endedByTime) {
		return problem.Wrap(err, problem.SessionOver, "the session ended while it was being set up", "join again")
	}
	return problem.Wrap(err, problem.Unreachable, "the session could not be kept", "try again in a few seconds")
}

// worse gives the refusal that tells the job more: a gateway's own word before silence, the first of two alike.
func worse(first, second error) error {
	if first == nil || (problem.Temporary(first) && !problem.Temporary(second)) {
		return second
	}
	return first
}

// ask sends a frame that the gateway answers, and gives the answer. A problem in it is the error.
func (m *Manager) ask(ctx context.Context, instance string, t wire.FrameType, body any) (wire.Answer, error) {
	var answer wire.Answer
	msg, err := encode(t, body)
	if err != nil {
		return answer, err
	}
	ctx, cancel := context.WithTimeout(ctx, m.opts.OfferTimeout)
	defer cancel()
	reply, err := m.opts.Store.Ask(ctx, instance, msg)
	switch {
	case errors.Is(err, state.ErrAway), errors.Is(err, context.DeadlineExceeded):
		return answer, problem.Wrap(err, problem.GatewayTimeout, "the gateway did not answer in time", "try again; if it stays so, look at the gateway's log")
	case err != nil:
		return answer, storeAway(err)
	}
	if err := json.Unmarshal(reply, &answer); err != nil {
		return answer, problem.Wrap(err, problem.Incompatible, "the gateway's answer does not parse", "update the gateway")
	}
	if len(answer.Problem) > 0 {
		return answer, refusalOf(answer.Problem)
	}
	return answer, nil
}

// refusalOf is a gateway's problem document as an error.
func refusalOf(doc json.RawMessage) error {
	var p problem.Error
	if err := json.Unmarshal(doc, &p); err != nil || p.Message == "" {
		return problem.Wrap(err, problem.GatewayRefused, "the gateway said no without a reason that parses", "look at the gateway's log")
	}
	return &p
}

// tell sends a frame that nobody answers. It reports whether the gateway's stream took it. It works for a short time on
// even when ctx is over, because what it says is mostly that something is over.
func (m *Manager) tell(ctx context.Context, instance string, t wire.FrameType, body any) bool {
	msg, err := encode(t, body)
	if err != nil || instance == "" {
		return false
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	reply, err := m.opts.Store.Ask(ctx, instance, msg)
	if err != nil {
		return false
	}
	var answer wire.Answer
	return json.Unmarshal(reply, &answer) == nil && len(answer.Problem) == 0
}

func encode(t wire.FrameType, body any) ([]byte, error) {
	raw, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("encode a %s frame: %w", t, err)
	}
	return wire.Frame{Type: t, Body: raw}.Encode(), nil
}

// free removes a lease that no gateway holds, also for a caller that has gone.
func (m *Manager) free(ctx context.Context, id string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	if err := m.opts.Store.EndLease(ctx, id); err != nil {
		m.log.Warn("lease not freed; it will expire", "session", id, "err", err)
	}
}

// beginOffer notes that a join of this node is offering a session, or is about to, unless another one is.
func (m *Manager) beginOffer(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.offered[id] != nil {
		return false
	}
	m.offered[id] = &offered{}
	return true
}

// offering reports whether a join of this node is offering the session.
func (m *Manager) offering(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.offered[id] != nil
}

// unanswered reports whether no gateway has taken a session yet, as far as this node can tell.
func (m *Manager) unanswered(l state.Lease) bool { return l.Gateway == "" || m.offering(l.Session) }

// dropOffer ends that and gives what came meanwhile, nil where it has ended already.
func (m *Manager) dropOffer(id string) *offered {
	m.mu.Lock()
	defer m.mu.Unlock()
	o := m.offered[id]
	delete(m.offered, id)
	return o
}

// holdFound keeps what was found later for a session that is being offered here. ok is false where none is.
func (m *Manager) holdFound(id string, list []wire.Candidate, mapping wire.Mapping) (ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	o := m.offered[id]
	if o == nil {
		return false
	}
	room := wire.MaxCandidates - len(o.candidates)
	o.candidates = append(o.candidates, list[:min(len(list), room)]...)
	if mapping != wire.MappingUnknown {
		o.mapping = mapping
	}
	return true
}
