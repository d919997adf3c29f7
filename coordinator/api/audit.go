package api

import (
	"context"
	"encoding/hex"
	"errors"
	"net/netip"

	"github.com/coder/websocket"

	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/wire"
)

// Auditor is what the API needs of [audit.Log].
type Auditor interface {
	// Record stores a record before it returns, or fails with code unreachable.
	Record(ctx context.Context, r audit.Record) error
	// Note stores a record some time soon.
	Note(r audit.Record)
	// Refused counts a request that was refused before its sender had proven anything.
	Refused(err error, from netip.Addr)
	// Ready says why records cannot be stored just now, or nil.
	Ready() error
}

// noAudit stands where nothing is recorded.
type noAudit struct{}

// Record does nothing.
func (noAudit) Record(context.Context, audit.Record) error { return nil }

// Note does nothing.
func (noAudit) Note(audit.Record) {}

// Refused does nothing.
func (noAudit) Refused(error, netip.Addr) {}

// Ready is always true.
func (noAudit) Ready() error { return nil }

// proof says by what a gateway was let in: its workload identity, or the beginning of its secret's hash.
func proof(e config.Enrolment) string {
	if e.Issuer != "" {
		return e.Issuer + " " + e.Subject
	}
	return "secret " + hex.EncodeToString(e.SecretSHA256[:4])
}

// record says which gateway a stream is.
func (s *stream) record(e audit.Event) audit.Record {
	r := audit.Record{Event: e, Entity: &audit.Entity{Name: s.who.Name, UID: s.who.Instance, Type: "gateway"}}
	if addr, err := netip.ParseAddr(s.addr); err == nil {
		r.From(addr)
	}
	s.mu.Lock()
	by := proof(s.enrolled.Enrolment)
	s.mu.Unlock()
	u := &r.Unmapped
	u.Network, u.Gateway, u.Instance, u.By = s.network, s.who.Name, s.who.Instance, by
	return r
}

// enrol puts on record that a gateway was let in, ahead of its welcome.
func (s *stream) enrol(ctx context.Context, h wire.Hello) error {
	r := s.record(audit.Enrolled)
	r.Allowed(nil)
	r.Unmapped.Key, r.Unmapped.Program = h.Key.String(), h.Program
	if err := s.api.opts.Audit.Record(ctx, r); err != nil {
		s.log.Error("gateway's enrolment is not on record", "err", err)
		return &closing{websocket.StatusTryAgainLater, "the coordinator cannot reach its state", false}
	}
	s.onRecord = true
	return nil
}

// recordKeyChange puts on record that a gateway of this name had another key when it was last here.
func (s *stream) recordKeyChange(ctx context.Context, before wire.Key) {
	now := s.presence.Key.String()
	r := s.record(audit.KeyChange)
	r.Severity = audit.Medium
	r.Entity = &audit.Entity{Name: s.who.Name, UID: before.String(), Type: "gateway key"}
	r.EntityResult = &audit.Entity{Name: s.who.Name, UID: now, Type: "gateway key"}
	r.Unmapped.Key = now
	r.Succeeded()
	if err := s.api.opts.Audit.Record(ctx, r); err != nil {
		s.api.opts.Audit.Note(r)
	}
}

// left puts the end of an enrolled gateway's stream on record.
func (s *stream) left(why error) {
	if !s.onRecord {
		return
	}
	r := s.record(audit.Unenrolled)
	r.Succeeded()
	if why != nil {
		r.Detail = clip(printable(lastWord(why)), 200)
	}
	s.api.opts.Audit.Note(r)
}

// lastWord is why a stream ended: the gateway's own reason where it closed in good order, else the error.
func lastWord(why error) string {
	if c, ok := errors.AsType[websocket.CloseError](why); ok && c.Reason != "" {
		return c.Reason
	}
	return why.Error()
}
