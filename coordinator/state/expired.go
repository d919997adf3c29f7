package state

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// maxExpired bounds leases that have run out and that nobody has taken from the channel yet.
	maxExpired = 4096

	// claimTTL is how long it is remembered who speaks for an end. All nodes hear of it within seconds.
	claimTTL = 5 * time.Minute
)

// Expired gives the leases that ran out without having ended in any other way, some seconds after they did. Every node hears of
// each; [Store.ClaimEnd] tells which one of them speaks for it. Leases that ran out while no node was there are not among them.
func (s *Store) Expired() <-chan Lease { return s.bucket.expired }

// ClaimEnd reports whether this call is the first, on any node, for the end of this session.
func (s *Store) ClaimEnd(ctx context.Context, session string) (bool, error) {
	// What it holds tells this claim from another one, should its acknowledgement be lost.
	_, err := s.bucket.store(ctx, &nats.Msg{Subject: subjects + "ended." + token(session), Data: []byte(rand.Text())}, 0,
		jetstream.WithExpectLastSequencePerSubject(0), jetstream.WithMsgTTL(claimTTL))
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, ErrConflict):
		return false, nil
	default:
		return false, fmt.Errorf("claim the end of a session: %w", err)
	}
}

// vanished takes the record of a key that is gone from the bucket: a lease that was still to be held when its time came has
// run out.
func (b *bucket) vanished(r record) {
	c, ok := r.(*compact)
	if !ok || c.over != unover || b.now().Before(c.until()) {
		return
	}
	l, err := c.lease()
	if err != nil {
		b.log.Warn("a lease has run out, and nobody hears of it", "err", err)
		return
	}
	select {
	case b.expired <- l:
	default:
		b.log.Warn("a lease has run out, and nobody hears of it", "session", l.Session)
	}
}
