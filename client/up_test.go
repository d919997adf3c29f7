package main

import (
	"context"
	"os"
	"runtime/debug"
	"testing"
	"testing/synctest"
	"time"
)

// Whose interface it is: the user's who runs the runner, and everybody's where the machine is one job's or it is asked for.
func TestWhoseInterface(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, as whom sudo runs programs")
	}
	for _, c := range []struct {
		sudo, environment string
		shared            bool
		want              int
	}{
		{"3001", "self-hosted", false, 3001},
		{"3001", "", false, 3001},
		{"3001", "github-hosted", false, 0},
		{"3001", "self-hosted", true, 0},
		{"", "self-hosted", false, 0},
		{"0", "self-hosted", false, 0},
		{"x", "self-hosted", false, 0},
	} {
		t.Setenv("SUDO_UID", c.sudo)
		env := environment{getenv: func(string) string { return c.environment }}
		if got := (&upCommand{Shared: c.shared}).user(env); got != c.want {
			t.Errorf("%+v: user %d", c, got)
		}
	}
}

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
