package session

import (
	"context"
	"fmt"
	"slices"

	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	reasonMoved     = "the session has moved to another gateway"
	reasonWithdrawn = "the offer was withdrawn"
	reasonReplaced  = "another gateway stands by now"
)

// Standby has a second gateway hold a running session, for its owner. That gateway gets the token and judges for itself. One that stood
// by before is replaced. Errors are *problem.Error; code [problem.NoGateway]: the network has no other gateway.
func (m *Manager) Standby(ctx context.Context, id string, secret wire.Secret, r wire.StandbyRequest) (wire.Standby, error) {
	if err := checkStandby(r); err != nil {
		return wire.Standby{}, err
	}
	l, err := m.authenticate(ctx, id, secret)
	if err != nil {
		return wire.Standby{}, err
	}
	if m.unanswered(l) {
		return wire.Standby{}, problem.New(problem.GatewayTimeout, "the session is still being offered", "try again in a few seconds")
	}
	others := m.others(l, r)
	if len(others) == 0 {
		return wire.Standby{}, problem.New(problem.NoGateway, fmt.Sprintf("network %q has no other gateway for the session", l.Network),
			"start another one; the session goes on without")
	}
	rules := m.Rules()
	c, err := m.rejudge(ctx, rules, l, r.Token)
	if err != nil {
		return wire.Standby{}, err
	}
	if err := m.joins.look(c); err != nil { // it costs the gateways what a join does
		return wire.Standby{}, err
	}
	m.joins.charge(c)
	return m.placeStandby(ctx, m.standbyFor(l, r, rules, c), others)
}

func checkStandby(r wire.StandbyRequest) error {
	if max(len(r.Not), len(r.Only)) > wire.MaxCandidates {
		return problem.New(problem.TooLarge, fmt.Sprintf("more than %d gateways are ruled out or in", wire.MaxCandidates), "update the client; if it is up to date, report this")
	}
	return checkJoin(&Join{JoinRequest: wire.JoinRequest{
		Key: wire.Key{1}, Token: r.Token, Candidates: r.Candidates, Mapping: r.Mapping, Relays: r.Relays,
	}})
}

// others are the gateways that may stand by for a session, best first.
func (m *Manager) others(l state.Lease, r wire.StandbyRequest) []state.Presence {
	list := slices.DeleteFunc(m.opts.Store.Gateways(l.Network), func(g state.Presence) bool {
		return g.Instance == l.Gateway || slices.Contains(r.Not, g.Key) || len(r.Only) > 0 && !slices.Contains(r.Only, g.Key)
	})
	return m.spread(l.Session, list)
}

// standbyFor is a running session as a join that is being placed.
func (m *Manager) standbyFor(l state.Lease, r wire.StandbyRequest, rules Rules, c *claims.Claims) *admission {
	j := &Join{JoinRequest: wire.JoinRequest{Network: l.Network, Key: l.Key, Token: r.Token, Candidates: r.Candidates, Mapping: r.Mapping}}
	return &admission{
		join: j, rules: rules, network: rules.Config.Networks[l.Network], claims: c, lease: l, standby: true,
		decision: policy.Decision{Allowed: true, Rules: l.Rules, Grants: l.Grants},
		relays:   pick(r.Relays, rules.Relays), logger: m.logOf(l),
	}
}

// placeStandby offers a running session to other gateways, best first, until one is ready for it.
func (m *Manager) placeStandby(ctx context.Context, a *admission, others []state.Presence) (wire.Standby, error) {
	var refusal error
	for _, g := range others {
		a.way = wire.StandbyID(a.lease.Key, g.Key)
		answer, err := m.offer(ctx, a, g)
		if err == nil {
			return m.settleStandby(ctx, a, g, answer)
		}
		m.tell(ctx, g.Instance, wire.FrameEnd, wire.End{Session: a.lease.Session, Reason: reasonWithdrawn})
		a.log().Warn("standby offer failed", "standby", g.Name, "code", problem.CodeOf(err), "err", err)
		refusal = worse(refusal, err)
		if ctx.Err() != nil {
			return wire.Standby{}, gone(ctx, refusal)
		}
	}
	return wire.Standby{}, refusal
}

// settleStandby writes down who stands by.
func (m *Manager) settleStandby(ctx context.Context, a *admission, g state.Presence, answer wire.Answer) (wire.Standby, error) {
	before, moved := "", false
	l, err := m.change(ctx, a.lease.Session, func(l *state.Lease) bool {
		before, moved = l.Standby, l.Gateway != a.lease.Gateway
		l.Standby, l.StandbyName = g.Instance, g.Name
		return l.Over == "" && !moved
	})
	if moved {
		err = problem.New(problem.GatewayTimeout, "the session has moved meanwhile", "ask again")
	}
	if err != nil {
		m.tell(ctx, g.Instance, wire.FrameEnd, wire.End{Session: a.lease.Session, Reason: reasonWithdrawn})
		return wire.Standby{}, err
	}
	if before != "" && before != g.Instance {
		m.tell(ctx, before, wire.FrameEnd, wire.End{Session: l.Session, Reason: reasonReplaced})
	}
	a.log().Info("session has a standby", "standby", g.Name)
	return wire.Standby{Gateway: *answer.Gateway, Relays: m.tickets(a, relay.Client, l.Key)}, nil
}

// Taken takes a gateway's word that a session, for which it stood by, uses it from now on. The former gateway, if it is still there,
// lets go of it.
func (m *Manager) Taken(ctx context.Context, g Gateway, t wire.Taken) error {
	l, err := m.heldBy(ctx, g, t.Session)
	if err != nil || l.Gateway == g.Instance && l.Standby != g.Instance {
		return err
	}
	return m.move(ctx, l, byGateway)
}

// move makes the standby of a lease, as it was read, the gateway that carries it.
func (m *Manager) move(ctx context.Context, l state.Lease, by string) error {
	from, to, moved := l.Gateway, l.Standby, false
	l, err := m.change(ctx, l.Session, func(l *state.Lease) bool {
		if moved = l.Standby == to; moved {
			l.Move()
		}
		return l.Over == ""
	})
	if err != nil || !moved {
		return err
	}
	if from != to {
		m.tell(ctx, from, wire.FrameEnd, wire.End{Session: l.Session, Reason: reasonMoved})
	}
	r := recordOf(audit.Moved, l)
	r.Succeeded()
	r.Unmapped.By = by
	m.audited(ctx, r)
	m.logOf(l).Info("session moved to its standby", "by", by)
	return nil
}

// alone notes that nobody stands by for a session any more.
func (m *Manager) alone(ctx context.Context, id, standby string) error {
	_, err := m.change(ctx, id, func(l *state.Lease) bool {
		if l.Standby == standby {
			l.Standby, l.StandbyName = "", ""
		}
		return l.Over == ""
	})
	if problem.CodeOf(err) == problem.SessionOver {
		return nil
	}
	return err
}
