package agent

import (
	"context"
	"encoding/json"
	"sync"

	"github.com/culvertnet/culvert/internal/wire"
)

// maxAnswers bounds the answers that wait to be written, in bytes. A coordinator that offers faster than it reads gets no
// more: it takes an answer that does not come for one that was lost, and withdraws the offer.
const maxAnswers = 8 << 20

// outbox holds what the coordinator is yet to hear. Everything in it is bounded: answers by [maxAnswers], the rest by what
// causes it: one end, one taking over and one renewal for each session, one set of candidates. What whole state will tell on the next hello
// anyway is not kept while there is no stream; renewals are, because their tokens are nowhere else.
type outbox struct {
	mu      sync.Mutex
	wake    chan struct{} // capacity 1
	up      bool
	answers []wire.Frame
	waiting int // their size, in bytes
	ends    []wire.End
	taken   []wire.Taken
	renewed map[string]wire.Renewed
	found   *wire.Trickle // candidates and mapping; nil when the coordinator knows them
	leaving bool
	idle    chan struct{} // closed once all is written; nil when nobody waits
	writing bool
	flows   flowSource // what became of flows; nil for none
}

// flowSource gives batches of flow records.
type flowSource interface {
	Next() (wire.Flows, bool) // the next batch that is due
	Again()                   // what is not acknowledged is due once more
}

func newOutbox() *outbox {
	return &outbox{wake: make(chan struct{}, 1), renewed: map[string]wire.Renewed{}}
}

// open begins a stream whose hello is about to be taken: what happens from here on follows it.
func (o *outbox) open() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.up = true
	o.clear()
	if o.flows != nil {
		o.flows.Again()
	}
}

// poke says that there may be something to write. It takes no lock.
func (o *outbox) poke() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// shut ends a stream.
func (o *outbox) shut() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.up = false
	o.clear()
	o.settle()
}

// clear forgets what belongs to one stream alone. o.mu is held.
func (o *outbox) clear() {
	o.answers, o.waiting, o.ends, o.taken, o.found, o.writing = nil, 0, nil, nil, nil, false
}

func (o *outbox) put(change func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	change()
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// answer queues the answer to the frame with this id.
func (o *outbox) answer(id uint64, a wire.Answer) {
	f := frame(wire.FrameAnswer, id, a)
	o.put(func() {
		if o.up && o.waiting+len(f.Body) <= maxAnswers {
			o.answers = append(o.answers, f)
			o.waiting += len(f.Body)
		}
	})
}

// end queues the end of a session.
func (o *outbox) end(e wire.End) {
	o.put(func() {
		delete(o.renewed, e.Session)
		if o.up {
			o.ends = append(o.ends, e)
		}
	})
}

// takeOver queues the word that a session is carried here now.
func (o *outbox) takeOver(t wire.Taken) {
	o.put(func() {
		if o.up {
			o.taken = append(o.taken, t)
		}
	})
}

// renew queues a renewal over the last one of its session.
func (o *outbox) renew(r wire.Renewed) { o.put(func() { o.renewed[r.Session] = r }) }

// unsent takes back a frame that could not be written, where whole state would not tell it: a renewal, unless a newer one came.
func (o *outbox) unsent(f wire.Frame) {
	var r wire.Renewed
	if f.Type != wire.FrameRenewed || json.Unmarshal(f.Body, &r) != nil {
		return
	}
	o.put(func() {
		if _, newer := o.renewed[r.Session]; !newer {
			o.renewed[r.Session] = r
		}
	})
}

// setCandidates queues the gateway's own candidates and its mapping.
func (o *outbox) setCandidates(c []wire.Candidate, m wire.Mapping) {
	o.put(func() {
		if o.up {
			o.found = &wire.Trickle{Candidates: c, Mapping: m}
		}
	})
}

// leave queues the wish for no new sessions.
func (o *outbox) leave() { o.put(func() { o.leaving = true }) }

// next gives the next frame to write, waiting for one until ctx ends.
func (o *outbox) next(ctx context.Context) (wire.Frame, error) {
	for {
		if f, ok := o.take(); ok {
			return f, nil
		}
		select {
		case <-o.wake:
		case <-ctx.Done():
			return wire.Frame{}, ctx.Err()
		}
	}
}

func (o *outbox) take() (wire.Frame, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.writing = true
	if o.leaving {
		o.leaving = false
		return frame(wire.FrameLeaving, 0, nil), true
	}
	if len(o.answers) > 0 {
		f := o.answers[0]
		o.answers = o.answers[1:]
		o.waiting -= len(f.Body)
		return f, true
	}
	if o.found != nil {
		f := frame(wire.FrameCandidates, 0, o.found)
		o.found = nil
		return f, true
	}
	if len(o.taken) > 0 { // before an end and a renewal of the same session
		f := frame(wire.FrameTaken, 0, o.taken[0])
		o.taken = o.taken[1:]
		return f, true
	}
	if len(o.ends) > 0 {
		f := frame(wire.FrameEnd, 0, o.ends[0])
		o.ends = o.ends[1:]
		return f, true
	}
	for id, r := range o.renewed {
		delete(o.renewed, id)
		return frame(wire.FrameRenewed, 0, r), true
	}
	if o.flows != nil {
		if b, ok := o.flows.Next(); ok {
			return frame(wire.FrameFlows, 0, b), true
		}
	}
	o.writing = false
	o.settle()
	return wire.Frame{}, false
}

// settle tells who waits in flush. o.mu is held.
func (o *outbox) settle() {
	if o.idle != nil {
		close(o.idle)
		o.idle = nil
	}
}

// flush waits until all that is queued has been written, the stream is gone or ctx ends.
func (o *outbox) flush(ctx context.Context) {
	o.mu.Lock()
	if !o.up || (!o.pending() && !o.writing) {
		o.mu.Unlock()
		return
	}
	if o.idle == nil {
		o.idle = make(chan struct{})
	}
	idle := o.idle
	o.mu.Unlock()
	select {
	case <-idle:
	case <-ctx.Done():
	}
}

func (o *outbox) pending() bool {
	return o.leaving || o.found != nil || len(o.answers)+len(o.taken)+len(o.ends)+len(o.renewed) > 0
}

// depth counts what waits to be written, flow records left out.
func (o *outbox) depth() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := len(o.answers) + len(o.taken) + len(o.ends) + len(o.renewed)
	if o.found != nil {
		n++
	}
	return n
}

// frame encodes a message. The bodies are this program's own types, which always encode.
func frame(t wire.FrameType, id uint64, body any) wire.Frame {
	f := wire.Frame{Type: t, ID: id}
	if body != nil {
		f.Body, _ = json.Marshal(body)
	}
	return f
}
