package tunnel

import (
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/tun"
)

// window bounds how many packets wireguard-go holds between the TUN and the socket, in one direction. Each sits in a buffer
// of 64 KiB, and its queues are thousands deep: without a bound one fast stream fills hundreds of megabytes with packets that
// only wait. With it they wait in the kernel's queues, where the sender's TCP notices.
//
// The device drops packets without a word (no session yet, a failed decryption), so the count drifts. Whoever waits for
// longer than maxWait therefore starts the count anew: the bound is soft, and nothing ever stops here.
type window struct {
	limit int64 // packets; 0 means no bound
	used  atomic.Int64
	freed chan struct{}
}

const maxWait = 5 * time.Millisecond

func newWindow(limit int) *window {
	return &window{limit: int64(limit), freed: make(chan struct{}, 1)}
}

// take counts packets in.
func (w *window) take(n int) {
	if w.limit > 0 {
		w.used.Add(int64(n))
	}
}

// give counts packets out.
func (w *window) give(n int) {
	if w.limit == 0 {
		return
	}
	left := w.used.Add(-int64(n))
	if left < 0 {
		w.used.CompareAndSwap(left, 0)
	}
	if left < w.limit {
		select {
		case w.freed <- struct{}{}:
		default:
		}
	}
}

// wait returns when there is room, or after maxWait. timer belongs to the caller.
func (w *window) wait(timer *time.Timer) {
	if w.limit == 0 || w.used.Load() < w.limit {
		return
	}
	timer.Reset(maxWait)
	defer timer.Stop()
	for w.used.Load() >= w.limit {
		select {
		case <-w.freed:
		case <-timer.C:
			w.used.Store(0)
			return
		}
	}
}

func stoppedTimer() *time.Timer {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	return timer
}

// windowed is a TUN device whose packets are counted: out of it into the device, and from the device into it.
type windowed struct {
	tun.Device
	out, in *window
	turns   *turns      // nil where there are none
	timer   *time.Timer // Read's; the device reads from one goroutine
}

// Read waits for room before it takes packets from the TUN.
func (d *windowed) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	d.out.wait(d.timer)
	n, err := d.Device.Read(bufs, sizes, offset)
	d.out.take(n)
	return n, err
}

// Write makes room for the packets it has written.
func (d *windowed) Write(bufs [][]byte, offset int) (int, error) {
	n, err := d.Device.Write(bufs, offset)
	d.in.give(len(bufs))
	if d.turns != nil && len(bufs) > 0 {
		d.turns.left(bufs, offset)
	}
	return n, err
}
