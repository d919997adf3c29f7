package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// roomy is how much garbage may always lie about. 1,000 joins a second make that much in a second.
	roomy = 128 << 20

	// leanest is the least share of what lives that garbage may be, percent: from 170 MB on, which is 70,000 sessions. With 50, collecting took a quarter
	// of the processor that 1,000 joins a second take beside 100,000 sessions: NATS keeps some small objects for each, and the collector looks at all of them.
	leanest = 75

	// usual is the share up to 160 MB. With 100, what 2,000 connections hold that never finish their headers cost twice as much as they hold.
	usual = 80

	leanEvery = 5 * time.Second
	liveHeap  = "/gc/heap/live:bytes" // after the last collection
)

// keepLean sets, until ctx ends, how much garbage the process may hold, by what lives in it: four fifths of that while
// it is less than 160 MB, and then three quarters. An operator's GOGC stands.
func keepLean(ctx context.Context) {
	if os.Getenv("GOGC") != "" {
		return
	}
	tick := time.NewTicker(leanEvery)
	defer tick.Stop()
	live, now := []metrics.Sample{{Name: liveHeap}}, 100
	for {
		metrics.Read(live)
		if p := garbagePercent(live[0].Value.Uint64()); p != now { // setting it stops the world
			debug.SetGCPercent(p)
			now = p
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// garbagePercent is the GOGC for a heap in which so many bytes live.
func garbagePercent(live uint64) int {
	return int(min(max(roomy*100/max(live, 1), leanest), usual)) //nolint:gosec // at most usual
}
