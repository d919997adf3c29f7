package relay

import (
	"hash/maphash"
	"net/netip"
	"sync/atomic"
	"time"
)

// meter is a token bucket in one word: the time until which what was let through has been paid for (GCRA, ITU-T I.371). It
// takes no lock, and its zero value is a full bucket.
type meter struct{ paid atomic.Int64 } // nanoseconds

// take lets n units through at a rate of units a second, unless that would be more than burst ahead of time.
func (m *meter) take(n int, rate uint64, burst time.Duration, now int64) bool {
	cost := int64(uint64(n) * uint64(time.Second) / rate)
	for {
		old := m.paid.Load()
		paid := max(old, now) + cost
		if paid-now > int64(burst) {
			return false
		}
		if m.paid.CompareAndSwap(old, paid) {
			return true
		}
	}
}

// Bounds on the tickets that are verified, 0.1 to 0.2 ms of work each. A ticket that is in use already is known and costs
// nothing, so that a gateway may bind all its sessions anew when its address changes.
const (
	verifyRate    = 2000 // a second, in all
	verifyBurst   = 2 * time.Second
	sourceRate    = 200 // a second, from one source
	sourceBurst   = 25 * time.Second
	sourceBuckets = 4096 // power of two; sources that fall together share
)

// guard bounds the work that strangers can cause with tickets that have to be verified. Its size is fixed.
type guard struct {
	verify  uint64 // verifyRate, and
	source  uint64 // sourceRate, unless a test wants others
	seed    maphash.Seed
	all     meter
	sources [sourceBuckets]meter
}

func newGuard() *guard {
	return &guard{verify: verifyRate, source: sourceRate, seed: maphash.MakeSeed()}
}

// sourceOf gives what counts as one source: an IPv4 address or an IPv6 /64.
func sourceOf(a netip.Addr) netip.Addr {
	if a = a.Unmap(); a.Is6() {
		p, _ := a.WithZone("").Prefix(64)
		return p.Addr()
	}
	return a
}

// admit reports whether one more ticket from a source is verified.
func (g *guard) admit(from netip.Addr, now int64) bool {
	source := &g.sources[maphash.Comparable(g.seed, sourceOf(from))%sourceBuckets]
	return source.take(1, g.source, sourceBurst, now) && g.all.take(1, g.verify, verifyBurst, now)
}
