package main

import "testing"

func TestGarbagePercent(t *testing.T) {
	for live, want := range map[uint64]int{0: 100, 1: 100, 30 << 20: 100, 128 << 20: 100, 160 << 20: 80, 200 << 20: 60, 256 << 20: 50, 10 << 30: 50, 1 << 63: 50} {
		if got := garbagePercent(live); got != want {
			t.Errorf("%d MB: %d, want %d", live>>20, got, want)
		}
	}
}
