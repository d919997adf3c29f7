package forward

import (
	"sync"
	"time"
)

const (
	// shareBytes is what the flows of all sessions together may have on the way to the jobs, beyond that none gets faster: 3 Gbit/s at
	// 80 ms. Each session that wants more than it has gets an equal part, so sessions are equally fast wherever on their way they wait
	// for each other.
	shareBytes = 32 << 20
	// leastShare is a session's part however many there are: half a batch of packets.
	leastShare = 32 << 10
	// sharePeriod is for how long who has wanted more is counted.
	sharePeriod = 500 * time.Millisecond
)

// census counts who has called it lately. The zero value is ready.
type census struct {
	mu          sync.Mutex
	period      int64
	count, last int
}

// note counts a member, whose last period is in seen, and gives how many there are at the moment: the more of those of this period and of
// the one before.
func (c *census) note(seen *int64, now time.Time) int {
	period := now.UnixNano()/int64(sharePeriod) + 1 // so that a member's zero is no period
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case period == c.period+1:
		c.period, c.last, c.count = period, c.count, 0
	case period > c.period:
		c.period, c.last, c.count = period, 0, 0
	}
	if *seen != c.period {
		*seen = c.period
		c.count++
	}
	return max(c.count, c.last, 1)
}

// part is a flow's equal part of its session's equal part, and how many sessions have one at the moment.
func (fl *flow) part() (bytes int64, sessions int) {
	s, now := fl.s, time.Now()
	sessions = s.f.hungry.note(&s.hungry, now)
	flows := s.hungryFlows.note(&fl.hungry, now)
	return max(max(shareBytes/int64(sessions), leastShare)/int64(flows), smallFloor), sessions
}

// share is how large the send buffer of a flow may be that has just filled it. full says that it should not grow even so far at the
// moment: others have to give back first, or enough waits for its turn already.
func (fl *flow) share() (bytes int64, full bool) {
	bytes, sessions := fl.part()
	return bytes, fl.s.crowded() || sessions > 1 && fl.s.f.purse.lent.Load() >= shareBytes
}

// readShare is how large the receive buffer of a flow may be that reads much. The stack promises the job half of it, so several sessions
// together have 8 MiB on their way to the gateway, which its socket can hold.
func (fl *flow) readShare() int64 {
	bytes, sessions := fl.part()
	if sessions > 1 {
		bytes = max(bytes/2, smallFloor)
	}
	return bytes
}
