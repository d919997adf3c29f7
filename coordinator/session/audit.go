package session

import (
	"context"
	"net/netip"

	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/problem"
)

// Auditor is what sessions need of [audit.Log].
type Auditor interface {
	// Record stores a record before it returns, or fails with code unreachable.
	Record(ctx context.Context, r audit.Record) error
	// Note stores a record some time soon.
	Note(r audit.Record)
	// Refused counts a request that is not recorded by itself: its sender had proven nothing, or nothing that any rule asks for.
	Refused(err error, from netip.Addr)
}

// record says who wants a session, and what is known of it by now.
func (a *admission) record(e audit.Event) audit.Record {
	r := audit.Record{Event: e, Session: &audit.Session{UID: a.join.Key.SessionID(), Issuer: a.claims.Issuer}}
	r.Identify(a.claims)
	r.From(a.join.From)
	u := &r.Unmapped
	u.Network, u.Key, u.Client = a.join.Network, a.join.Key.String(), a.join.Client
	if l := a.lease; l.Session != "" {
		r.Session.Created, r.Session.Expires, u.Ends = audit.Millis(l.Created), audit.Millis(l.Expires), audit.Millis(l.Ends)
		u.Addresses, u.Gateway, u.Instance = l.Addresses, l.GatewayName, l.Gateway
	}
	return r
}

// recordJoin stores what policy said yes to, before anybody hears of it. The gateway that is asked first is the one that
// nearly always takes the session; where it is another one, a second record says so.
func (m *Manager) recordJoin(ctx context.Context, a *admission, first state.Presence) error {
	r := a.record(audit.Join)
	r.Allowed(a.decision.Rules)
	r.Session.Expires = audit.Millis(m.deadline(a.rules.Config.Lease, a.lease.Ends))
	r.Unmapped.Grants, r.Unmapped.Gateway, r.Unmapped.Instance = a.decision.Grants, first.Name, first.Instance
	return m.opts.Audit.Record(ctx, r)
}

// refused ends a join with an error, and gives what the job is told: the error, once it is on record. A job whose token was not
// believed is only counted, and so are jobs that no rule's owner knows, where there are many.
func (m *Manager) refused(ctx context.Context, a *admission, err error) error {
	many := a.stranger(err) && !m.joins.strangers.Allow()
	if a.claims == nil || many {
		if !many {
			logRefusal(a.log(), "join refused", err)
		}
		m.opts.Audit.Refused(err, a.join.From)
		return err
	}
	r := a.record(audit.Denied)
	if a.decision.Allowed {
		r.Event = audit.Unplaced
		logRefusal(a.log(), "join failed", err)
	} else {
		logRefusal(a.log(), "join refused", err)
	}
	r.Refuse(err)
	if rerr := m.opts.Audit.Record(context.WithoutCancel(ctx), r); rerr != nil {
		a.log().Error("join's refusal is not on record", "err", rerr)
		return rerr
	}
	return err
}

// stranger reports a job that policy has said no to, and whose owner no rule names.
func (a *admission) stranger(err error) bool {
	p := problem.From(err)
	return a.claims != nil && !a.decision.Allowed && p.Code == problem.Denied && p.Denial == nil
}

// unrecorded ends a join whose record could not be stored in time. Should it be stored all the same, another one says what
// became of it.
func (m *Manager) unrecorded(a *admission, err error) error {
	logRefusal(a.log(), "join failed", err)
	r := a.record(audit.Unplaced)
	r.Refuse(err)
	m.opts.Audit.Note(r)
	return err
}

// recordOf says what is known of a session by its lease.
func recordOf(e audit.Event, l state.Lease) audit.Record {
	r := audit.Record{Event: e, Session: &audit.Session{UID: l.Session, Issuer: l.Claims["iss"], Created: audit.Millis(l.Created), Expires: audit.Millis(l.Expires)}}
	r.Identify(remembered(l.Claims))
	u := &r.Unmapped
	u.Network, u.Key, u.Addresses, u.Gateway, u.Instance, u.Ends = l.Network, l.Key.String(), l.Addresses, l.GatewayName, l.Gateway, audit.Millis(l.Ends)
	return r
}

// audited stores a record of something that has happened, also for a caller who has gone. It is stored later where the
// log is away.
func (m *Manager) audited(ctx context.Context, r audit.Record) {
	if err := m.opts.Audit.Record(context.WithoutCancel(ctx), r); err != nil {
		m.opts.Audit.Note(r)
	}
}

// auditEnd records a session's end.
func (m *Manager) auditEnd(ctx context.Context, l state.Lease, reason, by string) {
	m.remember(l)
	r := recordOf(audit.End, l)
	r.Succeeded()
	r.Session.Reason, r.Unmapped.By = reason, by
	m.audited(ctx, r)
}

// renewed records a renewal.
func renewed(l state.Lease, by string) audit.Record {
	r := recordOf(audit.Renew, l)
	r.Allowed(l.Rules)
	r.Unmapped.By = by
	return r
}

// auditRefusal records a renewal that was refused.
func (m *Manager) auditRefusal(ctx context.Context, l state.Lease, err error) {
	r := recordOf(audit.RenewDeny, l)
	r.Refuse(err)
	m.audited(ctx, r)
}

// who says whose word an end is.
const (
	byClient      = "client"
	byGateway     = "gateway"
	byCoordinator = "coordinator"
)

// noAudit stands where nothing is recorded.
type noAudit struct{}

// Record does nothing.
func (noAudit) Record(context.Context, audit.Record) error { return nil }

// Note does nothing.
func (noAudit) Note(audit.Record) {}

// Refused does nothing.
func (noAudit) Refused(error, netip.Addr) {}
