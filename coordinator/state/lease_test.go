package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go/jetstream"
)

var sameAddrs = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func leases(s *Store) []string {
	var out []string
	for l := range s.Leases {
		out = append(out, l.Session)
	}
	slices.Sort(out)
	return out
}

func TestLeaseLife(t *testing.T) {
	c := newClock()
	s := open(t, Options{now: c.now})
	asked := testLease("s1", c.now())
	created := must(s.CreateLease(t.Context(), asked, testPool))

	want := asked
	want.Addresses, want.Revision, want.Longest = created.Addresses, created.Revision, asked.Expires
	if d := cmp.Diff(want, created, sameAddrs); d != "" || created.Revision == 0 || !testPool.Holds(created.Addresses) {
		t.Errorf("created: %s", d)
	}
	if d := cmp.Diff(created, must(s.Lease(t.Context(), "s1")), sameAddrs); d != "" {
		t.Errorf("read: %s", d)
	}
	for l := range s.Leases {
		if d := cmp.Diff(created, l, sameAddrs); d != "" {
			t.Errorf("listed: %s", d)
		}
		l.Claims["repository"], l.Rules[0] = "evil/other", "evil"
	}
	if got := slices.Collect(s.Leases); got[0].Claims["repository"] != "acme/shop" || got[0].Rules[0] != "deploy" {
		t.Error("a caller changed what is stored")
	}

	renewed := created
	renewed.Gateway, renewed.Expires = "gw1", created.Expires.Add(5*time.Minute)
	renewed = must(s.UpdateLease(t.Context(), renewed))
	if renewed.Revision <= created.Revision {
		t.Errorf("revision %d after %d", renewed.Revision, created.Revision)
	}
	if _, err := s.UpdateLease(t.Context(), created); !errors.Is(err, ErrConflict) {
		t.Errorf("an update of an old revision: %v", err)
	}
	c.turn(12 * time.Minute) // past the first deadline
	if d := cmp.Diff(renewed, must(s.Lease(t.Context(), "s1")), sameAddrs); d != "" {
		t.Errorf("read after renewal: %s", d)
	}
	for range 2 {
		if err := s.EndLease(t.Context(), "s1"); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.Lease(t.Context(), "s1"); !errors.Is(err, ErrNotFound) || len(leases(s)) != 0 {
		t.Errorf("an ended lease: %v", err)
	}
	if _, err := s.UpdateLease(t.Context(), renewed); !errors.Is(err, ErrConflict) {
		t.Errorf("an update of an ended lease: %v", err)
	}
}

func TestLeaseRefuses(t *testing.T) {
	c := newClock()
	s := open(t, Options{now: c.now})
	good := testLease("s1", c.now())
	good.Addresses = testPool.Addresses(5)
	change := func(f func(l *Lease)) Lease {
		l := good
		l.Addresses = slices.Clone(good.Addresses)
		f(&l)
		return l
	}
	for name, l := range map[string]Lease{
		"no session":      change(func(l *Lease) { l.Session = "" }),
		"no network":      change(func(l *Lease) { l.Network = "" }),
		"no key":          change(func(l *Lease) { l.Key = wire.Key{} }),
		"expired":         change(func(l *Lease) { l.Expires = c.now() }),
		"no address":      change(func(l *Lease) { l.Addresses = nil }),
		"ipv6 first":      change(func(l *Lease) { slices.Reverse(l.Addresses) }),
		"three addresses": change(func(l *Lease) { l.Addresses = append(l.Addresses, l.Addresses[0]) }),
		"another's ipv6":  change(func(l *Lease) { l.Addresses[1] = testPool.Addresses(6)[1] }),
	} {
		if _, err := s.AdoptLease(t.Context(), l); err == nil || errors.Is(err, ErrExists) {
			t.Errorf("%s: adopts, %v", name, err)
		}
		l.Revision = 1
		if _, err := s.UpdateLease(t.Context(), l); err == nil || errors.Is(err, ErrConflict) {
			t.Errorf("%s: updates, %v", name, err)
		}
	}
	for _, pool := range []Pool{{}, {V4: testPool.V6}, {V4: testPool.V4, V6: netip.MustParsePrefix("fd00::/100")}} {
		if _, err := s.CreateLease(t.Context(), good, pool); err == nil || errors.Is(err, ErrFull) {
			t.Errorf("pool %v: %v", pool, err)
		}
	}
	if _, err := s.UpdateLease(t.Context(), good); !errors.Is(err, ErrConflict) {
		t.Errorf("an update of what was never read: %v", err)
	}
	if got := leases(s); len(got) != 0 {
		t.Errorf("stored %v", got)
	}
}

func TestOneSessionOneLease(t *testing.T) {
	s := open(t, Options{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	var won, lost int
	for range 16 {
		wg.Go(func() {
			_, err := s.CreateLease(t.Context(), testLease("s1", time.Now()), testPool)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				won++
			case errors.Is(err, ErrExists):
				lost++
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won != 1 || lost != 15 {
		t.Errorf("%d won, %d lost", won, lost)
	}
	if held := addresses(s); len(held) != 1 {
		t.Errorf("addresses held: %v", held)
	}
}

// addresses gives the session of every address that is held.
func addresses(s *Store) map[string]string {
	s.bucket.mirror.mu.RLock()
	defer s.bucket.mirror.mu.RUnlock()
	out := map[string]string{}
	for id, e := range s.bucket.mirror.entries[addressKind] {
		if s.lives(e.record) {
			out[id] = e.record.(holder).Session
		}
	}
	if h := s.bucket.mirror.holds; h != nil {
		h.mu.Lock()
		defer h.mu.Unlock()
		for at, hold := range h.by {
			if s.now().Before(fromNanos(hold.until)) {
				out[addressID(at.network.Value(), netip.AddrFrom4(at.addr))] = hold.session
			}
		}
	}
	return out
}

func TestPoolIsUsedUpAndFreed(t *testing.T) {
	c := newClock()
	s := open(t, Options{now: c.now})
	pool := Pool{V4: netip.MustParsePrefix("10.9.0.16/28")}
	if pool.Size() != 13 {
		t.Fatalf("size %d", pool.Size())
	}
	given := map[netip.Addr]bool{}
	for i := range pool.Size() {
		l := must(s.CreateLease(t.Context(), testLease(fmt.Sprint("s", i), c.now()), pool))
		given[l.Addresses[0]] = true
	}
	first, last := netip.MustParseAddr("10.9.0.18"), netip.MustParseAddr("10.9.0.30")
	for a := first; a.Compare(last) <= 0; a = a.Next() {
		if !given[a] {
			t.Errorf("%v was not given", a)
		}
	}
	if len(given) != 13 {
		t.Errorf("gave %v", slices.Collect(maps.Keys(given)))
	}
	extra := testLease("extra", c.now())
	if _, err := s.CreateLease(t.Context(), extra, pool); !errors.Is(err, ErrFull) {
		t.Errorf("one too many: %v", err)
	}
	extra.Network = "lab" // another network has its own addresses
	must(s.CreateLease(t.Context(), extra, pool))

	freed := must(s.Lease(t.Context(), "s3")).Addresses[0]
	if err := s.EndLease(t.Context(), "s3"); err != nil {
		t.Fatal(err)
	}
	if l := must(s.CreateLease(t.Context(), testLease("s3", c.now()), pool)); l.Addresses[0] != freed {
		t.Errorf("gave %v, not the free %v", l.Addresses, freed)
	}
}

func TestExpiryByTheLeasesOwnWord(t *testing.T) {
	c := newClock()
	s := open(t, Options{now: c.now})
	pool := Pool{V4: netip.MustParsePrefix("10.9.0.0/30")} // room for one
	l := testLease("s1", c.now())
	l.Expires = c.now().Add(1500 * time.Millisecond)
	l = must(s.CreateLease(t.Context(), l, pool))
	c.turn(1499 * time.Millisecond)
	must(s.Lease(t.Context(), "s1"))
	c.turn(time.Millisecond)
	if _, err := s.Lease(t.Context(), "s1"); !errors.Is(err, ErrNotFound) || len(leases(s)) != 0 {
		t.Errorf("past its time: %v", err)
	}
	if _, err := s.CreateLease(t.Context(), testLease("s2", c.now()), pool); !errors.Is(err, ErrFull) {
		t.Errorf("the address has no grace: %v", err)
	}
	c.turn(addressGrace)
	must(s.CreateLease(t.Context(), testLease("s2", c.now()), pool))
	l.Expires = c.now().Add(time.Minute)
	if _, err := s.UpdateLease(t.Context(), l); !errors.Is(err, ErrConflict) {
		t.Errorf("a lease came back to an address that another has: %v", err)
	}
	// the key itself is free again
	must(s.CreateLease(t.Context(), testLease("s1", c.now()), testPool))
}

// TestBucketForgets waits for the bucket's own clock to end what nobody renews. A lease's lifetime is counted from its
// renewal, which is where nats.go's own update would drop it.
func TestBucketForgets(t *testing.T) {
	s := open(t, Options{})
	l := testLease("s1", time.Now())
	l.Expires = time.Now().Add(500 * time.Millisecond)
	l = must(s.CreateLease(t.Context(), l, testPool))
	l.Gateway, l.Expires = "gw", time.Now().Add(700*time.Millisecond)
	must(s.UpdateLease(t.Context(), l))

	w := must(must(s.bucket.js.KeyValue(t.Context(), bucketName)).Watch(t.Context(), prefixes[leaseKind]+">"))
	defer func() { _ = w.Stop() }()
	timeout := time.After(20 * time.Second)
	for {
		select {
		case e := <-w.Updates():
			if e == nil || e.Operation() == jetstream.KeyValuePut {
				continue
			}
			eventually(t, "the mirror forgets", func() bool {
				r, _ := s.bucket.mirror.get(leaseKind, token("s1"))
				return r == nil
			})
			return
		case <-timeout:
			t.Fatal("the bucket keeps the lease")
		}
	}
}

func TestAdopt(t *testing.T) {
	c := newClock()
	s := open(t, Options{now: c.now})
	l := testLease("s1", c.now())
	l.Addresses, l.Gateway = testPool.Addresses(7), "gw1"
	adopted := must(s.AdoptLease(t.Context(), l))
	if d := cmp.Diff(adopted, must(s.Lease(t.Context(), "s1")), sameAddrs); d != "" {
		t.Error(d)
	}
	if _, err := s.AdoptLease(t.Context(), l); !errors.Is(err, ErrExists) {
		t.Errorf("twice: %v", err)
	}
	other := testLease("s2", c.now())
	other.Addresses = l.Addresses
	if _, err := s.AdoptLease(t.Context(), other); !errors.Is(err, ErrExists) {
		t.Errorf("another's address: %v", err)
	}
	if err := s.EndLease(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	must(s.AdoptLease(t.Context(), other))
}

// TestAdoptAfterHalfALease is what a crash between the two writes leaves: an address without its lease.
func TestAdoptAfterHalfALease(t *testing.T) {
	c := newClock()
	s := open(t, Options{now: c.now})
	l := testLease("s1", c.now())
	l.Addresses = testPool.Addresses(7)
	id := addressID(l.Network, l.Addresses[0])
	must(s.bucket.write(t.Context(), addressKind, id, holderOf(l), 0, c.now()))
	must(s.AdoptLease(t.Context(), l))
	if got := addresses(s)[id]; got != "s1" {
		t.Errorf("the address is held by %q", got)
	}
}

// A write whose acknowledgement was lost is in the bucket, and not in the mirror yet: who writes over it is told, and reads it from then on.
func TestWriteThatNobodyAcknowledged(t *testing.T) {
	s := open(t, Options{})
	l := must(s.CreateLease(t.Context(), testLease("s1", time.Now()), Pool{V4: netip.MustParsePrefix("10.0.0.0/24")}))
	lost := l
	lost.GatewayName = "lost"
	if _, err := s.bucket.js.Publish(t.Context(), subjects+prefixes[leaseKind]+"s1", must(json.Marshal(lost)), jetstream.WithMsgTTL(time.Minute)); err != nil {
		t.Fatal(err)
	}
	l.GatewayName = "mine"
	if _, err := s.UpdateLease(t.Context(), l); !errors.Is(err, ErrConflict) {
		t.Errorf("written over: %v", err)
	}
	got := must(s.Lease(t.Context(), "s1"))
	if got.GatewayName != "lost" {
		t.Errorf("read %+v", got)
	}
	if err := s.EndLease(t.Context(), "s1"); err != nil {
		t.Error(err)
	}
	if _, err := s.Lease(t.Context(), "s1"); !errors.Is(err, ErrNotFound) {
		t.Errorf("ended: %v", err)
	}
}
