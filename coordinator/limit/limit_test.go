package limit

import (
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

func TestAllow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New[string](2, 3, 100)
		for range 3 {
			if !l.Allow("a") {
				t.Fatal("the burst is not granted")
			}
		}
		if l.Allow("a") {
			t.Error("more than the burst is granted")
		}
		if !l.Allow("b") {
			t.Error("another key pays for it")
		}
		time.Sleep(500 * time.Millisecond)
		if !l.Allow("a") || l.Allow("a") {
			t.Error("half a second at 2/s is worth one request")
		}
	})
}

func TestEmptyAndCharge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New[string](1, 2, 100)
		if l.Empty("a") || l.Len() != 0 {
			t.Error("looking at an unknown key made one of it")
		}
		for range 4 {
			l.Charge("a")
		}
		if !l.Empty("a") {
			t.Error("four of two tokens are left")
		}
		time.Sleep(2 * time.Second)
		if !l.Empty("a") {
			t.Error("what was taken beyond the burst is forgotten")
		}
		time.Sleep(time.Second)
		if l.Empty("a") || !l.Allow("a") || l.Allow("a") {
			t.Error("after three seconds there is one token")
		}
	})
}

// TestBounded: whatever asks, the table keeps to its size, index and order agree, and the last one heard of is in front.
func TestBounded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(1, 8).Draw(t, "max")
		l := New[int](1, 1, size)
		for range rapid.IntRange(0, 50).Draw(t, "requests") {
			key := rapid.IntRange(0, 15).Draw(t, "key")
			switch rapid.IntRange(0, 2).Draw(t, "how") {
			case 0:
				l.Allow(key)
			case 1:
				l.Charge(key)
			case 2:
				l.Empty(key)
				continue
			}
			if l.Len() > size || l.Len() != len(l.byKey) {
				t.Fatalf("%d in order, %d indexed, at most %d wanted", l.Len(), len(l.byKey), size)
			}
			if front := l.recent.Front().Value.(*bucket[int]).key; front != key {
				t.Fatalf("%d in front, not %d", front, key)
			}
		}
	})
}

func TestSource(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1":            "192.0.2.1/32",
		"::ffff:192.0.2.1":     "192.0.2.1/32",
		"2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64",
		"fe80::1%eth0":         "fe80::/64",
	} {
		if got := Source(netip.MustParseAddr(in)).String(); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
	if Source(netip.Addr{}).IsValid() {
		t.Error("no address is an address")
	}
}

func BenchmarkAllow(b *testing.B) {
	l := New[string](100, 1000, 1<<16)
	keys := make([]string, 1000)
	for i := range keys {
		keys[i] = fmt.Sprint("owner ", i)
	}
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			l.Allow(keys[i%len(keys)])
		}
	})
}
