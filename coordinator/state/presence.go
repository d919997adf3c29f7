package state

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// Presence is a live gateway.
type Presence struct {
	Instance   string           `json:"instance"`
	Name       string           `json:"name"`
	Network    string           `json:"network"`
	Key        wire.Key         `json:"key"`
	Candidates []wire.Candidate `json:"candidates"`
	Mapping    wire.Mapping     `json:"mapping,omitempty"`
	Sessions   int              `json:"sessions"`
	Counted    time.Time        `json:"counted"` // when they were
	Leaving    bool             `json:"leaving"`
	Since      time.Time        `json:"since"`
}

// presence is a [Presence] as stored.
type presence struct {
	Presence
	Expires time.Time `json:"expires"`
}

func (p presence) until() time.Time   { return p.Expires }
func (p presence) lasting() time.Time { return p.Expires }

// PutPresence says that a gateway is live for ttl from now.
func (s *Store) PutPresence(ctx context.Context, p Presence, ttl time.Duration) error {
	if p.Instance == "" || p.Key.IsZero() || ttl <= 0 {
		return errors.New("a gateway's presence needs an instance, a key and a time to live")
	}
	p.Candidates = slices.Clone(p.Candidates)
	p.Since, p.Counted = p.Since.Round(0).UTC(), p.Counted.Round(0).UTC()
	now := s.now()
	r := presence{p, now.Add(ttl).Round(0).UTC()}
	if _, err := s.bucket.write(ctx, gatewayKind, token(p.Instance), r, anyRevision, now); err != nil {
		return fmt.Errorf("put a gateway's presence: %w", err)
	}
	return nil
}

// DropPresence says that a gateway is gone. It is idempotent.
func (s *Store) DropPresence(ctx context.Context, instance string) error {
	if err := s.bucket.erase(ctx, gatewayKind, token(instance), anyRevision, time.Time{}, s.now()); err != nil {
		return fmt.Errorf("drop a gateway's presence: %w", err)
	}
	return nil
}

// Gateways lists the live gateways of a network from the node's own mirror, fewest sessions first, leaving ones left
// out. The list is the caller's to keep, the gateways' candidates are not to be changed.
func (s *Store) Gateways(network string) []Presence {
	list, now := s.bucket.mirror.takersOf(network), s.bucket.mirror.asOf(s.now())
	out := make([]Presence, 0, len(list))
	for i := range list {
		if now.Before(list[i].Expires) {
			out = append(out, list[i].Presence)
		}
	}
	return out
}
