package relay

import (
	"sync/atomic"
	"time"
)

// shares keeps one session from taking a socket's reader from all others. As long as the reader keeps up, it does nothing.
// When a whole window has passed in which there was always more to read than one read takes, then in the next window no side
// of a session may have more than twice the mean of all that were active; what it sends beyond is dropped before it costs
// a send. So the packets of others are read before the kernel's buffer overflows, which would take from all alike.
//
// Strangers' packets count as work of nobody: where they are most of it, no session is to blame and none is cut.
type shares struct {
	window uint32 // number of the current window
	begun  int64  // when it began, in nanoseconds since 1970
	behind bool   // every read of it found more than it takes
	limit  int    // work that one side may cause in it; 0: no limit
	active int    // sides that have caused some
	work   int    // that they have caused
	others int    // work that strangers have caused
}

// used is what one side has caused in one window of a reader: the window's number and the work.
type used struct{ v atomic.Uint64 }

const (
	shareWindow = 5 * time.Millisecond
	shareFactor = 2

	// runWork is what a run costs besides its bytes, measured in bytes.
	runWork = 4 << 10
)

// read tells that a read has begun a batch; full says that there may be more.
func (s *shares) read(now int64, full bool) {
	if now-s.begun < int64(shareWindow) {
		s.behind = s.behind && full
		return
	}
	s.limit = 0
	if s.behind && s.active > 1 && s.work > s.others {
		s.limit = shareFactor * s.work / s.active
	}
	s.window++
	s.begun, s.behind, s.active, s.work, s.others = now, full, 0, 0, 0
}

// take reports whether a side may still have a run of n bytes, and counts it.
func (s *shares) take(u *used, n int) bool {
	n += runWork
	before := u.v.Load()
	done := int(uint32(before))
	if uint32(before>>32) != s.window {
		done = 0
		s.active++
	}
	s.work += n
	u.v.Store(uint64(s.window)<<32 | uint64(min(done+n, 1<<32-1)))
	return s.limit == 0 || done+n <= s.limit || done == 0
}

// stranger counts a datagram that belongs to nobody.
func (s *shares) stranger(n int) { s.others += n + runWork }
