package forward

import (
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Sizes of a TCP flow's buffers, in bytes.
const (
	freeGrowth = 1 << 20  // a send buffer grows to this size without proof that the job takes what is sent
	mostSend   = 16 << 20 // 1 Gbit/s at 80 ms: the stack wakes a writer when half of it is free
	mostRead   = 16 << 20 // 800 Mbit/s at 80 ms: the stack promises half of it
	bulkRead   = 8 << 10  // what a flow that is short of buffer has read at a time
	bulkLook   = 64 << 10 // or has read in many small pieces
	windowPart = 2        // of a receive buffer the stack promises the job half
)

// Small writes cost the stack a kilobyte each, whatever they hold.
const (
	smallWrite  = 1 << 10
	checkSmall  = 64  // small writes after which to look whether the job takes them
	mostSmall   = 256 // small writes that may wait in the stack
	segmentCost = 1 << 10
)

// window sizes the buffers that a TCP flow has in the stack and pays for them.
//
// A send buffer grows when it is full: at first freely, beyond freeGrowth only once the job has acknowledged half of it, so
// that it is always ahead of the congestion window, which doubles with each round trip at most. It shrinks to its floor when the flow rests, unless bytes still wait in it.
// A receive buffer grows as the stack measures what the flow needs. It shrinks to the flow's share, to a quarter at a time, when others want more as
// well: as the stack never takes back a window that the job has been promised, what it was lent is paid back once the job has used that up.
type window struct {
	ep     *tcp.Endpoint
	purse  *purse
	floors floors

	mu       sync.Mutex
	send     int64 // size of the send buffer
	sendLoan int64
	readLoan int64
	read     int64 // bytes in all
	bulk     int64 // of these, since the share was last looked at
	repay    int64 // of readLoan …
	repayAt  int64 // … when so much has been read
	small    int   // small writes since the stack was seen empty
	pinned   pin
	closed   bool
}

// newWindow sets the buffers of a new connection to their floors.
func newWindow(ep tcpip.Endpoint, p *purse, f floors) *window {
	w := &window{ep: ep.(*tcp.Endpoint), purse: p, floors: f, send: f.send}
	o := w.ep.SocketOptions()
	w.pinned.edge = o.GetReceiveBufferSize() / windowPart // promised before this
	o.SetSendBufferSize(f.send, true)                     // from now on its size is ours to set
	o.SetReceiveBufferSize(f.receive, false)
	return w
}

// setSend sets the send buffer's size. Under the connection's lock, or an acknowledgement under way would put the old size back.
func (w *window) setSend(n int64) {
	w.send = n
	w.ep.LockUser()
	w.ep.SocketOptions().SetSendBufferSize(n, false)
	w.ep.UnlockUser()
	w.ep.WakeupWriters()
}

// fit is called when the send buffer is full; carried is what the flow has sent in all, share and full are what [flow.share] says. It doubles
// the buffer as far as it may, or takes back what is beyond the share.
func (w *window) fit(carried, share int64, full bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.closed:
	case w.send > share:
		w.shrink(share)
	case !full && share-w.send > w.send/8:
		w.grow(carried, min(w.send, share-w.send))
	}
}

// shrink makes the send buffer smaller. What is in it already leaves as it would have. mu is held.
func (w *window) shrink(to int64) {
	back := min(w.send-to, w.sendLoan)
	w.setSend(to)
	w.sendLoan -= back
	w.purse.give(back)
}

// grow makes the send buffer larger by so much if it may. mu is held.
func (w *window) grow(carried, by int64) {
	if by = min(by, mostSend-w.send); by <= 0 || w.send >= freeGrowth && carried < w.send+w.send/2 || !w.purse.take(by, w.send) {
		return
	}
	w.sendLoan += by
	w.setSend(w.send + by)
}

// took is called when the flow has read n bytes that the job sent; share gives how large the receive buffer may be, and whether others want
// more as well: then the buffer grows no further. bulk says that the job sends much.
func (w *window) took(n int, share func() (bytes int64, bounded bool)) (bulk bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.read += int64(n)
	w.bulk += int64(n)
	o := w.ep.SocketOptions()
	before := o.GetReceiveBufferSize()
	bulk = n >= bulkRead || w.bulk >= bulkLook
	if w.closed || !w.pinned.on && w.repays() {
		return bulk
	}
	if bulk {
		w.bulk = 0
		switch most, bounded := share(); {
		case w.pinned.on:
			return bulk
		case before >= most:
			w.narrow(before, max(most, before/4))
			return bulk
		case bounded || w.pinned.ever:
			w.widen(before, min(most, mostRead))
			return bulk
		}
	}
	if before >= mostRead || !w.purse.take(mostRead-before, 0) {
		return bulk
	}
	w.ep.ModerateRecvBuf(n)
	grown := o.GetReceiveBufferSize() - before
	w.purse.give(mostRead - before - grown)
	w.readLoan += grown
	return bulk
}

// widen makes the receive buffer larger, to twice its size at most. The stack would go beyond the share, and what it has promised it cannot take
// back. mu is held.
func (w *window) widen(from, to int64) {
	to = min(to, 2*from)
	if to-from <= from/8 || !w.purse.take(to-from, 0) {
		return
	}
	w.readLoan += to - from
	w.ep.SocketOptions().SetReceiveBufferSize(to, false)
}

// narrow makes the receive buffer smaller. mu is held.
func (w *window) narrow(from, to int64) {
	if from-to <= to/8 {
		return
	}
	w.ep.SocketOptions().SetReceiveBufferSize(to, false)
	w.repay, w.repayAt = min(from-to, w.readLoan), w.read+from/windowPart
}

// repays reports that the job may still use more of the receive buffer than that has by now; what it cannot any more is paid back. mu is held.
func (w *window) repays() bool {
	if w.read < w.repayAt {
		return true
	}
	w.readLoan -= w.repay
	w.purse.give(w.repay)
	w.repay = 0
	return false
}

// rest is called when nothing has been carried for a while.
func (w *window) rest() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed || w.sendLoan == 0 {
		return
	}
	before := w.send
	w.setSend(w.floors.send)
	if w.ep.Readiness(waiter.WritableEvents) == 0 { // the job has not taken what was sent to it
		w.setSend(before)
		return
	}
	w.purse.give(w.sendLoan)
	w.sendLoan = 0
}

// wrote is called after each write of n bytes. False says that so many small ones wait in the stack that the flow has to.
func (w *window) wrote(n int) bool {
	if n >= smallWrite {
		return true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.small++; w.small < checkSmall {
		return true
	}
	return w.settled()
}

// drained looks again after wrote has said no.
func (w *window) drained() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.settled()
}

// settled tells whether the stack has room for more small writes. mu is held.
func (w *window) settled() bool {
	if w.empty() {
		w.small = 0
		return true
	}
	return w.small < mostSmall
}

// empty tells whether the job has acknowledged all that was sent to it. The stack does not say how much waits, only whether
// it is less than the buffer's size; so the size is one byte for a moment, with the connection locked.
func (w *window) empty() bool {
	o := w.ep.SocketOptions()
	w.ep.LockUser()
	defer w.ep.UnlockUser()
	size := o.GetSendBufferSize()
	o.SetSendBufferSize(1, false)
	ready := w.ep.Readiness(waiter.WritableEvents) != 0
	o.SetSendBufferSize(size, false)
	return ready
}

// close pays everything back. The buffers are empty or about to be.
func (w *window) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return
	}
	w.closed = true
	w.purse.give(w.sendLoan + w.readLoan + w.pinned.loan)
}
