package forward

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestTurns: sessions have the same number of turns, whatever the number of their flows, and no more at a time than there is room for.
func TestTurns(t *testing.T) { synctest.Test(t, testTurns) }

func testTurns(t *testing.T) {
	const sessions, room, each = 20, 4, 50
	ts := newTurns(room*batchBytes, room*turnBytes)
	if ts.needed(room) || !ts.needed(room+1) {
		t.Error("turns are needed as soon as not all have room, and not before")
	}
	ctx, over := context.WithTimeout(t.Context(), each*sessions/room*time.Millisecond)
	defer over()
	var work sync.WaitGroup
	var had [sessions]atomic.Int64
	var now atomic.Int64
	for i := range sessions {
		gate := make(chan struct{}, 1)
		for range 1 + i%5 { // flows
			work.Go(func() {
				tn := turn{turns: ts, gate: gate}
				for tn.enter(ctx) == nil {
					if n := now.Add(1); n > room {
						t.Errorf("%d have a turn", n)
					}
					had[i].Add(1)
					time.Sleep(time.Millisecond)
					now.Add(-1)
					tn.leave()
				}
				tn.leave()
			})
		}
	}
	work.Wait()
	for i := range had {
		if n := had[i].Load(); n < each-2 || n > each+2 {
			t.Errorf("session %d with %d flows had %d turns, want %d", i, 1+i%5, n, each)
		}
	}
	if !ts.room.TryAcquire(room * turnBytes) {
		t.Error("a turn was not given back")
	}
}

// TestATurnThatIsGivenUp: a flow that ends while it waits leaves its session's next flow a turn.
func TestATurnThatIsGivenUp(t *testing.T) {
	ts, gate := newTurns(turnBytes, turnBytes), make(chan struct{}, 1)
	other := turn{turns: ts, gate: make(chan struct{}, 1)}
	if err := other.enter(t.Context()); err != nil {
		t.Fatal(err)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	gone := turn{turns: ts, gate: gate}
	for range 2 {
		if err := gone.enter(ended); err == nil {
			t.Fatal("a flow that has ended has a turn, and another has it as well")
		}
	}
	gone.leave()
	other.leave()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	next := turn{turns: ts, gate: gate}
	if err := next.enter(ctx); err != nil {
		t.Fatal("the session has no turn any more")
	}
	next.leave()
	if len(gate) != 0 || !ts.room.TryAcquire(turnBytes) {
		t.Error("the turn was not given back")
	}
}

// TestTurnPatience: a turn may last a few times as long as turns take, within bounds.
func TestTurnPatience(t *testing.T) {
	ts := newTurns(turnFrom, turnTotal)
	for _, c := range []struct{ took, want time.Duration }{
		{0, turnLeast}, {time.Millisecond, turnLeast}, {100 * time.Millisecond, 400 * time.Millisecond}, {time.Minute, turnMost}, {time.Millisecond, turnLeast},
	} {
		for range 200 {
			ts.note(c.took)
		}
		if got := ts.patience(); got < c.want*99/100 || got > c.want {
			t.Errorf("%v after turns of %v, want %v", got, c.took, c.want)
		}
	}
}

// TestUploadsByTurns: uploads that take turns come through whole. A target that takes nothing keeps no turn, and a job that takes one and
// says no more does not for long.
func TestUploadsByTurns(t *testing.T) {
	e := newEnv(t, Limits{})
	e.f.turns = newTurns(batchBytes, turnBytes) // one at a time, so two sessions take turns
	e.add("session-2", other4)
	e.add("session-3", stranger)
	const size = 3 << 20
	counts := make(chan int64, 2)
	target := netip.MustParseAddrPort(server(t, "tcp4", func(c *net.TCPConn) {
		n, _ := io.Copy(io.Discard, c)
		counts <- n
	}))
	free := make(chan struct{})
	stuck := netip.MustParseAddrPort(server(t, "tcp4", func(*net.TCPConn) { <-free }))

	dial := func(from netip.Addr, to netip.AddrPort) net.Conn {
		c, err := e.dialFrom(from, to, 20*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	silent := dial(stranger, stuck)
	var work sync.WaitGroup
	work.Go(func() { _, _ = silent.Write(make([]byte, 32<<20)) })
	idle := dial(stranger, netip.MustParseAddrPort(server(t, "tcp4", func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })))
	work.Go(func() { // some turns' worth; then it has one and sends nothing
		if _, err := idle.Write(make([]byte, 256<<10)); err != nil {
			t.Error(err)
		}
	})
	for _, from := range []netip.Addr{job4, other4} {
		c := dial(from, target)
		work.Go(func() {
			defer c.Close()
			if _, err := c.Write(make([]byte, size)); err != nil {
				t.Error(err)
			}
		})
	}
	for range 2 {
		select {
		case n := <-counts:
			if n != size {
				t.Errorf("%d of %d bytes came through", n, size)
			}
		case <-time.After(time.Minute):
			t.Fatal("an upload did not end")
		}
	}
	_ = silent.Close()
	_ = idle.Close()
	close(free)
	work.Wait()
	eventually(t, "all turns are given back", func() bool {
		if !e.f.turns.room.TryAcquire(turnBytes) {
			return false
		}
		e.f.turns.room.Release(turnBytes)
		return true
	})
}
