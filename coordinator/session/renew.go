package session

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// Why sessions end, as gateways and clients read it.
const (
	endedByClient  = "ended by the client"
	endedByPolicy  = "policy no longer gives what the session holds"
	endedByRestart = "its gateway was restarted"
	endedUnheld    = "its gateway does not hold it"
	endedByLease   = "its lease ran out"
	endedByBreak   = "its gateway's stream broke before the join was through"
	endedByTime    = "the longest time that a session may last is over"
)

// updateTries bounds how often a lease that others write too is read again.
const updateTries = 5

// Update takes what a session's owner sends later: candidates and mapping, which go on to the gateway, or a fresh token, which renews.
// Errors are *problem.Error; an unknown session and a wrong secret look the same.
func (m *Manager) Update(ctx context.Context, id string, secret wire.Secret, u wire.Update) (wire.Lease, error) {
	if err := checkFound(u.Candidates, u.Mapping); err != nil {
		return wire.Lease{}, err
	}
	if err := checkToken(u.Token); err != nil {
		return wire.Lease{}, err
	}
	l, err := m.authenticate(ctx, id, secret)
	if err != nil {
		return wire.Lease{}, err
	}
	if len(u.Candidates) > 0 || u.Mapping != wire.MappingUnknown {
		if err := m.passOn(ctx, l, u); err != nil {
			return wire.Lease{}, err
		}
	}
	if u.Token == "" {
		return wire.Lease{Expires: l.Expires, Ends: l.Ends}, nil
	}
	return m.renew(ctx, l, u.Token)
}

// passOn tells the session's gateway what its client has found later.
func (m *Manager) passOn(ctx context.Context, l state.Lease, u wire.Update) error {
	if m.holdFound(l.Session, u.Candidates, u.Mapping) {
		return nil
	}
	found := wire.Trickle{Session: l.Session, Candidates: u.Candidates, Mapping: u.Mapping}
	m.tell(ctx, l.Standby, wire.FrameCandidates, found) // by whatever it has, it is no worse than before
	if !m.tell(ctx, l.Gateway, wire.FrameCandidates, found) {
		return problem.New(problem.GatewayTimeout, "the session's gateway is not connected", "try again in a few seconds")
	}
	return nil
}

// renew judges a fresh token for a session and has its gateway judge it too.
func (m *Manager) renew(ctx context.Context, l state.Lease, token wire.Secret) (wire.Lease, error) {
	if m.unanswered(l) {
		return wire.Lease{}, problem.New(problem.GatewayTimeout, "the session is still being offered", "try again in a few seconds")
	}
	rules := m.Rules()
	c, err := m.rejudge(ctx, rules, l, token)
	if err != nil {
		return wire.Lease{}, err
	}
	answer, err := m.ask(ctx, l.Gateway, wire.FrameRenew, wire.Renewed{Session: l.Session, Token: token})
	if err != nil {
		logRefusal(m.logOf(l), "renewal failed at the gateway", err)
		m.auditRefusal(ctx, l, err)
		return wire.Lease{}, err
	}
	l, err = m.extend(ctx, l, c, rules)
	if err != nil {
		return wire.Lease{}, err
	}
	if err := m.opts.Audit.Record(ctx, renewed(l, byClient)); err != nil {
		return wire.Lease{}, err
	}
	m.tell(ctx, l.Standby, wire.FrameRenewed, wire.Renewed{Session: l.Session, Token: token})
	m.logOf(l).Info("session renewed", "by", "client", "expires", l.Expires)
	if answer.Lease != nil {
		return *answer.Lease, nil
	}
	return wire.Lease{Expires: l.Expires, Ends: l.Ends}, nil
}

// rejudge verifies a renewal's token and holds it against identity and policy. A session that policy no longer carries is
// ended here.
func (m *Manager) rejudge(ctx context.Context, rules Rules, l state.Lease, token wire.Secret) (*claims.Claims, error) {
	c, err := rules.Verifier.Verify(ctx, token.Reveal(), wire.Audience(rules.Config.URL, l.Key))
	if err != nil {
		logRefusal(m.logOf(l), "renewal refused", err)
		m.auditRefusal(ctx, l, err)
		return nil, err
	}
	if !sameJob(l.Claims, c) || c.IssuedAt.Before(l.Issued) {
		err := problem.New(problem.TokenInvalid, "the token is another job's, or older than the last one",
			"renew with a fresh token of the job that began the session")
		logRefusal(m.logOf(l), "renewal refused", err)
		m.auditRefusal(ctx, l, err)
		return nil, err
	}
	if reason := m.outgrown(rules, l, c); reason != "" {
		_ = m.finish(ctx, l, reason, byCoordinator) // logged there
		return nil, endedNow(rules.Config.Policy.Evaluate(m.opts.Now(), l.Network, c), reason)
	}
	return c, nil
}

// endedNow tells a session's owner that its renewal became its end.
func endedNow(d policy.Decision, reason string) error {
	e := problem.New(problem.SessionOver, "the session has ended: "+reason, "join again")
	if reason == endedByPolicy {
		e.Code, e.Denial, e.Next = problem.Denied, d.Denial, "ask whoever runs the coordinator whether the rules changed"
	}
	return e
}

// outgrown says why the rules in force no longer carry a session, or "". Grants are compared as they are written: a
// session that holds a line which no rule gives any more is over, also where another line would cover it.
func (m *Manager) outgrown(rules Rules, l state.Lease, c policy.Claims) string {
	d := rules.Config.Policy.Evaluate(m.opts.Now(), l.Network, c)
	if !d.Allowed {
		return endedByPolicy
	}
	for _, held := range l.Grants {
		if !slices.ContainsFunc(d.Grants, func(g wire.Grant) bool { return g.Allow == held.Allow && g.Observe == held.Observe }) {
			return endedByPolicy
		}
	}
	if !m.opts.Now().Before(l.Created.Add(d.MaxSession)) || !m.opts.Now().Before(l.Ends) {
		return endedByTime
	}
	return ""
}

// extend gives a session, as it was read, another lease.
func (m *Manager) extend(ctx context.Context, read state.Lease, c *claims.Claims, rules Rules) (state.Lease, error) {
	return m.changeRead(ctx, read, func(l *state.Lease) bool {
		if l.Over != "" {
			return false
		}
		l.Expires = m.deadline(rules.Config.Lease, l.Ends)
		if c.IssuedAt.After(l.Issued) {
			l.Issued = c.IssuedAt
		}
		if len(l.Claims) == 0 {
			l.Claims = remember(c, rules.Config)
		}
		return true
	})
}

// change reads a lease, changes it and writes it back, again where somebody else wrote in between. A change that says
// false leaves the lease alone and means that the session is over.
func (m *Manager) change(ctx context.Context, id string, edit func(*state.Lease) bool) (state.Lease, error) {
	l, err := m.opts.Store.Lease(ctx, id)
	switch {
	case errors.Is(err, state.ErrNotFound):
		return l, sessionOver(err)
	case err != nil:
		return l, storeAway(err)
	}
	return m.changeRead(ctx, l, edit)
}

// changeRead is change for a lease that was just read.
func (m *Manager) changeRead(ctx context.Context, l state.Lease, edit func(*state.Lease) bool) (state.Lease, error) {
	id, err := l.Session, error(nil)
	for try := range updateTries {
		if try > 0 {
			l, err = m.opts.Store.Lease(ctx, id)
		}
		if errors.Is(err, state.ErrNotFound) || (err == nil && !edit(&l)) {
			return l, sessionOver(err)
		}
		if err != nil {
			return l, storeAway(err)
		}
		l, err = m.opts.Store.UpdateLease(ctx, l)
		if err == nil {
			return l, nil
		}
		if !errors.Is(err, state.ErrConflict) && !errors.Is(err, state.ErrNotFound) {
			break
		}
	}
	return state.Lease{}, storeAway(err)
}

func sessionOver(err error) error {
	return problem.Wrap(err, problem.SessionOver, "the session has ended", "join again")
}

// End ends a session for its owner.
func (m *Manager) End(ctx context.Context, id string, secret wire.Secret) error {
	l, err := m.authenticate(ctx, id, secret)
	if err != nil {
		return err
	}
	return m.finish(ctx, l, endedByClient, byClient)
}

// finish ends a session, and its gateway is told. The lease stays as a memory of it until the gateway has surely heard: for
// Afterlife where its stream took the word, else until the gateway's own deadline. It is marked first: a gateway is quick to
// say that it has ended what it was told to end, and that must not look like an end of its own accord.
func (m *Manager) finish(ctx context.Context, l state.Lease, reason, by string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*cleanupTime)
	defer cancel()
	marked, err := m.change(ctx, l.Session, func(l *state.Lease) bool {
		before := l.Over
		l.Over = reason
		return before == ""
	})
	if problem.CodeOf(err) == problem.SessionOver {
		return nil
	}
	if err == nil { // another gateway may hold it since l was read
		l = marked
	}
	told := m.tell(ctx, l.Gateway, wire.FrameEnd, wire.End{Session: l.Session, Reason: reason})
	if l.Standby != "" {
		told = m.tell(ctx, l.Standby, wire.FrameEnd, wire.End{Session: l.Session, Reason: reason}) && told
	}
	if err != nil {
		m.logOf(l).Warn("session's end not kept", "err", fmt.Errorf("mark the lease: %w", errors.Unwrap(err)))
		return err
	}
	if soon := m.opts.Now().Add(m.opts.Afterlife); told && soon.Before(l.Expires) {
		_, _ = m.change(ctx, l.Session, func(l *state.Lease) bool { // gone already where the gateway has confirmed it
			l.Expires = soon
			return true
		})
	}
	m.auditEnd(ctx, l, reason, by)
	m.logOf(l).Info("session ended", "reason", reason, "told", told, "lasted", m.opts.Now().Sub(l.Created).Round(time.Second))
	return nil
}

// logOf gives a logger that names a lease's session and job.
func (m *Manager) logOf(l state.Lease) *slog.Logger {
	return m.log.With("session", l.Session, "network", l.Network, "gateway", l.GatewayName,
		"repository", l.Claims["repository"], "run_id", l.Claims["run_id"])
}
