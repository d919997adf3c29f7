package cores

import (
	"context"
	"runtime"
	"sync"
	"testing"
	"time"
)

func TestControl(t *testing.T) {
	type look struct {
		share float64
		rate  uint64 // bytes a second
		want  int
		wait  time.Duration
	}
	for name, looks := range map[string][]look{
		"nothing to do":        {{0, 0, 1, restTick}, {0, 0, 1, restTick}},
		"small packets":        {{0.5, 2e6, 1, tick}, {0.7, 3e6, 1, tick}},
		"one is full":          {{0.5, 1e6, 1, tick}, {0.95, 2e6, 4, tick}},
		"much is carried":      {{0.3, 100e6, 4, tick}},
		"back after a second":  {{0.3, 100e6, 4, tick}, {0.4, 1e6, 4, tick}, {0.4, 1e6, 4, tick}, {0.4, 1e6, 1, tick}},
		"not between bursts":   {{0.9, 0, 4, tick}, {0.1, 0, 4, tick}, {0.1, 0, 4, tick}, {0.6, 0, 4, tick}, {0.1, 0, 4, tick}, {0.1, 0, 4, tick}, {0.1, 0, 1, tick}},
		"nor while some flows": {{0.9, 0, 4, tick}, {0.1, 13e6, 4, tick}, {0.1, 13e6, 4, tick}, {0.1, 13e6, 4, tick}, {0.1, 13e6, 4, tick}},
	} {
		c := control{all: 4, now: 1}
		for i, l := range looks {
			within := 400 * time.Millisecond
			wait := c.step(within, time.Duration(l.share*float64(within)), l.rate*4/10)
			if c.now != l.want || wait != l.wait {
				t.Errorf("%s, look %d: %d processors, the next look after %v", name, i, c.now, wait)
			}
		}
	}
}

func TestNoTime(t *testing.T) {
	if c := (control{all: 4, now: 4}); c.step(0, 0, 0) != tick || c.now != 4 {
		t.Error("looking twice at once changes something")
	}
}

// TestAdapt: a process that does nothing has one processor, and all of them in the end.
func TestAdapt(t *testing.T) {
	all := runtime.GOMAXPROCS(0)
	if all == 1 || processorTime() == 0 {
		t.Skip("there is nothing to adapt here")
	}
	ctx, stop := context.WithCancel(t.Context())
	var work sync.WaitGroup
	begun := make(chan int, 1)
	work.Go(func() {
		Adapt(ctx, func() uint64 {
			select {
			case begun <- runtime.GOMAXPROCS(0):
			default:
			}
			return 0
		})
	})
	if n := <-begun; n != 1 {
		t.Errorf("it begins with %d processors", n)
	}
	stop()
	work.Wait()
	if n := runtime.GOMAXPROCS(0); n != all {
		t.Errorf("%d processors in the end, %d before", n, all)
	}
}
