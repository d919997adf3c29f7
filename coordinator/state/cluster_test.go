package state

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// TestTwoNodesOnOneCluster opens two stores on a NATS server of somebody else's.
func TestTwoNodesOnOneCluster(t *testing.T) {
	url := natsServer(t).ClientURL()
	a, b := open(t, Options{NATS: []string{url}}), open(t, Options{NATS: []string{url}})
	l := must(a.CreateLease(t.Context(), testLease("s1", time.Now()), testPool))
	if d := cmp.Diff(l, must(b.Lease(t.Context(), "s1")), sameAddrs); d != "" {
		t.Errorf("b reads: %s", d)
	}
	eventually(t, "b lists a's lease", func() bool { return len(leases(b)) == 1 })
	l.Gateway = "gw"
	must(b.UpdateLease(t.Context(), l))
	if _, err := a.UpdateLease(t.Context(), l); !errors.Is(err, ErrConflict) {
		t.Errorf("a writes over b: %v", err)
	}
	if err := b.EndLease(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a forgets the lease", func() bool { return len(leases(a)) == 0 })

	if err := a.PutPresence(t.Context(), Presence{Instance: "gw", Network: "corp", Key: wire.Key{1}}, time.Minute); err != nil {
		t.Fatal(err)
	}
	eventually(t, "b sees the gateway", func() bool { return len(b.Gateways("corp")) == 1 })
	stop := must(a.Serve("gw", func(_ context.Context, msg []byte) []byte { return msg }))
	if answer, err := b.Ask(t.Context(), "gw", []byte("hello")); err != nil || string(answer) != "hello" {
		t.Errorf("b asks: %q, %v", answer, err)
	}
	stop()
	if _, err := b.Ask(t.Context(), "gw", nil); !errors.Is(err, ErrAway) {
		t.Errorf("b asks nobody: %v", err)
	}
}

// TestAddressIsHeldAhead: on a cluster most renewals write the lease alone, and an address stays its session's for as long as its lease, and no
// longer than the session can last.
func TestAddressIsHeldAhead(t *testing.T) {
	clock := newClock()
	s := open(t, Options{NATS: []string{natsServer(t).ClientURL()}, now: clock.now})
	l := testLease("s1", clock.now())
	l.Expires, l.Ends = clock.now().Add(10*time.Minute), clock.now().Add(time.Hour)
	l = must(s.CreateLease(t.Context(), l, testPool))
	id, written, last := addressID(l.Network, l.Addresses[0]), 0, uint64(0)
	for range 12 {
		clock.turn(5 * time.Minute)
		if l.Expires = clock.now().Add(10 * time.Minute); l.Expires.After(l.Ends) {
			l.Expires = l.Ends
		}
		if !clock.now().Before(l.Expires) {
			break
		}
		l = must(s.UpdateLease(t.Context(), l))
		r, revision := s.bucket.mirror.get(addressKind, id)
		h, ok := r.(holder)
		if !ok || h.Expires.Before(l.Expires.Add(addressGrace)) || h.Expires.After(l.Ends.Add(addressGrace)) {
			t.Fatalf("a lease until %s has its address until %s", l.Expires, h.Expires)
		}
		if revision != last {
			written, last = written+1, revision
		}
	}
	if written != 4 {
		t.Errorf("the address was written %d times in 11 renewals", written)
	}
}

// TestNodesRaceForAddresses has two nodes fill a small range at once: every address is given once.
func TestNodesRaceForAddresses(t *testing.T) {
	url := natsServer(t).ClientURL()
	nodes := []*Store{open(t, Options{NATS: []string{url}}), open(t, Options{NATS: []string{url}})}
	pool := Pool{V4: testPool.V4}
	pool.V4 = must(pool.V4.Addr().Prefix(26)) // 61 addresses
	var mu sync.Mutex
	given, full := map[string]string{}, 0
	var wg sync.WaitGroup
	for i, s := range nodes {
		for j := range 4 {
			wg.Go(func() {
				for n := range 10 {
					session := fmt.Sprintf("s-%d-%d-%d", i, j, n)
					l, err := s.CreateLease(t.Context(), testLease(session, time.Now()), pool)
					mu.Lock()
					switch other, held := given[fmt.Sprint(l.Addresses)]; {
					case errors.Is(err, ErrFull):
						full++
					case err != nil:
						t.Error(err)
					case held:
						t.Errorf("%v was given to %s and %s", l.Addresses, other, session)
					default:
						given[fmt.Sprint(l.Addresses)] = session
					}
					mu.Unlock()
				}
			})
		}
	}
	wg.Wait()
	if len(given) != 61 || full != 19 {
		t.Errorf("%d given, %d refused", len(given), full)
	}
}

// TestConnectionBreaks has a node's watch miss something, as one that was cut off for long would, and then reconnect.
func TestConnectionBreaks(t *testing.T) {
	srv := natsServer(t)
	a, b := open(t, Options{NATS: []string{srv.ClientURL()}}), open(t, Options{NATS: []string{srv.ClientURL()}, resumable: 1})
	for i := range 5 {
		must(a.CreateLease(t.Context(), testLease(fmt.Sprint("s", i), time.Now()), testPool))
	}
	eventually(t, "b has all", func() bool { return len(leases(b)) == 5 })
	// no marker tells of this
	js := must(jetstream.New(a.conn))
	stream := must(js.Stream(t.Context(), streamName))
	if err := stream.Purge(t.Context(), jetstream.WithPurgeSubject(subjects+"session.s2")); err != nil {
		t.Fatal(err)
	}
	if err := a.EndLease(t.Context(), "s3"); err != nil {
		t.Fatal(err)
	}
	if err := b.conn.ForceReconnect(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "b has caught up", func() bool {
		return b.conn.Status() == nats.CONNECTED && cmp.Equal(leases(b), []string{"s0", "s1", "s4"})
	})
}

func TestServerGoes(t *testing.T) {
	srv := natsServer(t)
	s := open(t, Options{NATS: []string{srv.ClientURL()}})
	must(s.CreateLease(t.Context(), testLease("s1", time.Now()), testPool))
	must(s.Serve("gw", func(context.Context, []byte) []byte { return nil }))
	srv.Shutdown()
	srv.WaitForShutdown()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // for what is asked before the loss is noticed
	defer cancel()
	eventually(t, "the store says that it is not ready", func() bool { return s.Ready(ctx) != nil })
	if _, err := s.CreateLease(ctx, testLease("s2", time.Now()), testPool); err == nil || errors.Is(err, ErrFull) {
		t.Errorf("created: %v", err)
	}
	if _, err := s.Lease(ctx, "s1"); err == nil || errors.Is(err, ErrNotFound) {
		t.Errorf("read: %v", err)
	}
	if len(leases(s)) != 1 {
		t.Error("the mirror forgot what it knew")
	}
}

func TestForeignStreamIsRefused(t *testing.T) {
	url := natsServer(t).ClientURL()
	conn := must(nats.Connect(url))
	defer conn.Close()
	js := must(jetstream.New(conn))
	must(js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: bucketName, History: 5}))
	if _, err := Open(t.Context(), Options{NATS: []string{url}, Logger: quiet}); err == nil {
		t.Error("opened a bucket that keeps no deadlines")
	}
}

// TestOtherToolsReadTheBucket holds that this is an ordinary key-value bucket.
func TestOtherToolsReadTheBucket(t *testing.T) {
	s := open(t, Options{})
	must(s.CreateLease(t.Context(), testLease("s1", time.Now()), testPool))
	kv := must(s.bucket.js.KeyValue(t.Context(), bucketName))
	keys := must(kv.Keys(t.Context()))
	if len(keys) != 1 { // embedded, an address has no key of its own
		t.Errorf("keys %q", keys)
	}
	if err := s.EndLease(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	if _, err := kv.Keys(t.Context()); !errors.Is(err, jetstream.ErrNoKeysFound) {
		t.Errorf("after the end: %v", err)
	}
}
