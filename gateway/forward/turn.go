package forward

import (
	"context"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

const (
	// batchBytes is what a batch of packets carries. Sessions take turns where their equal parts would be less.
	batchBytes = 56 << 10
	// turnFrom is from how much on its way sessions take turns: what they are let have without, see [flow.readShare].
	turnFrom = shareBytes / 2 / windowPart
	// turnBytes is what a flow may send in its turn.
	turnBytes = 128 << 10
	// turnRest is what a job may leave of that: less than a segment of a usual path, which it need not send.
	turnRest  = 2 << 10
	turnGrace = 20 * time.Millisecond // for that to come nevertheless
	// turnTotal is what those that have a turn have on their way together. The socket holds twice as much: who begins to send has had
	// none yet.
	turnTotal = 4 << 20
	// turnLeast and turnMost bound how long a turn may last.
	turnLeast = 50 * time.Millisecond
	turnMost  = time.Second
	// turnPatience is how many times as long as turns take of late one may last.
	turnPatience = 4
)

// turns let flows send to the gateway by turns, where so many sessions want to that an equal part for each would be less than a batch: then
// a few at a time have two batches on their way, and the others wait with their windows closed, first come, first served. So sessions are equally
// fast, the socket holds what is on its way, and every step is taken for as many packets as with one session. What has come is carried on at
// once, while it is in the processor's caches, and acknowledged without room for more; the flow's next turn makes room.
type turns struct {
	room   *semaphore.Weighted
	from   int64
	taking atomic.Int64 // how long a turn takes of late, nanoseconds
}

func newTurns(from, total int64) *turns {
	return &turns{room: semaphore.NewWeighted(total), from: from}
}

// needed reports that so many sessions have to take turns.
func (t *turns) needed(sessions int) bool { return int64(sessions)*batchBytes > t.from }

// patience is how long a turn may last. Whoever takes longer, or has gone, keeps the others waiting no longer.
func (t *turns) patience() time.Duration {
	return min(max(turnPatience*time.Duration(t.taking.Load()), turnLeast), turnMost)
}

// note counts a turn that has ended.
func (t *turns) note(took time.Duration) {
	was := t.taking.Load()
	t.taking.Store(was + (int64(took)-was)/8) // of two at the same time one may be lost
}

// turn is one flow's part in turns; its goroutine uses it.
//
//	gather: window moves ── much comes, and all that it was open for ──► pinned, read ── others have had theirs ──► held, window open
//	held ── all has come ──► pinned, read; held ── patience ends, or the target takes no more ──► window moves
type turn struct {
	turns  *turns
	gate   chan struct{} // full while a flow of the session waits or has a turn: it has one at a time, however many its flows
	held   bool
	began  time.Time // of what is held
	leaves bool      // the job sends whole segments only
}

// enter waits for the flow's turn.
func (t *turn) enter(ctx context.Context) error {
	t.leave()
	select {
	case t.gate <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := t.turns.room.Acquire(ctx, turnBytes); err != nil {
		<-t.gate
		return err
	}
	t.held, t.began = true, time.Now()
	return nil
}

// leave ends the turn, if the flow has one.
func (t *turn) leave() {
	if t.held {
		t.held = false
		t.turns.note(time.Since(t.began))
		t.turns.room.Release(turnBytes)
		<-t.gate
	}
}

// gather returns when the job has sent something. Where turns are needed and the job sends much, it waits until all has come that the window
// was open for, and pins that: reading what has come does not let the job send more, the flow's next turn does.
func (r *relay) gather(readable <-chan struct{}) error {
	if !r.bulk || !r.takesTurns() {
		r.giveUp()
		if r.unread() == 0 {
			<-readable // a reset wakes it as well
		}
		return nil
	}
	t, w := &r.turn, r.window
	if w.isPinned() {
		w.settle()
		if err := t.enter(r.fl.ctx); err != nil {
			return err
		}
		w.open(turnBytes, r.unread())
	}
	if !r.collect(readable) {
		r.giveUp()
		r.bulk = false
		return nil // to look once more: what has woken it may have been the end
	}
	w.pin()
	return nil
}

// collect waits until all has come that the window was open for, or the flow ends; false where that takes longer than a turn may last. Less than a
// segment some jobs send, and others leave: which of them this is shows once.
func (r *relay) collect(readable <-chan struct{}) bool {
	t := &r.turn
	timer := time.NewTimer(t.turns.patience())
	defer timer.Stop()
	for last := false; r.isOpen(); {
		switch rest := r.window.promised() - r.unread(); {
		case rest <= 0 || rest < turnRest && t.leaves:
			return true
		case rest < turnRest && !last:
			last = true
			timer.Reset(turnGrace)
		}
		select {
		case <-readable:
		case <-timer.C:
			t.leaves = last
			return last
		}
	}
	return true
}

// giveUp has the flow go on without turns for now.
func (r *relay) giveUp() {
	r.turn.leave()
	r.window.unpin()
}

// takesTurns reports that there are so many sessions that flows have to, and that this one can.
func (r *relay) takesTurns() bool {
	return r.isOpen() && r.turn.turns.needed(r.fl.s.f.hungry.members(time.Now())) && r.window.holds()
}

// isOpen reports that both sides may still have something to say.
func (r *relay) isOpen() bool { return tcp.EndpointState(r.ep.State()) == tcp.StateEstablished }

// unread is how many bytes from the job wait in the stack.
func (r *relay) unread() int64 {
	n, terr := r.ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
	if terr != nil {
		return 0 // the connection has ended
	}
	return int64(n)
}
