package api

import (
	"encoding/json"
	"sync"

	"github.com/culvertnet/culvert/internal/wire"
)

// Bounds of what a gateway says of its own accord.
const (
	maxWaiting = 32 << 20 // bytes that wait to be worked off; the stream's reader waits when there is more
	maxAtOnce  = 64       // sessions that are worked on at once, of one gateway
	frameCost  = 256      // bytes that a frame takes besides its body
)

// Lines that are no session's.
const (
	plainLine = ""  // what the gateway says of itself
	flowsLine = "#" // records of flows, which wait for the audit log
)

// inbox holds a gateway's own messages until they are worked off: those about one session in their order, and those about different
// sessions beside each other. A renewal that waits gives way to a later one of its session, so that a gateway whose sessions renew faster
// than the state takes it fills the inbox with no more than one each. Nothing waits for it but the inbox itself: behind a reader that waits are the
// answers to offers and the pongs.
type inbox struct {
	room chan struct{} // says that something was taken out
	own  *ledger       // counts what waits here as well

	mu      sync.Mutex
	lines   map[string][]wire.Frame // the first frame of a line that is worked on stays until that is done
	ready   []string                // sessions' lines that nobody works on, the longest waiting first
	working int                     // on sessions' lines
	size    int
}

func newInbox(own *ledger) *inbox {
	return &inbox{room: make(chan struct{}, 1), own: own, lines: map[string][]wire.Frame{}}
}

// count adds to what waits; mu is held.
func (b *inbox) count(n int) {
	b.size += n
	b.own.backlog.Add(int64(n))
}

// close takes out of the sums what nobody will work off any more.
func (b *inbox) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.count(-b.size)
}

// asserted reports whether a message changes what a hello would assert, so that it must not be lost.
func asserted(f wire.Frame) bool {
	return f.Type == wire.FrameRenewed || f.Type == wire.FrameEnd || f.Type == wire.FrameTaken
}

// lineOf says in which line a message waits. What names no session is refused wherever it waits.
func lineOf(f wire.Frame) string {
	switch {
	case f.Type == wire.FrameFlows:
		return flowsLine
	case !asserted(f):
		return plainLine
	}
	var of struct {
		Session string `json:"session"`
	}
	if json.Unmarshal(f.Body, &of) != nil || !sessionID.MatchString(of.Session) {
		return plainLine
	}
	return of.Session
}

func costOf(f wire.Frame) int { return len(f.Body) + frameCost }

// put takes a message. It reports whether there was room, and whether somebody else has to work the line off from now on.
func (b *inbox) put(f wire.Frame) (taken bool, start string, starts bool) {
	line := lineOf(f)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.size >= maxWaiting || b.own.backlog.Load() >= maxBacklog {
		return false, "", false
	}
	list, begun := b.lines[line]
	b.count(costOf(f))
	if last := len(list) - 1; last >= 1 && f.Type == wire.FrameRenewed && list[last].Type == wire.FrameRenewed { // only the first may have begun
		b.count(-costOf(list[last]))
		list[last] = f
		return true, "", false
	}
	b.lines[line] = append(list, f)
	switch {
	case begun:
		return true, "", false
	case line == plainLine || line == flowsLine:
		return true, line, true
	case b.working < maxAtOnce:
		b.working++
		return true, line, true
	}
	b.ready = append(b.ready, line)
	return true, "", false
}

// first gives the frame that a line is at: of two renewals the later one.
func (b *inbox) first(line string) wire.Frame {
	b.mu.Lock()
	defer b.mu.Unlock()
	if list := b.lines[line]; len(list) > 1 && list[0].Type == wire.FrameRenewed && list[1].Type == wire.FrameRenewed {
		b.drop(line)
	}
	return b.lines[line][0]
}

// drop takes the first frame out of a line; mu is held.
func (b *inbox) drop(line string) {
	list := b.lines[line]
	b.count(-costOf(list[0]))
	list[0] = wire.Frame{}
	if b.lines[line] = list[1:]; len(list) == 1 {
		delete(b.lines, line)
	}
	select {
	case b.room <- struct{}{}:
	default:
	}
}

// done takes the first frame out of a line, unless it is to be worked on again. It gives the line with which whoever has worked on this
// one goes on, if any: the one that has waited longest.
func (b *inbox) done(line string, again bool) (next string, more bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !again {
		b.drop(line)
	}
	_, more = b.lines[line]
	if line == plainLine || line == flowsLine {
		return line, more
	}
	if more {
		b.ready = append(b.ready, line)
	}
	if len(b.ready) == 0 {
		b.working--
		return "", false
	}
	next, b.ready = b.ready[0], b.ready[1:]
	return next, true
}
