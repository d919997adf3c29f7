package session

import (
	"context"

	"golang.org/x/sync/errgroup"

	"github.com/culvertnet/culvert/coordinator/state"
)

// Expire puts sessions on record whose leases run out because nobody renewed them, until ctx ends. Of several nodes one
// speaks for each.
func (m *Manager) Expire(ctx context.Context) {
	var ending errgroup.Group
	ending.SetLimit(32)
	defer func() { _ = ending.Wait() }()
	for {
		select {
		case l := <-m.opts.Store.Expired():
			ending.Go(func() error { m.ranOut(ctx, l); return nil })
		case <-ctx.Done():
			return
		}
	}
}

func (m *Manager) ranOut(ctx context.Context, l state.Lease) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	first, err := m.opts.Store.ClaimEnd(ctx, l.Session)
	if err != nil { // rather twice than never
		m.logOf(l).Warn("cannot tell whether another node speaks for a session's end", "err", err)
	}
	if first || err != nil {
		m.auditEnd(ctx, l, endedByLease, byCoordinator)
		m.logOf(l).Info("session ended", "reason", endedByLease)
	}
}
