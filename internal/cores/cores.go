// Package cores gives a process as many processors as its work needs: one while that does it, else all.
//
// A tunnel hands each packet from goroutine to goroutine. With an idle processor at hand, Go's scheduler wakes a thread for nearly every
// one of these steps, which costs more than the step: a process with little to do takes much less processor time on one.
//
//	one ── much is carried, or one is full ──► all ── calm for a second ──► one
package cores

import (
	"context"
	"runtime"
	"time"
)

const (
	// tick is how often the process looks at itself, restTick how often while it does next to nothing.
	tick     = 100 * time.Millisecond
	restTick = 500 * time.Millisecond
	// A process is busy from either on, in bytes a second and as a part of one processor, and calm below both of the others.
	// What is carried counts as well because a process that is kept from running uses little.
	busyRate, calmRate   = 25e6, 12e6
	busyShare, calmShare = 0.8, 0.5
	restShare            = 0.01
	// calm is how long that has to last.
	calm = time.Second
)

// Adapt adapts the process until ctx ends; from then on it has all its processors again. carried counts the bytes that it has carried so far.
// Where the system does not tell what the process uses, and where there is one processor, nothing is done. It is not for a process whose
// GOMAXPROCS somebody has set.
func Adapt(ctx context.Context, carried func() uint64) {
	all := runtime.GOMAXPROCS(0)
	if all == 1 || processorTime() == 0 {
		return
	}
	defer runtime.SetDefaultGOMAXPROCS()
	runtime.GOMAXPROCS(1)
	c := control{all: all, now: 1}
	timer := time.NewTimer(tick)
	defer timer.Stop()
	last, used, bytes := time.Now(), processorTime(), carried()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		at, total, moved := time.Now(), processorTime(), carried()
		before := c.now
		timer.Reset(c.step(at.Sub(last), total-used, max(moved, bytes)-bytes)) // a session that ends takes its count along
		switch {
		case c.now == before:
		case c.now == 1:
			runtime.GOMAXPROCS(1)
		default:
			runtime.SetDefaultGOMAXPROCS() // from then on a changed quota of the container counts again
		}
		last, used, bytes = at, total, moved
	}
}

// control decides how many processors there are.
type control struct {
	all, now int
	calm     time.Duration // how long it has been calm
}

// step takes what was used of processors and carried within a time, and gives when to look again.
func (c *control) step(within, used time.Duration, bytes uint64) time.Duration {
	if within <= 0 {
		return tick
	}
	share, rate := used.Seconds()/within.Seconds(), float64(bytes)/within.Seconds()
	switch {
	case share > busyShare || rate > busyRate:
		c.now, c.calm = c.all, 0
	case share > calmShare || rate > calmRate:
		c.calm = 0
	default:
		if c.calm += within; c.calm >= calm {
			c.now = 1
		}
	}
	if c.now == 1 && share < restShare {
		return restTick
	}
	return tick
}
