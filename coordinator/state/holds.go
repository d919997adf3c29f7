package state

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"
	"unique"
)

// holds says, where the state is embedded, which session holds which address. This process alone gives addresses there, so a lease says in the
// bucket who holds its address, and until when: an address needs no key of its own, which was one write of three for a join, and one of two
// for a renewal. A lease is therefore kept in the bucket until nobody else may have its address, and what leases say is gathered again at the start.
//
// Who is about to write a lease claims its address first.
type holds struct {
	mu     sync.Mutex
	by     map[spot]hold
	claims uint64
}

// spot is an IPv4 address of a network.
type spot struct {
	network unique.Handle[string]
	addr    [4]byte
}

type hold struct {
	session string // as in its lease's key
	until   int64  // see nanos
	of      uint64 // revision of the lease that says so, or a number from claimed on while that is being written
	former  uint64 // then: revision of the session's lease that said so before
}

// claimed is above all revisions.
const claimed = uint64(1) << 63

// claim is an address on its way into a lease.
type claim struct {
	at  spot
	was hold // what it replaced, if that was the same session's
	now hold
}

func newHolds() *holds { return &holds{by: map[spot]hold{}} }

func spotOf(network string, addr netip.Addr) spot { return spot{unique.Make(network), addr.As4()} }

// claim holds an address for a session, at least until a time. fits judges by what there is whether it may; a hold that has run out
// counts as none unless it is the session's own. No hold of its own is brought nearer.
func (h *holds) claim(at spot, session string, until, now time.Time, fits func(own, live bool) bool) (c claim, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	cur, there := h.by[at]
	own := there && cur.session == session
	if live := there && nanos(now) < cur.until; !fits(own, live) {
		return c, false
	}
	h.claims++
	c = claim{at: at, now: hold{session: session, until: nanos(until), of: claimed | h.claims}}
	if own {
		c.was, c.now.until, c.now.former = cur, max(cur.until, c.now.until), cur.of
		if cur.of >= claimed {
			c.now.former = cur.former
		}
	}
	h.by[at] = c.now
	return c, true
}

// release takes back a claim of which no lease has come.
func (h *holds) release(c claim) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.by[c.at].of != c.now.of: // somebody else's by now, or a lease's
	case c.was.session == "":
		delete(h.by, c.at)
	default:
		h.by[c.at] = c.was
	}
}

// note takes what a lease says that is in the bucket. At the start later leases come later; after that a lease whose address another one
// has, or claims, does not get it back.
func (h *holds) note(at spot, session string, until int64, revision uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	cur, there := h.by[at]
	switch {
	case !there || cur.session != session && cur.of < revision:
		h.by[at] = hold{session: session, until: until, of: revision}
	case cur.session == session && (cur.of < revision || cur.of >= claimed && cur.former < revision):
		h.by[at] = hold{session: session, until: max(until, cur.until), of: revision}
	}
}

// drop takes a hold away with its lease.
func (h *holds) drop(at spot, session string, revision uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if cur := h.by[at]; cur.session == session && cur.of <= revision {
		delete(h.by, at)
	}
}

// get gives who holds an address, expired or not; the zero hold where nobody does.
func (h *holds) get(at spot) hold {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.by[at]
}

// What a claim of an address wants to find there.
func isFree(_, live bool) bool        { return !live }
func isFreeOrOwn(own, live bool) bool { return own || !live }
func isOwn(own, _ bool) bool          { return own }

// claimHere claims a lease's address in memory, and makes the lease say how long it is held. errHeld where that does not fit, or where a record
// of another session says that it holds the address: of an older version's, or see leaveBehind.
func (s *Store) claimHere(l *Lease, addr netip.Addr, until time.Time, fits func(own, live bool) bool) (claim, error) {
	if at := holderOf(*l).Expires; at.After(until) {
		until = at
	}
	if r, _ := s.bucket.mirror.get(addressKind, addressID(l.Network, addr)); s.lives(r) {
		if own := r.(holder).Session == l.Session; !fits(own, true) {
			return claim{}, errHeld
		}
		if r.until().After(until) {
			until = r.until()
		}
	}
	c, ok := s.bucket.mirror.holds.claim(spotOf(l.Network, addr), token(l.Session), until, s.now(), fits)
	if !ok {
		return c, errHeld
	}
	l.Longest = fromNanos(c.now.until).Add(-addressGrace)
	return c, nil
}

// placeHere is place where the state is embedded.
func (s *Store) placeHere(ctx context.Context, l Lease, addr netip.Addr, hold time.Time, fits func(own, live bool) bool) (Lease, error) {
	r, _ := s.bucket.mirror.get(leaseKind, token(l.Session))
	if s.lives(r) {
		return Lease{}, ErrExists
	}
	c, err := s.claimHere(&l, addr, hold, fits)
	if err != nil {
		return Lease{}, err
	}
	if err := s.leaveBehind(ctx, r, l.Session, c.at); err != nil {
		s.bucket.mirror.holds.release(c)
		return Lease{}, err
	}
	l.Revision, _, err = s.occupy(ctx, leaseKind, token(l.Session), l, nil)
	switch {
	case err == nil:
		return l, nil
	case errors.Is(err, ErrExists), errors.Is(err, ErrConflict):
		s.bucket.mirror.holds.release(c)
	default: // it may have been stored all the same, or may yet be
		s.undo(ctx, func(ctx context.Context) error { return s.takeBack(ctx, c, l.Session) })
	}
	if errors.Is(err, ErrExists) {
		return Lease{}, err
	}
	return Lease{}, fmt.Errorf("store a lease: %w", err)
}

// takeBack removes a lease that nobody has acknowledged, if it stands. Else its address stays held for its time.
func (s *Store) takeBack(ctx context.Context, c claim, session string) error {
	l, revision, err := s.current(ctx, session)
	if err != nil || l == nil || spotOf(l.Network, l.Addresses[0]) != c.at {
		return err
	}
	if err = s.bucket.erase(ctx, leaseKind, token(session), revision, l.lasting(), s.now()); err == nil {
		s.bucket.mirror.holds.release(c)
	}
	return err
}

// leaveBehind writes down who holds the address of a lease that has run out and is about to be replaced by one with another address: no lease
// will say so any more, and its time is not over yet.
func (s *Store) leaveBehind(ctx context.Context, old record, session string, next spot) error {
	o, at, ok := placed(old)
	h := s.bucket.mirror.holds.get(at)
	left := holder{session, fromNanos(h.until)}
	if !ok || at == next || h.session != token(session) || !s.lives(left) {
		return nil
	}
	id := addressID(o.network.Value(), netip.AddrFrom4(at.addr))
	_, err := s.bucket.write(ctx, addressKind, id, left, anyRevision, s.now())
	return err
}
