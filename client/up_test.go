package main

import (
	"context"
	"runtime/debug"
	"testing"
	"testing/synctest"
	"time"
)

// A join collects next to no garbage, a tunnel that is up collects early, and GOGC has the last word.
func TestGarbageIsCollectedOnceTheTunnelIsUp(t *testing.T) {
	const before = 123
	percent := func() int {
		now := debug.SetGCPercent(before)
		debug.SetGCPercent(now)
		return now
	}
	for _, tc := range []struct {
		gogc                string
		joining, cancel, up int
	}{
		{"", joinGrowth, joinGrowth, idleGrowth},
		{"off", before, before, before},
	} {
		synctest.Test(t, func(t *testing.T) {
			defer debug.SetGCPercent(debug.SetGCPercent(before))
			thrifty := spend(environment{getenv: func(string) string { return tc.gogc }})
			if got := percent(); got != tc.joining {
				t.Errorf("GOGC=%q: the heap may grow by %d %% in the join, want %d", tc.gogc, got, tc.joining)
			}
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			thrifty(ctx)
			if got := percent(); got != tc.cancel {
				t.Errorf("GOGC=%q: the heap may grow by %d %% when cancelled, want %d", tc.gogc, got, tc.cancel)
			}
			began := time.Now()
			thrifty(context.Background())
			if got := percent(); got != tc.up || time.Since(began) > afterJoin {
				t.Errorf("GOGC=%q: the heap may grow by %d %% after %v, want %d", tc.gogc, got, time.Since(began), tc.up)
			}
		})
	}
}
