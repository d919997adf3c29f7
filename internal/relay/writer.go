package relay

import (
	"sync"
	"sync/atomic"
	"time"
)

// writer writes an outbox to a WebSocket, and a ping every [PingInterval]. Its goroutine lives as long as there is something to write, and
// a moment longer: of the many thousand WebSockets that a relay may have, most are at rest.
//
//	asleep ── put, ping ──► running ── nothing for writerLinger ──► asleep
//	                           └── stop, a write failed ──► ended
type writer struct {
	out     *outbox
	to      *socket
	written *atomic.Uint64
	quit    chan struct{}
	due     atomic.Bool // a ping
	running sync.WaitGroup

	mu    sync.Mutex
	ended bool
	ping  *time.Timer
}

// writerLinger is how long the goroutine waits for more.
const writerLinger = time.Second

// newWriter makes the outbox start its writer. [writer.stop] ends it.
func newWriter(out *outbox, to *socket, written *atomic.Uint64) *writer {
	w := &writer{out: out, to: to, written: written, quit: make(chan struct{})}
	w.mu.Lock()
	w.ping = time.AfterFunc(PingInterval, w.tick)
	w.mu.Unlock()
	out.rouse = w.start
	out.asleep.Store(true)
	return w
}

// tick has a ping written.
func (w *writer) tick() {
	w.mu.Lock()
	again := !w.ended
	if again {
		w.ping.Reset(PingInterval)
	}
	w.mu.Unlock()
	if again {
		w.due.Store(true)
		w.out.signal()
	}
}

// start starts the goroutine, unless the writer has ended.
func (w *writer) start() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.ended {
		w.running.Go(w.run)
	}
}

// stop ends the goroutine after the write under way, and lets none start again. The caller waits for running.
func (w *writer) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	w.ping.Stop()
	close(w.quit)
}

func (w *writer) run() {
	linger := time.NewTimer(writerLinger)
	defer linger.Stop()
	for {
		select {
		case <-w.quit:
			return
		case <-w.out.wake:
			if err := w.flush(); err != nil {
				_ = w.to.close() // ends reading
				return
			}
			linger.Reset(writerLinger)
		case <-linger.C:
			if !w.rest() {
				return
			}
			linger.Reset(writerLinger)
		}
	}
}

// rest lets the outbox start another goroutine. It reports true if this one is to go on, because something was put meanwhile.
func (w *writer) rest() bool {
	w.out.asleep.Store(true)
	return len(w.out.wake) > 0 && w.out.asleep.CompareAndSwap(true, false)
}

// flush writes all that waits.
func (w *writer) flush() error {
	if w.due.Swap(false) {
		if err := w.to.ping(); err != nil {
			return err
		}
	}
	return w.out.flush(w.to, w.written)
}
