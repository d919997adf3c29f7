package tunnel

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

// window bounds how many packets wireguard-go holds between the TUN and the socket, in one direction. Each sits in a buffer
// of 64 KiB, and its queues are thousands deep: without a bound one fast stream fills hundreds of megabytes with packets that
// only wait. With it they wait in the kernel's queues, where the sender's TCP notices.
//
// The device drops packets without a word (no session yet, a failed decryption), so the count drifts. Whoever waits for
// longer than maxWait therefore starts the count anew: the bound is soft, and nothing ever stops here. Towards the TUN the count is that of
// a [flight], so that packets that come twice hold up nobody.
type window struct {
	limit int64 // packets; 0 means no bound
	used  atomic.Int64
	freed chan struct{}

	mu     sync.Mutex
	flight flight
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
		signal(w.freed)
	}
}

// enter counts packets in, by their keys.
func (w *window) enter(keys []uint64) {
	if w.limit == 0 || len(keys) == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, key := range keys {
		w.flight.push(key)
	}
	w.used.Store(int64(w.flight.n))
}

// leave counts out the packet with this key and all that were before it.
func (w *window) leave(key uint64) {
	if w.limit == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	left := int64(w.flight.pop(key))
	if w.used.Store(left); left < w.limit {
		signal(w.freed)
	}
}

// reset starts the count anew.
func (w *window) reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.flight.clear()
	w.used.Store(0)
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
			w.reset()
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

// Write makes room for the packets it has written. What they are is read before: the TUN may write over them.
func (d *windowed) Write(bufs [][]byte, offset int) (int, error) {
	if len(bufs) == 0 || offset < device.MessageTransportHeaderSize {
		return d.Device.Write(bufs, offset)
	}
	key, from := lastOut(bufs, offset), netip.Addr{}
	if d.turns != nil {
		from = source(bufs[0][offset:])
	}
	n, err := d.Device.Write(bufs, offset)
	d.in.leave(key)
	if d.turns != nil {
		d.turns.left(from, key)
	}
	return n, err
}
