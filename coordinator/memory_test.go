package main

import "testing"

func TestGarbagePercent(t *testing.T) {
	for live, want := range map[uint64]int{0: 80, 1: 80, 30 << 20: 80, 128 << 20: 80, 160 << 20: 80, 165 << 20: 77, 200 << 20: 75, 10 << 30: 75, 1 << 63: 75} {
		if got := garbagePercent(live); got != want {
			t.Errorf("%d MB: %d, want %d", live>>20, got, want)
		}
	}
}
