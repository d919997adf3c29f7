package relay

import (
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/udpconn"
)

// lane is what one goroutine forwards with. It is used by one goroutine at a time.
type lane struct {
	server *Server
	counts *counts
	queue  *udpconn.Queue // towards UDP; nil where there is none
	arena  []byte         // answers that wait in queue
	now    int64          // nanoseconds since 1970, when the batch in hand came
	shares *shares        // of a UDP socket's reader; nil elsewhere
	asks   *asks          // likewise

	// patience is how long it may still wait for room in WebSockets' outboxes, for the sake of the message in hand; see enqueue.
	patience time.Duration

	packets, bytes uint64 // in queue
}

// lanes keeps the lanes of a socket through which WebSockets send, for use again.
type lanes struct{ sync.Pool }

// forward sends a run of frames of one channel from one side to the other, as it is.
func (l *lane) forward(c Channel, run []byte, segment int, from origin) {
	segment = min(segment, len(run))
	frames := uint64((len(run) + segment - 1) / segment)
	s := l.server.table.get(c)
	if s == nil {
		l.stranger(frames, run)
		return
	}
	side, b := s.sideOf(from)
	if b == nil || l.now >= b.expires {
		l.stranger(frames, run)
		return
	}
	h := &s.sides[side]
	if l.now-h.heard.Load() > int64(heardEvery) {
		h.heard.Store(l.now)
	}
	to := s.sides[side.Other()].binding.Load()
	if to == nil {
		var kept bool
		if to, kept = l.await(s, side, run, frames); kept {
			return
		}
	}
	switch {
	case to == nil || l.now >= to.expires:
		l.counts.alone.Add(frames)
	case l.shares != nil && !l.shares.take(&h.used, len(run)):
		l.counts.overShare.Add(frames)
	case !h.meter.take(len(run), b.rate, rateBurst, l.now):
		l.counts.overRate.Add(frames)
	case to.link != nil:
		l.enqueue(to.link.out, c, run, segment)
	case l.queue != nil:
		l.queue.Add(run, segment, to.addr, to.local)
		l.packets, l.bytes = l.packets+frames, l.bytes+uint64(len(run))
	}
}

// stranger counts frames that belong to nobody.
func (l *lane) stranger(frames uint64, run []byte) {
	l.counts.stranger.Add(frames)
	if l.shares != nil {
		l.shares.stranger(len(run))
	}
}

// How long the reader of a WebSocket that carries one session waits, for one message, where the other side's does not keep up. Its sender
// notices by its own connection, and slows down without a loss. A WebSocket of many sessions is never kept from being read by one of them.
// A gateway's may become one at any moment, by a BIND that waits behind what is there to be read: it has less patience, and none for
// a while where that was in vain.
const (
	patience        = 100 * time.Millisecond
	gatewayPatience = 20 * time.Millisecond
	tiredFor        = 200 * time.Millisecond
)

// patienceOf is the patience for a WebSocket with these bindings.
func patienceOf(bound map[*binding]struct{}) time.Duration {
	if len(bound) != 1 {
		return 0
	}
	for b := range bound {
		if b.side() == Gateway {
			return gatewayPatience
		}
	}
	return patience
}

// enqueue puts a run into a WebSocket's outbox, in pieces that it takes.
func (l *lane) enqueue(out *outbox, c Channel, run []byte, segment int) {
	if l.patience > 0 && out.room(c) != nil {
		begun, timer := time.Now(), time.NewTimer(l.patience)
		out.wait(c, timer.C)
		timer.Stop()
		l.patience -= time.Since(begun)
	}
	for len(run) > 0 {
		piece := run[:min(maxRun/segment*segment, len(run))]
		frames := uint64((len(piece) + segment - 1) / segment)
		if out.putRun(c, piece, segment) {
			l.counts.packets.Add(frames)
			l.counts.bytes.Add(uint64(len(piece)))
		} else {
			l.counts.overQueue.Add(frames)
		}
		run = run[len(piece):]
	}
}

// heardEvery is how precisely it is kept when a side was heard, so that packets seldom write to what others read.
const heardEvery = IdleLife / 60

// sideOf gives the side that is bound to where a frame came from.
func (s *session) sideOf(from origin) (Side, *binding) {
	for side := range Side(len(s.sides)) {
		if b := s.sides[side].binding.Load(); b != nil && b.is(from) {
			return side, b
		}
	}
	return 0, nil
}

// flush sends what waits for UDP. What the kernel does not take at once is dropped.
func (l *lane) flush() {
	if l.queue == nil {
		return
	}
	dropped := l.queue.Dropped
	l.queue.Flush()
	l.arena = l.arena[:0]
	dropped = l.queue.Dropped - dropped
	if dropped > 0 {
		l.counts.overQueue.Add(dropped)
	}
	if l.packets > 0 {
		sent := l.packets - min(dropped, l.packets)
		l.counts.packets.Add(sent)
		l.counts.bytes.Add(l.bytes / l.packets * sent)
		l.packets, l.bytes = 0, 0
	}
}
