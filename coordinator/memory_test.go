package main

import "testing"

func TestGarbagePercent(t *testing.T) {
	for live, want := range map[uint64]int{0: 80, 1: 80, 30 << 20: 80, 128 << 20: 80, 160 << 20: 80, 200 << 20: 60, 256 << 20: 50, 10 << 30: 50, 1 << 63: 50} {
		if got := garbagePercent(live); got != want {
			t.Errorf("%d MB: %d, want %d", live>>20, got, want)
		}
	}
}
