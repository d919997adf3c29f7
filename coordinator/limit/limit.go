// Package limit holds token buckets by who asks, in tables of bounded size, and bounds connections.
package limit

import (
	"container/list"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Table is a token bucket for each key, in a table that forgets the keys not heard of for longest. It is safe for
// concurrent use.
type Table[K comparable] struct {
	rate  rate.Limit
	burst int
	max   int
	now   func() time.Time

	mu     sync.Mutex
	recent *list.List // of *bucket[K], the last one heard of in front
	byKey  map[K]*list.Element
}

type bucket[K comparable] struct {
	key    K
	tokens *rate.Limiter
}

// New makes a table for so many keys, whose buckets fill at rate tokens a second up to burst.
func New[K comparable](r rate.Limit, burst, keys int) *Table[K] {
	return &Table[K]{rate: r, burst: burst, max: keys, now: time.Now, recent: list.New(), byKey: map[K]*list.Element{}}
}

// Allow takes a token from a key's bucket, unless it is empty.
func (t *Table[K]) Allow(key K) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.bucket(key).AllowN(t.now(), 1)
}

// Charge takes a token from a key's bucket even where there is none: what it stands for has happened.
func (t *Table[K]) Charge(key K) {
	t.mu.Lock()
	defer t.mu.Unlock()
	b, now := t.bucket(key), t.now()
	if !b.AllowN(now, 1) {
		b.ReserveN(now, 1)
	}
}

// Empty reports whether a key's bucket holds no token. It takes none, and a key that is not known stays so: what anybody
// can write may choose a bucket to look at, and nothing else.
func (t *Table[K]) Empty(key K) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.byKey[key]
	return e != nil && e.Value.(*bucket[K]).tokens.TokensAt(t.now()) < 1
}

// Len is how many keys are known.
func (t *Table[K]) Len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.recent.Len()
}

// bucket finds or makes a key's bucket; mu is held.
func (t *Table[K]) bucket(key K) *rate.Limiter {
	if e := t.byKey[key]; e != nil {
		t.recent.MoveToFront(e)
		return e.Value.(*bucket[K]).tokens
	}
	if t.recent.Len() >= t.max {
		oldest := t.recent.Back()
		delete(t.byKey, t.recent.Remove(oldest).(*bucket[K]).key)
	}
	b := &bucket[K]{key, rate.NewLimiter(t.rate, t.burst)}
	t.byKey[key] = t.recent.PushFront(b)
	return b.tokens
}

// Source is what counts as one asker: an IPv4 address, or the /64 that an IPv6 host can choose its addresses from. Everybody
// without a known address is one.
func Source(addr netip.Addr) netip.Prefix {
	addr = addr.Unmap().WithZone("")
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	p, _ := addr.Prefix(bits) // the zero Prefix for the zero Addr
	return p
}
