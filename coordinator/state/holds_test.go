package state

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// TestRacesForAddressesInOneProcess has sessions come and go at once in a range that is too small for them: no address is given to two.
func TestRacesForAddressesInOneProcess(t *testing.T) {
	s := open(t, Options{})
	pool := Pool{V4: netip.MustParsePrefix("10.9.0.0/29"), Hold: time.Minute} // 5 addresses
	var given sync.Map
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 15 {
				session := fmt.Sprintf("s-%d-%d", i, n/2) // some twice
				l, err := s.CreateLease(t.Context(), testLease(session, time.Now()), pool)
				if errors.Is(err, ErrFull) || errors.Is(err, ErrExists) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if other, held := given.LoadOrStore(l.Addresses[0], session); held {
					t.Errorf("%v was given to %s and %s", l.Addresses, other, session)
				}
				l.Expires = l.Expires.Add(time.Minute)
				if l, err = s.UpdateLease(t.Context(), l); err != nil {
					t.Error(err)
				}
				given.Delete(l.Addresses[0])
				if err := s.EndLease(t.Context(), session); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if held := addresses(s); len(held) != 0 {
		t.Errorf("still held: %v", held)
	}
}

// TestAddressOfAReplacedLease: a session whose lease has run out comes again, with another address. The former one stays its own for as long as
// it would have, also after a crash.
func TestAddressOfAReplacedLease(t *testing.T) {
	c := newClock()
	dir := t.TempDir()
	s := open(t, Options{Dir: dir, now: c.now})
	pool := Pool{V4: netip.MustParsePrefix("10.9.0.0/29")}
	brief := testLease("s1", c.now())
	brief.Expires = c.now().Add(time.Second)
	former := must(s.CreateLease(t.Context(), brief, pool)).Addresses[0]
	c.turn(2 * time.Second)
	again := testLease("s1", c.now())
	for n := range pool.Size() {
		if again.Addresses = pool.Addresses(n); again.Addresses[0] != former {
			break
		}
	}
	must(s.AdoptLease(t.Context(), again))
	crashed := filepath.Join(t.TempDir(), "crashed")
	if err := copyDir(crashed, dir); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Store{s, open(t, Options{Dir: crashed, now: c.now})} {
		for n := range pool.Size() - 2 {
			if l := must(s.CreateLease(t.Context(), testLease(fmt.Sprint("other", n), c.now()), pool)); l.Addresses[0] == former {
				t.Errorf("%v was given while it is held", former)
			}
		}
		if _, err := s.CreateLease(t.Context(), testLease("one more", c.now()), pool); !errors.Is(err, ErrFull) {
			t.Errorf("a held address was given: %v", err)
		}
	}
	c.turn(addressGrace)
	if l := must(s.CreateLease(t.Context(), testLease("one more", c.now()), pool)); l.Addresses[0] != former {
		t.Errorf("gave %v, and free is %v", l.Addresses, former)
	}
}

// TestHoldOutlivesACrash: an address is kept for a session whose gateway may have it, though the lease is only that of an offer.
func TestHoldOutlivesACrash(t *testing.T) {
	c := newClock()
	dir := t.TempDir()
	s := open(t, Options{Dir: dir, now: c.now})
	pool := Pool{V4: netip.MustParsePrefix("10.9.0.0/30"), Hold: time.Minute} // room for one
	offer := testLease("s1", c.now())
	offer.Expires = c.now().Add(time.Second)
	must(s.CreateLease(t.Context(), offer, pool))
	crashed := filepath.Join(t.TempDir(), "crashed")
	if err := copyDir(crashed, dir); err != nil {
		t.Fatal(err)
	}
	s = open(t, Options{Dir: crashed, now: c.now})
	c.turn(pool.Hold + addressGrace - time.Millisecond)
	if _, err := s.CreateLease(t.Context(), testLease("s2", c.now()), pool); !errors.Is(err, ErrFull) {
		t.Errorf("given before its time: %v", err)
	}
	c.turn(time.Millisecond)
	must(s.CreateLease(t.Context(), testLease("s2", c.now()), pool))
}

// TestAddressRecords: an address that has a key of its own, as an older version writes them, is not given to others.
func TestAddressRecords(t *testing.T) {
	c := newClock()
	s := open(t, Options{now: c.now})
	pool := Pool{V4: netip.MustParsePrefix("10.9.0.0/30")}
	l := testLease("s1", c.now())
	l.Addresses = pool.Addresses(0)
	id := addressID(l.Network, l.Addresses[0])
	must(s.bucket.write(t.Context(), addressKind, id, holderOf(l), 0, c.now()))
	if _, err := s.CreateLease(t.Context(), testLease("s2", c.now()), pool); !errors.Is(err, ErrFull) {
		t.Errorf("given: %v", err)
	}
	other := testLease("s2", c.now())
	other.Addresses = l.Addresses
	if _, err := s.AdoptLease(t.Context(), other); !errors.Is(err, ErrExists) {
		t.Errorf("adopted: %v", err)
	}
	must(s.AdoptLease(t.Context(), l))
	if err := s.EndLease(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	must(s.CreateLease(t.Context(), other, pool))
}

// TestClaimsThatCameToNothing: a join that is given up while its lease is being written leaves either nothing, or an address that nobody else gets.
func TestClaimsThatCameToNothing(t *testing.T) {
	s := open(t, Options{})
	for n := range 20 {
		pool := Pool{V4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, byte(n)}), 30)} // room for one
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(n)*20*time.Microsecond)
		session := fmt.Sprint("s", n)
		_, err := s.CreateLease(ctx, testLease(session, time.Now()), pool)
		cancel()
		_, missing := s.Lease(t.Context(), session)
		held := addresses(s)[addressID("corp", pool.Addresses(0)[0])]
		if (err == nil || missing == nil) && held != session {
			t.Fatalf("its lease stands (%v, %v), and its address is held by %q", err, missing, held)
		}
	}
}

// TestClaims goes through what may happen to a claim before its lease is written.
func TestClaims(t *testing.T) {
	now := time.Now()
	later := now.Add(time.Minute)
	at := spotOf("corp", netip.MustParseAddr("10.9.0.2"))
	h := newHolds()
	first, ok := h.claim(at, "a", later, now, isFree)
	if _, taken := h.claim(at, "b", later, now, isFree); !ok || taken {
		t.Fatal("claimed twice")
	}
	if _, own := h.claim(at, "b", later, now, isOwn); own {
		t.Fatal("b keeps what is a's")
	}
	h.release(first)
	if h.get(at).session != "" {
		t.Fatal("not released")
	}
	first, _ = h.claim(at, "a", later, now, isFree)
	h.note(at, "a", nanos(later), 7)
	h.release(first) // too late
	if got := h.get(at); got != (hold{session: "a", until: nanos(later), of: 7}) {
		t.Fatalf("a lease holds %+v", got)
	}
	longer, _ := h.claim(at, "a", later.Add(time.Minute), now, isOwn)
	h.drop(at, "a", 7) // of the lease that is being replaced
	kept := h.get(at).session
	h.note(at, "a", nanos(later), 7)
	if kept != "a" || h.get(at).session != "a" {
		t.Fatal("a claim went with the lease before it")
	}
	h.release(longer)
	if got := h.get(at); got != (hold{session: "a", until: nanos(later), of: 7}) {
		t.Fatalf("after a claim that came to nothing: %+v", got)
	}
	h.note(at, "b", nanos(later), 6) // a former lease's, heard of late
	if h.get(at).session != "a" {
		t.Fatal("an earlier lease takes the address back")
	}
	if _, ok := h.claim(at, "b", later, later, isFree); !ok {
		t.Fatal("held beyond its time")
	}
	h.note(at, "a", nanos(later.Add(time.Hour)), 9)
	if h.get(at).session != "b" {
		t.Fatal("a claim is overridden")
	}
	if h.drop(at, "a", ^uint64(0)); h.get(at).session != "b" {
		t.Fatal("another's lease takes a claim along")
	}
}
