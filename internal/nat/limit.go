package nat

import (
	"hash/maphash"
	"net/netip"
	"sync/atomic"
	"time"
)

// Bounds on what strangers are answered, for each [Limiter]. An answer costs a send, many times what it costs to read the
// question, so that a flood of questions would take the time in which sessions are served. A few hundred runners behind one
// address ask less than this at once.
const (
	AnswerRate       = 20_000 // a second, in all
	SourceAnswerRate = 500    // a second, to one IPv4 address or IPv6 /64

	answerBurst   = 100 * time.Millisecond
	sourceBurst   = 4 * time.Second
	sourceBuckets = 4096 // power of two; sources that fall together share
)

// Limiter bounds answers in all and to each source. Its size is fixed, whoever asks; it takes no lock and does not allocate.
type Limiter struct {
	seed    maphash.Seed
	all     bucket
	sources [sourceBuckets]bucket
}

// NewLimiter gives a limiter from which nobody has had anything yet.
func NewLimiter() *Limiter { return &Limiter{seed: maphash.MakeSeed()} }

// Admit reports whether one more answer may go to a source. now is in nanoseconds since 1970.
func (l *Limiter) Admit(to netip.Addr, now int64) bool {
	if to = to.Unmap(); to.Is6() {
		p, _ := to.WithZone("").Prefix(64)
		to = p.Addr()
	}
	source := &l.sources[maphash.Comparable(l.seed, to)%sourceBuckets]
	return source.take(SourceAnswerRate, sourceBurst, now) && l.all.take(AnswerRate, answerBurst, now)
}

// bucket is a token bucket in one word: the time until which what was let through has been paid for (GCRA, ITU-T I.371).
type bucket struct{ paid atomic.Int64 }

func (b *bucket) take(rate int64, burst time.Duration, now int64) bool {
	for {
		old := b.paid.Load()
		paid := max(old, now) + int64(time.Second)/rate
		if paid-now > int64(burst) {
			return false
		}
		if b.paid.CompareAndSwap(old, paid) {
			return true
		}
	}
}
