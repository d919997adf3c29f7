package session

import (
	"context"
	"errors"
	"log/slog"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// ErrResync asks that a gateway re-asserts its sessions: it speaks of one that is not known here.
var ErrResync = errors.New("session not known here; the gateway must say what it holds")

// Gateway names a gateway whose stream this node holds.
type Gateway struct {
	Network  string
	Name     string
	Instance string
}

// Reconcile holds what a gateway says that it holds against the store when its stream opens: sessions that the store does
// not know are adopted, and the ids of those that are over are returned. Leases of an earlier instance of the same gateway are
// ended, for their tunnels died with it, and so are leases that name it and that it does not hold. An error means that the store is away and nothing was decided.
func (m *Manager) Reconcile(ctx context.Context, g Gateway, held []wire.Held) (over []string, err error) {
	over, err = m.reconcile(ctx, g, held)
	if err == nil {
		m.buryPredecessor(ctx, g)
		m.buryUnheld(ctx, g, held)
	}
	return over, err
}

func (m *Manager) reconcile(ctx context.Context, g Gateway, held []wire.Held) (over []string, err error) {
	rules := m.Rules()
	network, ok := rules.Config.Networks[g.Network]
	if !ok {
		return nil, errors.New("the network is gone")
	}
	keep := make([]bool, len(held))
	work, ctx := errgroup.WithContext(ctx) // each asks the store, and a gateway may hold thousands
	work.SetLimit(64)
	for i, h := range held {
		work.Go(func() (err error) {
			keep[i], err = m.reconcileOne(ctx, g, rules, network, h)
			return err
		})
	}
	if err := work.Wait(); err != nil {
		return nil, err
	}
	for i, h := range held {
		if !keep[i] {
			over = append(over, h.Session)
		}
	}
	return over, nil
}

// reconcileOne decides whether a gateway keeps one session.
func (m *Manager) reconcileOne(ctx context.Context, g Gateway, rules Rules, n config.Network, h wire.Held) (keep bool, err error) {
	l, err := m.opts.Store.Lease(ctx, h.Session)
	if errors.Is(err, state.ErrNotFound) {
		return m.adopt(ctx, g, rules, n, h)
	}
	if err != nil {
		return false, err
	}
	switch {
	case l.Over != "":
		return false, m.opts.Store.EndLease(ctx, h.Session) // it has heard of it now
	case l.Network != g.Network || l.Key != h.Key || !slices.Equal(l.Addresses, h.Addresses):
		return false, nil
	case (l.Gateway == "" || l.Gateway == g.Instance) && m.offering(h.Session):
		return true, nil // a join is about to write its answer down, or to look whether the lease is as it was
	case l.Gateway == "":
		return m.disown(ctx, g, h.Session) // its node died while offering it, and the client never got an answer
	case l.Gateway != g.Instance && l.Standby != g.Instance:
		return m.reassert(ctx, g, l, h)
	}
	if l.Gateway != g.Instance && !h.Standby { // it was taken over while nobody could hear of it
		if err := m.move(ctx, l, byGateway); err != nil {
			return false, err
		}
	}
	if later := bounded(m, rules, h); later.Expires.After(l.Expires) {
		_, err = m.change(ctx, h.Session, func(l *state.Lease) bool { // it was renewed in the tunnel meanwhile
			l.Expires = later.Expires
			return l.Over == ""
		})
	}
	if problem.CodeOf(err) == problem.SessionOver {
		return false, nil
	}
	return err == nil, err
}

// disown ends a session that its join, on another node, has not written down yet: that join hears of it and fails for now. Without
// the mark its client would get a session that the gateway is about to drop. keep: the join was faster.
func (m *Manager) disown(ctx context.Context, g Gateway, id string) (keep bool, err error) {
	_, err = m.change(ctx, id, func(l *state.Lease) bool {
		keep = l.Gateway == g.Instance && l.Over == ""
		if l.Gateway != "" || l.Over != "" {
			return false
		}
		l.Over = endedByBreak
		return true
	})
	if problem.CodeOf(err) == problem.SessionOver {
		err = nil
	}
	return keep, err
}

// bounded is a gateway's word on how long a session lasts, within what any session may last.
func bounded(m *Manager, rules Rules, h wire.Held) wire.Lease {
	now := m.opts.Now()
	out := wire.Lease{Expires: h.Expires, Ends: h.Ends}
	if latest := now.Add(rules.Config.Lease); out.Expires.After(latest) {
		out.Expires = latest
	}
	if out.Ends.After(now.Add(maxHeld)) {
		out.Ends = now.Add(maxHeld)
	}
	if out.Expires.After(out.Ends) {
		out.Expires = out.Ends
	}
	return out
}

// maxHeld is the longest that an adopted session may still last: the longest job on a self-hosted runner.
const maxHeld = 20 * policy.DefaultMaxSession

// adopt takes a session up that only its gateway remembers.
func (m *Manager) adopt(ctx context.Context, g Gateway, rules Rules, n config.Network, h wire.Held) (keep bool, err error) {
	until := bounded(m, rules, h)
	if h.Key.IsZero() || h.Key.SessionID() != h.Session || !pool(n).Holds(h.Addresses) || !until.Expires.After(m.opts.Now()) {
		return false, nil
	}
	l, err := m.opts.Store.AdoptLease(ctx, state.Lease{
		Session:     h.Session,
		Network:     g.Network,
		Key:         h.Key,
		Addresses:   h.Addresses,
		Gateway:     g.Instance,
		GatewayName: g.Name,
		Standby:     standbyOf(g, h),
		Rules:       h.Rules,
		Created:     m.opts.Now(),
		Expires:     until.Expires,
		Ends:        until.Ends,
	})
	if errors.Is(err, state.ErrExists) {
		return false, m.unlessThere(ctx, h.Session)
	}
	if err != nil {
		return false, err
	}
	r := recordOf(audit.Adopted, l)
	r.Allowed(l.Rules)
	r.Unmapped.By = byGateway
	m.audited(ctx, r)
	m.logOf(l).Info("session adopted from its gateway", "expires", l.Expires)
	return true, nil
}

// unlessThere is nil where a session that cannot be adopted has no lease: another one has its address. Else it was there already when the store said that
// it was not, as a server of its cluster does that leads no longer and does not know yet; then nothing is decided.
func (m *Manager) unlessThere(ctx context.Context, id string) error {
	_, err := m.opts.Store.Lease(ctx, id)
	switch {
	case errors.Is(err, state.ErrNotFound):
		return nil
	case err != nil:
		return err
	}
	return errContradiction
}

var errContradiction = errors.New("the store has a session that it did not have before")

// standbyOf marks a session that only its standby has spoken of yet: that is both then, until the gateway that carries it comes.
func standbyOf(g Gateway, h wire.Held) string {
	if h.Standby {
		return g.Instance
	}
	return ""
}

// reassert decides on a session that a gateway holds and another one carries, by the store: one of the two may have been unknown
// when the other was adopted.
func (m *Manager) reassert(ctx context.Context, g Gateway, l state.Lease, h wire.Held) (keep bool, err error) {
	_, err = m.change(ctx, l.Session, func(l *state.Lease) bool {
		switch {
		case h.Standby && l.Standby == "":
			l.Standby, l.StandbyName = g.Instance, g.Name
		case !h.Standby && l.Standby == l.Gateway:
			l.StandbyName, l.Gateway, l.GatewayName = l.GatewayName, g.Instance, g.Name
		default:
			return false // another gateway holds it now
		}
		return l.Over == ""
	})
	if problem.CodeOf(err) == problem.SessionOver {
		return false, nil
	}
	return err == nil, err
}

// buryPredecessor ends the leases of a gateway's earlier instance, unless that one is live: two gateways of one name.
func (m *Manager) buryPredecessor(ctx context.Context, g Gateway) {
	live := map[string]bool{g.Instance: true}
	for _, p := range m.opts.Store.Gateways(g.Network) {
		live[p.Instance] = true
	}
	var dead, orphans []state.Lease
	m.opts.Store.LeasesWhere(func(h state.Head) bool {
		return h.Network == g.Network && h.GatewayName == g.Name && h.Gateway != "" && !live[h.Gateway]
	}, func(l state.Lease) bool {
		if m.offering(l.Session) {
			return true // its join asks another gateway
		}
		if l.Standby != l.Gateway && live[l.Standby] && l.Over == "" {
			orphans = append(orphans, l)
		} else {
			dead = append(dead, l)
		}
		return true
	})
	var ending errgroup.Group
	ending.SetLimit(64)
	for _, l := range dead {
		ending.Go(func() error {
			m.bury(ctx, l, endedByRestart)
			return nil
		})
	}
	for _, l := range orphans {
		ending.Go(func() error { return m.move(ctx, l, byCoordinator) })
	}
	_ = ending.Wait()
}

// buryUnheld ends leases that name a gateway which does not hold their sessions: this process died between a lease and its offer, or the gateway's word
// on an end was lost with a stream. Where there are other nodes, a lease names no gateway before that has taken the session, and theirs are not known here.
func (m *Manager) buryUnheld(ctx context.Context, g Gateway, held []wire.Held) {
	if !m.opts.Store.Sole() {
		return
	}
	holds := make(map[string]bool, len(held))
	for _, h := range held {
		holds[h.Session] = true
	}
	var ending errgroup.Group
	ending.SetLimit(64)
	m.opts.Store.LeasesWhere(func(h state.Head) bool { return h.Gateway == g.Instance && !h.Over }, func(l state.Lease) bool {
		if l.Network == g.Network && !holds[l.Session] && l.Standby == "" && !m.offering(l.Session) {
			ending.Go(func() error {
				m.bury(ctx, l, endedUnheld)
				return nil
			})
		}
		return true
	})
	_ = ending.Wait()
}

// bury ends a session whose gateway is gone, or does not have it.
func (m *Manager) bury(ctx context.Context, l state.Lease, reason string) {
	if l.Over == "" {
		m.auditEnd(ctx, l, reason, byCoordinator)
	}
	if err := m.opts.Store.EndLease(ctx, l.Session); err != nil {
		m.logOf(l).Warn("lease not freed; it will expire", "err", err)
		return
	}
	m.logOf(l).Info("session ended", "reason", reason)
}

// renewalsAtOnce is how many renewals in tunnels this node writes to the state at a time. Their leases last for minutes yet: where the state is slower
// than they come, they wait, and not the joins, which write to it too.
const renewalsAtOnce = 16

// Renewed takes a gateway's word that it renewed a session in the tunnel. The token is judged here as well: a session
// that policy no longer carries is ended. ErrResync: the session is not known here.
func (m *Manager) Renewed(ctx context.Context, g Gateway, r wire.Renewed) error {
	select {
	case m.turns <- struct{}{}:
	case <-ctx.Done():
		return storeAway(ctx.Err())
	}
	l, err := m.renewHeld(ctx, g, r)
	<-m.turns
	if err == nil {
		m.audited(ctx, renewed(l, byGateway))
		m.tell(ctx, l.Standby, wire.FrameRenewed, wire.Renewed{Session: l.Session, Token: r.Token})
		if m.log.Enabled(ctx, slog.LevelInfo) {
			m.logOf(l).Info("session renewed", "by", "gateway", "expires", l.Expires)
		}
	}
	return err
}

func (m *Manager) renewHeld(ctx context.Context, g Gateway, r wire.Renewed) (state.Lease, error) {
	// On a cluster its leader reads a lease from its file for whoever asks, so nobody does where memory says the same.
	l, ok := m.opts.Store.Recall(r.Session)
	if !ok || !holds(g, l) {
		var err error
		if l, err = m.heldBy(ctx, g, r.Session); err != nil {
			return l, err
		}
	}
	if err := checkToken(r.Token); err != nil {
		return l, err
	}
	rules := m.Rules()
	c, err := m.rejudge(ctx, rules, l, r.Token)
	if err != nil {
		return l, err
	}
	return m.extend(ctx, l, c, rules)
}

// heldBy reads the lease of a session that a gateway speaks of, if that gateway holds it, be it as a standby.
func (m *Manager) heldBy(ctx context.Context, g Gateway, id string) (state.Lease, error) {
	if !sessionID.MatchString(id) {
		return state.Lease{}, errUnknown()
	}
	l, err := m.opts.Store.Lease(ctx, id)
	if errors.Is(err, state.ErrNotFound) {
		return l, ErrResync
	}
	if err != nil {
		return l, storeAway(err)
	}
	if !holds(g, l) {
		return l, errUnknown()
	}
	return l, nil
}

// holds reports whether a gateway holds a session that is not over, be it as a standby.
func holds(g Gateway, l state.Lease) bool {
	return l.Network == g.Network && (l.Gateway == g.Instance || l.Standby == g.Instance) && l.Over == ""
}

// Ended takes a gateway's word that a session is over there, of its own accord or because it was told: the address is
// free at once.
func (m *Manager) Ended(ctx context.Context, g Gateway, e wire.End) error {
	if !sessionID.MatchString(e.Session) {
		return errUnknown()
	}
	l, err := m.opts.Store.Lease(ctx, e.Session)
	if errors.Is(err, state.ErrNotFound) {
		return nil
	}
	if err != nil {
		return storeAway(err)
	}
	switch {
	case l.Network == g.Network && slices.Contains(l.Former, g.Instance):
		return nil // it was told to let go
	case l.Network != g.Network || l.Gateway != g.Instance && l.Standby != g.Instance:
		return errUnknown()
	case l.Gateway != g.Instance:
		return m.alone(ctx, l.Session, g.Instance)
	case l.Standby != "" && l.Standby != g.Instance && l.Over == "":
		return m.move(ctx, l, byGateway) // where the client is gone as well, the standby's lease runs out
	}
	_, err = m.change(ctx, e.Session, func(l *state.Lease) bool { // only one of several ends is the one that is logged
		before := l.Over
		l.Over = "ended by its gateway"
		return before == ""
	})
	first := problem.CodeOf(err) != problem.SessionOver
	if err != nil && first {
		return err
	}
	if first { // before the lease is gone: what it says of the job is gone with it
		m.auditEnd(ctx, l, clip(e.Reason, 200), byGateway)
	}
	if l.Over == endedByPolicy {
		return nil // its client asks what has become of it, and may for as long as the lease is remembered
	}
	if err := m.opts.Store.EndLease(ctx, e.Session); err != nil {
		return storeAway(err)
	}
	if first {
		m.logOf(l).Info("session ended", "reason", clip(e.Reason, 200), "by", "gateway")
	}
	return nil
}

// Held counts the sessions that a gateway instance holds.
func (m *Manager) Held(instance string) int { return m.opts.Store.Held(instance) }

// SetRules puts a changed configuration into force and ends the running sessions that it no longer carries.
func (m *Manager) SetRules(ctx context.Context, rules Rules) {
	m.rules.Store(&rules)
	m.Reevaluate(ctx)
}

// Reevaluate holds every running session against the rules in force and ends those that they no longer carry. An adopted
// session, whose claims nobody remembers, is judged at its next renewal instead.
func (m *Manager) Reevaluate(ctx context.Context) {
	rules := m.Rules()
	var ending errgroup.Group
	ending.SetLimit(32)
	m.opts.Store.Leases(func(l state.Lease) bool {
		if l.Over == "" && len(l.Claims) > 0 {
			if reason := m.outgrown(rules, l, remembered(l.Claims)); reason != "" {
				ending.Go(func() error { return m.finish(ctx, l, reason, byCoordinator) }) // logged there
			}
		}
		return ctx.Err() == nil
	})
	_ = ending.Wait() // the next renewal ends what this could not
}

// clip shortens what somebody else wrote to a length fit for a log line.
func clip(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}
