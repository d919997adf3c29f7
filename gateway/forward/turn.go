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
	// turnBytes is what a flow has on its way to the gateway in its turn: a batch of packets.
	turnBytes = 56 << 10
	// turnFrom is from how much on its way sessions take turns: what they are let have without, see [flow.readShare].
	turnFrom = shareBytes / 2 / windowPart
	// turnTotal is what those that have a turn have on their way together. The socket holds twice as much: a turn ends before the last of its
	// bytes has come, and who begins to send has had none yet.
	turnTotal = 4 << 20
	// turnLeast and turnMost bound how long a turn may last.
	turnLeast = 50 * time.Millisecond
	turnMost  = time.Second
	// turnPatience is how many times as long as turns take of late one may last.
	turnPatience = 4
)

// turns let flows send to the gateway by turns, where so many sessions want to that an equal part for each would be less than a batch: then
// a few at a time have a batch on its way, and the others wait with their windows closed, first come, first served. So sessions are equally fast,
// the socket holds what is on its way, and every step is taken for as many packets as with one session.
type turns struct {
	room   *semaphore.Weighted
	from   int64
	taking atomic.Int64 // how long a turn takes of late, nanoseconds
}

func newTurns(from, total int64) *turns {
	return &turns{room: semaphore.NewWeighted(total), from: from}
}

// needed reports that so many sessions have to take turns.
func (t *turns) needed(sessions int) bool { return int64(sessions)*turnBytes > t.from }

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
//	gather: idle ── much waits in the stack ──► waits ── others have had theirs ──► held ── as much has come again, or patience ends ──► idle
type turn struct {
	turns *turns
	gate  chan struct{} // full while a flow of the session waits or has a turn: it has one at a time, however many its flows
	held  bool
	began time.Time
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
		t.turns.room.Release(turnBytes)
		<-t.gate
	}
}

// gather returns when the job has sent something. Where turns are needed and the job sends much, it waits for most of a batch and then for the
// flow's turn: reading that lets the job send as much again.
func (r *relay) gather(readable <-chan struct{}) error {
	t := &r.turn
	if !r.bulk || !r.takesTurns() {
		t.leave()
		if r.unread() == 0 {
			<-readable // a reset wakes it as well
		}
		return nil
	}
	patience := t.turns.patience()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for want := r.batch() * 3 / 4; r.unread() < want && r.isOpen(); {
		select {
		case <-readable:
		case <-timer.C:
			if t.held {
				t.turns.note(patience)
			}
			t.leave()
			r.bulk = false
			return nil // to look once more: what has woken it may have been the end
		}
	}
	if t.held {
		t.turns.note(time.Since(t.began))
	}
	return t.enter(r.fl.ctx)
}

// takesTurns reports that there are so many sessions that flows have to.
func (r *relay) takesTurns() bool {
	return r.isOpen() && r.turn.turns.needed(r.fl.s.f.hungry.members(time.Now()))
}

// isOpen reports that both sides may still have something to say.
func (r *relay) isOpen() bool { return tcp.EndpointState(r.ep.State()) == tcp.StateEstablished }

// batch is what the flow can have on its way to the gateway, up to what a turn is for.
func (r *relay) batch() int64 {
	return min(turnBytes, r.ep.SocketOptions().GetReceiveBufferSize()/windowPart)
}

// unread is how many bytes from the job wait in the stack.
func (r *relay) unread() int64 {
	n, terr := r.ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
	if terr != nil {
		return 0 // the connection has ended
	}
	return int64(n)
}
