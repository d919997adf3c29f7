package state

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

const (
	// addressGrace is how long an address stays with its session after the lease ended by the clock alone. It is
	// above what the clocks of coordinators and gateways differ by, so that nobody gets an address that a gateway
	// still routes to its last holder.
	addressGrace = 10 * time.Second

	randomTries = 24              // random addresses before every one is tried in turn
	maxRaces    = 8               // times to lose against another writer of the same key before giving up
	undoTimeout = 2 * time.Second // for taking back half of what could not be done
)

// Lease is one session as the coordinator remembers it.
type Lease struct {
	Session     string            `json:"session"`
	Network     string            `json:"network"`
	Key         wire.Key          `json:"key"`
	Addresses   []netip.Addr      `json:"addresses"`         // IPv4, then IPv6
	SecretHash  []byte            `json:"secret_hash"`       // SHA-256 of the session secret
	Gateway     string            `json:"gateway"`           // instance that holds it; "" while being asked
	GatewayName string            `json:"gateway_name"`      // its name, which outlives a restart
	Standby     string            `json:"standby,omitempty"` // instance that holds it besides, ready to carry it
	StandbyName string            `json:"standby_name,omitempty"`
	Former      []string          `json:"former,omitempty"` // instances that carried it before, the last ones; see [Lease.Move]
	Over        string            `json:"over,omitempty"`   // why it ended; kept until its gateway has surely heard of it
	Rules       []string          `json:"rules"`
	Grants      []wire.Grant      `json:"grants"` // what was offered; a policy that no longer gives one of them ends the session
	Claims      map[string]string `json:"claims"` // who it is, for logs and for re-evaluation when policy changes
	Issued      time.Time         `json:"issued"` // iat of the last token
	Created     time.Time         `json:"created"`
	Expires     time.Time         `json:"expires"`
	Ends        time.Time         `json:"ends"`
	Longest     time.Time         `json:"longest"` // the latest Expires it ever had; the store keeps it
	Revision    uint64            `json:"-"`       // fences updates
}

func (l Lease) until() time.Time   { return l.Expires }
func (l Lease) lasting() time.Time { return l.Longest }

// maxFormer bounds the instances that a lease remembers.
const maxFormer = 8

// Move makes the standby the gateway that carries the session. The former one is remembered: it still reports what flows did there.
func (l *Lease) Move() {
	if l.Gateway != l.Standby {
		l.Former = append(l.Former[max(0, len(l.Former)-maxFormer+1):], l.Gateway)
	}
	l.Gateway, l.GatewayName, l.Standby, l.StandbyName = l.Standby, l.StandbyName, "", ""
}

// stored is l as it will be read back, with times in UTC and without a monotonic clock. What it holds is still the caller's: bucket and mirror keep
// copies that share nothing with it, see [pack].
func (l Lease) stored() Lease {
	for _, t := range []*time.Time{&l.Issued, &l.Created, &l.Expires, &l.Ends, &l.Longest} {
		*t = t.Round(0).UTC()
	}
	if l.Longest.Before(l.Expires) {
		l.Longest = l.Expires
	}
	return l
}

// holder says which session holds an address.
type holder struct {
	Session string    `json:"session"`
	Expires time.Time `json:"expires"` // the lease's, and addressGrace
}

func (h holder) until() time.Time   { return h.Expires }
func (h holder) lasting() time.Time { return h.Expires } // its end is never brought nearer

func holderOf(l Lease) holder { return holder{l.Session, l.Expires.Add(addressGrace)} }

func addressID(network string, addr netip.Addr) string { return token(network) + "." + addr.String() }

// CreateLease stores a new lease that lives until l.Expires and gives it a free address of pool by compare-and-swap create. It
// returns the lease as stored. ErrExists: this session (that is, this key) has a lease. ErrFull: no address is left.
func (s *Store) CreateLease(ctx context.Context, l Lease, pool Pool) (Lease, error) {
	if err := errors.Join(s.check(l), pool.Validate()); err != nil {
		return Lease{}, fmt.Errorf("create a lease: %w", err)
	}
	l = l.stored()
	if r, _ := s.bucket.mirror.get(leaseKind, token(l.Session)); s.lives(r) {
		if _, err := s.Lease(ctx, l.Session); err == nil {
			return Lease{}, ErrExists
		}
	}
	for n := range pool.candidates(randomTries) {
		l.Addresses = pool.Addresses(n)
		if r, _ := s.bucket.mirror.get(addressKind, addressID(l.Network, l.Addresses[0])); s.lives(r) {
			continue
		}
		stored, err := s.place(ctx, l, l.Addresses[0], s.now().Add(pool.Hold), isFree)
		if errors.Is(err, errHeld) {
			continue
		}
		return stored, err
	}
	return Lease{}, ErrFull
}

// AdoptLease stores a lease as a gateway re-asserts it, with its addresses. ErrExists where session or address is held.
// Whether the addresses are the network's to give is for the caller to check: [Pool.Holds].
func (s *Store) AdoptLease(ctx context.Context, l Lease) (Lease, error) {
	addr, err := leaseAddress(l.Addresses)
	if err := errors.Join(s.check(l), err); err != nil {
		return Lease{}, fmt.Errorf("adopt a lease: %w", err)
	}
	stored, err := s.place(ctx, l.stored(), addr, time.Time{}, isFreeOrOwn)
	if errors.Is(err, errHeld) {
		return Lease{}, ErrExists
	}
	return stored, err
}

// errHeld says that another session holds an address.
var errHeld = errors.New("the address is held by another session")

// place takes the address, at least until hold and some grace, and then stores the lease; a lease never stands without its address. fits says what
// may be there already, as far as this node has to judge.
func (s *Store) place(ctx context.Context, l Lease, addr netip.Addr, hold time.Time, fits func(own, live bool) bool) (Lease, error) {
	hold = hold.Add(addressGrace).Round(0).UTC()
	if s.embedded != nil {
		return s.placeHere(ctx, l, addr, hold, fits)
	}
	address := addressID(l.Network, addr)
	holds := holderOf(l)
	if hold.After(holds.Expires) {
		holds.Expires = hold
	}
	ours := func(r record) bool { return r.(holder).Session == l.Session }
	revision, over, err := s.occupy(ctx, addressKind, address, holds, ours)
	if err != nil {
		if errors.Is(err, ErrExists) {
			return Lease{}, errHeld
		}
		return Lease{}, fmt.Errorf("take an address: %w", err)
	}
	l.Revision, _, err = s.occupy(ctx, leaseKind, token(l.Session), l, nil)
	if err == nil {
		return l, nil
	}
	if over == nil { // else it was held for this session before, by whoever came first
		s.undo(ctx, func(ctx context.Context) error {
			return s.bucket.erase(ctx, addressKind, address, revision, holds.lasting(), s.now())
		})
	}
	if errors.Is(err, ErrExists) {
		return Lease{}, err
	}
	return Lease{}, fmt.Errorf("store a lease: %w", err)
}

// occupy writes r under a key where nothing lives, or something that ours accepts, whose end it never brings nearer. It
// gives the new revision and what of ours lived there. ErrExists where anything else does.
func (s *Store) occupy(ctx context.Context, k kind, id string, r record, ours func(record) bool) (uint64, record, error) {
	over, expect := s.bucket.mirror.get(k, id)
	for range maxRaces {
		if s.lives(over) && (ours == nil || !ours(over)) {
			expect = 0 // the mirror may be behind; the bucket decides
		} else if over != nil && ours != nil && ours(over) && over.until().After(r.until()) {
			r = over
		}
		revision, err := s.bucket.write(ctx, k, id, r, expect, s.now())
		if err == nil {
			if !s.lives(over) {
				over = nil
			}
			return revision, over, nil
		}
		if !errors.Is(err, ErrConflict) {
			return 0, nil, err
		}
		if over, expect, err = s.bucket.read(ctx, k, id); err != nil {
			return 0, nil, err
		}
		if s.lives(over) && (ours == nil || !ours(over)) {
			return 0, nil, ErrExists
		}
	}
	return 0, nil, ErrConflict
}

// Lease reads a lease; ErrNotFound where there is none or it has expired.
func (s *Store) Lease(ctx context.Context, session string) (Lease, error) {
	l, _, err := s.current(ctx, session)
	if err == nil && (l == nil || !s.lives(*l)) {
		err = ErrNotFound
	}
	if err != nil {
		return Lease{}, err
	}
	return *l, nil
}

// Recall gives a lease as this node has it in memory, if it has: without asking anybody, and maybe out of date. What is written over it is fenced
// by its revision like anything else.
func (s *Store) Recall(session string) (Lease, bool) {
	r, _ := s.bucket.mirror.get(leaseKind, token(session))
	c, ok := r.(*compact)
	if !ok || !s.lives(c) {
		return Lease{}, false
	}
	l, err := c.lease()
	return l, err == nil
}

// current gives a session's lease, expired or not, and its revision; nil where there is none. Where the state is embedded nobody but this
// process writes, and its mirror has what the bucket has, but for a write that nobody has acknowledged: whoever writes over that gets a conflict,
// which brings the mirror up to date. To read one lease from the bucket, NATS reads 4 MB of its file.
func (s *Store) current(ctx context.Context, session string) (*Lease, uint64, error) {
	var r record
	var revision uint64
	var err error
	if s.embedded != nil {
		r, revision = s.bucket.mirror.get(leaseKind, token(session))
	}
	if r == nil {
		r, revision, err = s.bucket.read(ctx, leaseKind, token(session))
	}
	switch r := r.(type) {
	case Lease:
		return &r, revision, err
	case *compact:
		l, err := r.lease()
		return &l, revision, err
	}
	return nil, 0, err
}

// catchUp brings a lease that has turned out to be another one into the mirror, where that is what current reads.
func (s *Store) catchUp(ctx context.Context, session string) {
	if s.embedded != nil {
		s.bucket.refresh(ctx, leaseKind, token(session))
	}
}

// UpdateLease writes l over the revision it was read at, living until l.Expires, and keeps its address as long. ErrConflict where somebody else wrote.
func (s *Store) UpdateLease(ctx context.Context, l Lease) (Lease, error) {
	addr, err := leaseAddress(l.Addresses)
	if err := errors.Join(s.check(l), err); err != nil {
		return Lease{}, fmt.Errorf("update a lease: %w", err)
	}
	if l.Revision == 0 {
		return Lease{}, ErrConflict
	}
	l = l.stored()
	var c claim
	if s.embedded == nil {
		err = s.keepAddress(ctx, l, addressID(l.Network, addr))
	} else if c, err = s.claimHere(&l, addr, time.Time{}, isOwn); err != nil {
		err = ErrConflict
	}
	if err != nil {
		return Lease{}, err
	}
	l.Revision, err = s.bucket.write(ctx, leaseKind, token(l.Session), l, l.Revision, s.now())
	if s.embedded != nil && errors.Is(err, ErrConflict) {
		s.bucket.mirror.holds.release(c)
	}
	if errors.Is(err, ErrConflict) {
		s.catchUp(ctx, l.Session)
	}
	if err != nil {
		return Lease{}, err
	}
	return l, nil
}

// Sole reports whether this process is the only node, because the state is embedded in it.
func (s *Store) Sole() bool { return s.embedded != nil }

// Stands reports whether a lease is still as this node has written it. On a cluster another node may have changed it a moment ago: there,
// writing over its revision tells.
func (s *Store) Stands(l Lease) bool {
	r, revision := s.bucket.mirror.get(leaseKind, token(l.Session))
	return s.lives(r) && revision == l.Revision
}

// keepAddress makes a lease's address last as long as the lease, and where that takes a write, as long again, but not beyond the session's
// end: two of three renewals then write the lease alone. ErrConflict where it is held by another session, or by none, which is to say that the lease has
// ended.
func (s *Store) keepAddress(ctx context.Context, l Lease, id string) error {
	want := holderOf(l)
	ahead := holder{l.Session, want.Expires.Add(l.Expires.Sub(s.now())).Round(0).UTC()}
	if over := l.Ends.Add(addressGrace); ahead.Expires.After(over) && !over.Before(want.Expires) {
		ahead.Expires = over
	}
	r, revision := s.bucket.mirror.get(addressKind, id)
	for range maxRaces {
		if h, ok := r.(holder); ok && h.Session == l.Session {
			if !h.Expires.Before(want.Expires) {
				return nil
			}
			_, err := s.bucket.write(ctx, addressKind, id, ahead, revision, s.now())
			if !errors.Is(err, ErrConflict) {
				return err
			}
		}
		var err error
		if r, revision, err = s.bucket.read(ctx, addressKind, id); err != nil {
			return err
		}
		if h, ok := r.(holder); !ok || h.Session != l.Session {
			return ErrConflict
		}
	}
	return ErrConflict
}

// EndLease removes a lease and frees its address. It is idempotent.
func (s *Store) EndLease(ctx context.Context, session string) error {
	for range maxRaces {
		l, revision, err := s.current(ctx, session)
		if err != nil || l == nil {
			return err
		}
		err = s.bucket.erase(ctx, leaseKind, token(session), revision, l.lasting(), s.now())
		if errors.Is(err, ErrConflict) {
			s.catchUp(ctx, session)
			continue
		}
		if err != nil {
			return fmt.Errorf("end a lease: %w", err)
		}
		if r, _ := s.bucket.mirror.get(addressKind, addressID(l.Network, l.Addresses[0])); r != nil || s.embedded == nil {
			s.undo(ctx, func(ctx context.Context) error { return s.freeAddress(ctx, *l) })
		}
		return nil
	}
	return ErrConflict
}

// freeAddress gives up the address of a lease that is gone, unless another session has it by now.
func (s *Store) freeAddress(ctx context.Context, l Lease) error {
	id := addressID(l.Network, l.Addresses[0])
	r, revision := s.bucket.mirror.get(addressKind, id)
	for range maxRaces {
		if h, ok := r.(holder); ok && h.Session == l.Session {
			err := s.bucket.erase(ctx, addressKind, id, revision, h.lasting(), s.now())
			if !errors.Is(err, ErrConflict) {
				return err
			}
		}
		var err error
		if r, revision, err = s.bucket.read(ctx, addressKind, id); err != nil {
			return err
		}
		if h, ok := r.(holder); !ok || h.Session != l.Session {
			return nil
		}
	}
	return ErrConflict
}

// undo does what follows from something that happened already, even if the caller has given up by now. Should it
// fail, the bucket does the same when the address's time is over.
func (s *Store) undo(ctx context.Context, f func(ctx context.Context) error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if err := f(ctx); err != nil && !errors.Is(err, ErrConflict) {
		s.log.Warn("an address stays held until its lease would have ended", "err", err)
	}
}

// Leases calls yield for every live lease, from the node's own mirror. The leases are the caller's to keep.
func (s *Store) Leases(yield func(Lease) bool) { s.LeasesWhere(func(Head) bool { return true }, yield) }

// Head is what can be told of a lease without unpacking it.
type Head struct {
	Network, Gateway, GatewayName string
	Over                          bool
}

// LeasesWhere is Leases for those alone whose head matches: others cost next to nothing. match must not call the store.
func (s *Store) LeasesWhere(match func(Head) bool, yield func(Lease) bool) {
	var found []*compact
	s.bucket.mirror.each(leaseKind, s.now(), func(r record) {
		if c := r.(*compact); match(c.head()) {
			found = append(found, c)
		}
	})
	for _, c := range found {
		l, err := c.lease()
		if err != nil {
			s.log.Error("a lease in memory does not unpack", "err", err)
			continue
		}
		if !yield(l) {
			return
		}
	}
}

// lives reports whether there is a record that has not ended by its own word.
func (s *Store) lives(r record) bool { return r != nil && s.now().Before(r.until()) }

// check refuses what is no lease.
func (s *Store) check(l Lease) error {
	switch {
	case l.Session == "" || l.Network == "" || l.Key.IsZero():
		return errors.New("a lease has a session, a network and a key")
	case !s.now().Before(l.Expires):
		return errors.New("it has expired already")
	}
	return nil
}
