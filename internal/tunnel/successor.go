package tunnel

import "time"

const (
	// successorLimit is how long a sole path may be silent where another peer, ready to take its place, answers meanwhile.
	successorLimit = time.Second
	leaveTries     = 5 // checks with which the following side says that it leaves, until one is answered
)

// SetSuccessor names the peer that would take this one's place, or nil. While a path of this peer is silent, the successor is asked whether it
// answers: if so, the fault is this peer's and not the network's around us, and the path is given up sooner.
func (p *Peer) SetSuccessor(other *Peer) { p.successor.Store(other) }

// Leave tells the other side, in a check on the path in use, that it had better go elsewhere: what it makes of that is its own
// business. It is for the following side.
func (p *Peer) Leave() {
	p.act(func(now time.Time) { p.engine.leave(now) })
}

// leave books the checks that say so.
func (e *engine) leave(now time.Time) {
	e.leaving = true
	for _, p := range e.paths {
		if p.valid && (p == e.chosen || e.chosen == nil) {
			p.tries, p.next = 0, now
		}
	}
}

// succeeded asks whether the successor has answered since, and has it asked if not.
func (p *Peer) succeeded(since time.Time) bool {
	other := p.successor.Load()
	if other == nil {
		return false
	}
	if other.alive.Load() > since.UnixNano() {
		return true
	}
	p.tunnel.tasks.Go(other.probe) // its lock is not to be taken under ours
	return false
}

// probe checks the chosen path at once.
func (p *Peer) probe() {
	p.act(func(now time.Time) {
		if c := p.engine.chosen; c != nil && c.tries == 0 {
			c.next = now
		}
	})
}
