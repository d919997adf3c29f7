package forward

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	// shareBytes is what the flows of all sessions together may have on the way to the jobs, beyond that none gets faster: 3 Gbit/s at
	// 80 ms. Each session that wants more than it has gets an equal part, so sessions are equally fast wherever on their way they wait
	// for each other.
	shareBytes = 32 << 20
	// leastShare is a session's part however many there are: half a batch of packets.
	leastShare = 32 << 10
	// fullShare is what a session's part need not exceed so that its packets go in full batches, one on the way and one that is gathered. It
	// has so much where all sessions together carry as much within shareTime, which is how long each waits for all others then.
	fullShare = 128 << 10
	shareTime = 300 * time.Millisecond
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

// members is how many there are at the moment.
func (c *census) members(now time.Time) int {
	period := now.UnixNano()/int64(sharePeriod) + 1
	c.mu.Lock()
	defer c.mu.Unlock()
	switch period {
	case c.period:
		return max(c.count, c.last)
	case c.period + 1:
		return c.count
	}
	return 0
}

// pace measures how much all flows together carry. The zero value is ready.
type pace struct {
	carried atomic.Int64 // bytes

	mu   sync.Mutex
	at   time.Time // of the last look …
	from int64     // … and what had been carried then
	rate int64     // bytes a second
}

// note gives how much is carried within shareTime at the moment.
func (p *pace) note(now time.Time) (bytes int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := now.Sub(p.at); d >= sharePeriod {
		n := p.carried.Load()
		if !p.at.IsZero() {
			p.rate = (p.rate + int64(float64(n-p.from)/d.Seconds())) / 2 // so that a short pause changes little
		}
		p.at, p.from = now, n
	}
	return int64(float64(p.rate) * shareTime.Seconds())
}

// part is a flow's equal part of its session's equal part, for sending and for reading, and how many sessions have one at the moment. budget
// is what those of all sessions come to.
func (fl *flow) part() (send, read, budget int64, sessions int) {
	s, now := fl.s, time.Now()
	sessions = s.f.hungry.note(&s.hungry, now)
	flows := s.hungryFlows.note(&fl.hungry, now)
	n := int64(sessions)
	batch := min(s.f.pace.note(now)/n, fullShare)
	send = max(shareBytes/n, batch, leastShare)
	read = send
	if sessions > 1 {
		read = max(shareBytes/2/n, windowPart*batchBytes)
	}
	return max(send/int64(flows), smallFloor), max(read/int64(flows), smallFloor), max(shareBytes, batch*n), sessions
}

// share is how large the send buffer of a flow may be that has just filled it. full says that it should not grow even so far at the
// moment: others have to give back first, or enough waits for its turn already.
func (fl *flow) share() (bytes int64, full bool) {
	bytes, _, budget, sessions := fl.part()
	return bytes, fl.s.crowded() || sessions > 1 && fl.s.f.purse.lent.Load() >= budget
}

// readShare is how large the receive buffer of a flow may be that reads much. The stack promises the job half of it, so several sessions
// together have 8 MiB on their way to the gateway, which its socket can hold, and a batch where they take turns. bounded says that there are
// several.
func (fl *flow) readShare() (bytes int64, bounded bool) {
	_, bytes, _, sessions := fl.part()
	return bytes, sessions > 1
}
