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

	// leanest is the least share of what lives that garbage may be, percent: beyond 256 MB, which is 100,000 sessions, memory is worth more
	// than the processor that collecting earlier costs. Packed leases have next to nothing in them for the collector to look at.
	leanest = 50

	leanEvery = 5 * time.Second
	liveHeap  = "/gc/heap/live:bytes" // after the last collection
)

// keepLean sets, until ctx ends, how much garbage the process may hold, by what lives in it: as much as that, as Go does, while that is
// less than 128 MB, and from 256 MB on half of it. An operator's GOGC stands.
func keepLean(ctx context.Context) {
	if os.Getenv("GOGC") != "" {
		return
	}
	tick := time.NewTicker(leanEvery)
	defer tick.Stop()
	live, now := []metrics.Sample{{Name: liveHeap}}, 100
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		metrics.Read(live)
		if p := garbagePercent(live[0].Value.Uint64()); p != now { // setting it stops the world
			debug.SetGCPercent(p)
			now = p
		}
	}
}

// garbagePercent is the GOGC for a heap in which so many bytes live, in steps of ten.
func garbagePercent(live uint64) int {
	return int(min(max(roomy*100/max(live, 1)/10*10, leanest), 100)) //nolint:gosec // at most 100
}
