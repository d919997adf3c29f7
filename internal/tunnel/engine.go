package tunnel

import (
	"slices"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// Timing of path checks. A path is probed quickly at first, so that two NATs open towards each other within the same
// round trip, and kept alive well within the 30 s after which NATs forget UDP mappings (RFC 4787, section 4.3).
const (
	firstRetry   = 20 * time.Millisecond   // doubled with every try …
	slowestRetry = 1280 * time.Millisecond // … up to this
	streamRetry  = 320 * time.Millisecond  // and not below this where nothing gets lost on the way
	streamAgain  = 150 * time.Millisecond  // nor is a check that repeats another answered there before
	leadTries    = 11                      // checks before a candidate rests, leading side: 7.7 s
	followTries  = 8                       // the same, following side: 3.8 s
	answerTries  = 3                       // checks that one check from an unknown address, or a call, draws
	restUnchosen = 5 * time.Second         // a resting candidate is probed again while there is no path at all
	restChosen   = 30 * time.Second        // and this often while there is one
	restLost     = 2 * time.Second         // and this often where it has carried traffic …
	lostFor      = 5 * time.Minute         // … within this time
	keepChosen   = 10 * time.Second        // checks on the chosen path
	keepBusy     = time.Second             // while it carries traffic: only an answer proves both directions
	keepAfter    = 4 * time.Second         // and for so long after it has ended: who only receives may be waiting for more
	keepOther    = 15 * time.Second        // and on the others that are validated
	staleRetry   = 250 * time.Millisecond  // retry of a check on a validated path, at least; at most twice that
	staleTries   = 3                       // unanswered checks after which a validated path may be lost
	livelyLimit  = 1500 * time.Millisecond // unanswered checks are put up with for so long while much comes in
	soleLimit    = 2 * time.Second         // and for so long where no other path is validated
	samplePeriod = 250 * time.Millisecond  // how often the leading side looks at its traffic
	livelyBytes  = 4 << 10                 // received within a sample: more than a sender's repetitions
	followExpiry = 45 * time.Second        // the following side forgets a path that has been silent for so long
	callEvery    = 2 * time.Second         // the other side is asked to check its candidates again at most so often
	steadyAfter  = 2                       // a path that was lost more often than this …
	steadyFor    = 2 * time.Minute         // … in this time has to last before it carries traffic again,
	steadyMost   = 30 * time.Second        // a second at first, doubled each time, up to this
	maxPaths     = 48                      // paths of one peer, observed ones included
	historySize  = 16
)

// engine decides which paths of one peer are checked when, which are validated and which one carries traffic. It does no
// input or output and reads no clock: its methods get the time and say what is to be done, so that every rule can be tested
// by calling them.
//
// One side leads, the client: it probes, keeps paths alive, suspects and chooses. The other follows: it validates what
// the leader checks and sends where the leader last nominated. A path:
//
//	         check answered             staleTries unanswered
//	probing ───────────────► validated ───────────────────────► probing
//	   │ tries used up          ▲
//	   ▼                        │ check answered
//	resting ────────────────────┘ (probed again after restUnchosen, restChosen or restLost)
type engine struct {
	lead   bool
	paths  []*path
	chosen *path
	mtu    int // of the session, as far as known; 0 before
	most   int // the largest MTU that is looked for
	said   int // the MTU that our last checks have told

	// Leading.
	begun   time.Time // when the first path was added
	sampled time.Time // last look at the traffic
	rx, tx  uint64    // byte counters at that look
	busy    time.Time // when there was traffic last
	lively  bool      // much came in within the last two samples
	much    bool      // within the last one
	called  time.Time // when the other side was last asked to check again; following: when we last did

	// Following.
	nominee   *path  // the leader's last word
	nominated uint64 // its number
	leaving   bool   // our checks say so, see [Peer.Leave]

	history  []Change
	onChange func(p *path) // traffic moves to p; nil where no path is left
	onDrop   func(p *path) // nothing is taken from p any more
	// succeeded reports whether another peer, which would take this one's place, has answered since. It asks it; see [Peer.SetSuccessor].
	succeeded func(since time.Time) bool
}

// order is one check to be sent.
type order struct {
	*path
	mtu    int        // padded to stand for a packet of this size inside the tunnel; 0 for a plain check
	call   bool       // asks the other side to check its candidates again
	behind nat.Behind // says what we are behind, or nothing
}

// find gives the path of a spot.
func (e *engine) find(s spot) *path {
	for _, p := range e.paths {
		if p.spot == s {
			return p
		}
	}
	return nil
}

// add makes a path known and due for a check at once. It returns nil where it is known already or there are too many.
func (e *engine) add(p *path, now time.Time) *path {
	if e.find(p.spot) != nil {
		return nil
	}
	if len(e.paths) >= maxPaths && !e.evict() {
		return nil
	}
	if e.begun.IsZero() {
		e.begun = now
	}
	p.limit = followTries
	if p.kind == wire.Observed {
		p.limit = answerTries
	}
	p.next = now
	e.paths = append(e.paths, p)
	return p
}

// evict makes room by dropping the observed path that has been silent longest.
func (e *engine) evict() bool {
	var oldest *path
	for _, p := range e.paths {
		if p.kind == wire.Observed && !p.valid && (oldest == nil || p.heard.Before(oldest.heard)) {
			oldest = p
		}
	}
	if oldest == nil {
		return false
	}
	e.drop(oldest, time.Time{})
	return true
}

// due gives the checks that are to be sent now, and books the ones after that. The caller notes with [path.booked] which
// ids it used.
func (e *engine) due(now time.Time) []order {
	for _, p := range e.paths {
		if p.isDue(now) && p.valid && e.lead && p.tries >= staleTries {
			e.overdue(p, now)
		}
	}
	if m := e.told(); m != e.said {
		e.said = m
		e.chosen.next = now // the other side need not wait for the next one to hear it
	}
	if c := e.chosen; c != nil && e.lead && c.isDue(now) && c.tries > 0 {
		e.warm(c, now)
	}
	var orders []order
	for _, p := range e.paths {
		if p.isDue(now) {
			orders = append(orders, e.check(p, now))
		}
		if p.valid && e.lead {
			for _, mtu := range p.size.due(p.srtt, now) {
				orders = append(orders, order{path: p, mtu: mtu})
			}
		}
	}
	return e.call(orders, now)
}

func (p *path) isDue(now time.Time) bool { return !p.next.IsZero() && !p.next.After(now) }

// check books a check on p.
func (e *engine) check(p *path, now time.Time) order {
	o := order{path: p}
	if p.tries++; p.tries == 1 {
		p.suspected = now
		if p.valid && p == e.chosen && now.Sub(e.busy) < keepBusy && !p.size.searching(now) {
			o.mtu = p.size.stands
		}
	}
	p.next = e.after(p, now)
	return o
}

// after gives the time of the check that follows the one sent now.
func (e *engine) after(p *path, now time.Time) time.Time {
	switch {
	case p.valid && !e.lead && e.leaving && p.tries < leaveTries:
		return now.Add(staleRetry)
	case p.valid && !e.lead:
		return time.Time{} // the leader keeps it alive
	case p.valid:
		return now.Add(p.patience())
	case e.lead && p.tries >= leadTries:
		return now.Add(e.rest(p, now))
	case !e.lead && p.tries >= p.limit:
		return time.Time{}
	}
	retry := min(firstRetry<<(p.tries-1), slowestRetry)
	if p.spot.stream() {
		retry = max(retry, streamRetry)
	}
	return now.Add(retry)
}

// rest is how long a path that does not answer is left alone.
func (e *engine) rest(p *path, now time.Time) time.Duration {
	switch {
	case !p.lostAt.IsZero() && now.Sub(p.lostAt) < lostFor:
		return restLost
	case e.chosen == nil:
		return restUnchosen
	}
	return restChosen
}

// warm has the other validated paths checked, as soon as the chosen one fails to answer: traffic moves only to a path that is known to be alive.
func (e *engine) warm(c *path, now time.Time) {
	e.succeeded(c.suspected)
	for _, p := range e.paths {
		if p != c && p.valid && p.tries == 0 && !p.answered.After(c.suspected) {
			p.next = now
		}
	}
}

// overdue decides on a validated path whose checks have gone unanswered. The chosen one stays while it is unclear whether another
// path is any better, and for a little longer while much comes in: a full queue delays answers, too.
func (e *engine) overdue(p *path, now time.Time) {
	if p != e.chosen {
		e.invalidate(p, now)
		return
	}
	silent := now.Sub(p.suspected)
	if e.lively && silent < livelyLimit {
		return
	}
	others := false
	for _, q := range e.paths {
		if q == p || !q.valid {
			continue
		}
		if q.answered.After(p.suspected) {
			e.invalidate(p, now)
			return
		}
		others = true // it is being checked
	}
	if !others && silent >= soleLimit || silent >= successorLimit && e.succeeded(p.suspected) {
		e.invalidate(p, now)
	}
}

// call adds to the orders that the other side is to check its candidates again, where a direct path is being probed anew
// while traffic flows through a relay: without its checks its NAT lets none of ours in.
func (e *engine) call(orders []order, now time.Time) []order {
	c := e.chosen
	if !e.lead || c == nil || c.direct() || now.Sub(e.called) < callEvery || now.Sub(e.begun) < lostTime(followTries) {
		return orders
	}
	if !slices.ContainsFunc(orders, func(o order) bool { return !o.valid && o.direct() }) {
		return orders
	}
	e.called = now
	return append(orders, order{path: c, call: true})
}

// lostTime is how long so many tries take.
func lostTime(tries int) time.Duration {
	return min(firstRetry<<tries, time.Duration(tries)*slowestRetry)
}

// recall is what the following side does when it is called.
func (e *engine) recall(now time.Time) {
	if now.Sub(e.called) < callEvery/2 {
		return
	}
	e.called = now
	for _, p := range e.paths {
		if p.direct() && !p.valid {
			p.tries, p.limit, p.next = 0, answerTries, now
		}
	}
}

// answered handles the authentic answer to a check: p is validated, and may be chosen. It reports false for an answer
// that nobody waits for.
func (e *engine) answered(p *path, id nat.TxID, r *route, now time.Time) bool {
	s, ok := p.took(id)
	if !ok {
		return false
	}
	p.measure(now.Sub(s.at))
	p.heard, p.answered, p.route, p.tries = now, now, r, 0
	if !p.valid {
		p.valid, p.since = true, now
		p.open.Store(true)
		if e.lead {
			e.search(p, now)
		}
	}
	p.next = time.Time{}
	if e.lead {
		e.sized(p, s, now)
		p.next = now.Add(keepOther)
		if p == e.chosen {
			p.next = now.Add(keepChosen)
		}
		if c := e.chosen; c != nil && c != p && c.valid && c.tries >= staleTries {
			e.overdue(c, now)
		}
	}
	e.choose(now, "validated")
	return true
}

// requested handles an authentic check from the peer, which asks for something. A path that is not validated is checked
// back at once.
func (e *engine) requested(p *path, asked nat.Asked, now time.Time) {
	p.heard, p.far = now, asked.Stream
	if !p.valid {
		p.tries = min(p.tries, 2) // the other side is alive: quick retries again
		if p.kind == wire.Observed {
			p.tries = 0
		}
		p.next = p.again(now)
	}
	if e.lead || asked.Seq <= e.nominated {
		return // a word that a later one has overtaken
	}
	if asked.MTU > 0 {
		e.mtu = int(asked.MTU)
	}
	if asked.Call {
		e.recall(now)
	}
	if asked.Nominate {
		e.nominee, e.nominated = p, asked.Seq
		e.choose(now, "nominated")
	}
}

// traffic looks at the byte counters. The leading side checks a busy path every second.
func (e *engine) traffic(rx, tx uint64, now time.Time) {
	if !e.lead || now.Sub(e.sampled) < samplePeriod {
		return
	}
	in, out := rx-e.rx, tx-e.tx
	e.rx, e.tx, e.sampled = rx, tx, now
	e.lively, e.much = e.much && in >= livelyBytes, in >= livelyBytes
	if in > 0 || out > 0 {
		e.busy = now
	} else if now.Sub(e.busy) >= keepAfter {
		return
	}
	if p := e.chosen; p != nil && p.tries == 0 && now.Sub(p.answered) >= keepBusy {
		p.next = now
	}
}

// refresh has every path checked at once: the local network may have changed.
func (e *engine) refresh(now time.Time) {
	for _, p := range e.paths {
		p.tries, p.next = 0, now
		if !e.lead {
			p.limit = answerTries
		}
		if p.valid && e.lead {
			e.search(p, now)
		}
	}
}

// moved replaces a validated path by the same one over another transport: the relay has confirmed that we are bound there now, and
// takes nothing from the old place any more. The way behind the relay has not changed.
func (e *engine) moved(from, to *path, now time.Time) {
	to.valid, to.since, to.heard, to.answered, to.srtt = true, now, now, now, from.srtt
	to.far = from.far
	to.route = &route{spot: to.spot}
	to.tries, to.next = 0, now
	to.open.Store(true)
	if e.lead {
		e.search(to, now)
	}
	if e.nominee == from {
		e.nominee = to
	}
	if e.chosen == from {
		e.use(to, now, "moved")
	}
	e.drop(from, now)
}

// drop forgets a path.
func (e *engine) drop(p *path, now time.Time) {
	e.paths = slices.DeleteFunc(e.paths, func(q *path) bool { return q == p })
	p.valid = false
	if e.nominee == p {
		e.nominee = nil
	}
	e.onDrop(p)
	if e.chosen == p {
		e.use(e.best(nil), now, "dropped")
	}
}

// expire ends, on the following side, what has been silent for too long. What was signalled is remembered.
func (e *engine) expire(now time.Time) {
	if e.lead {
		return
	}
	for _, p := range slices.Clone(e.paths) {
		if p.heard.IsZero() || now.Sub(p.heard) < followExpiry {
			continue
		}
		if p.kind == wire.Observed {
			e.drop(p, now)
			continue
		}
		p.valid, p.heard, p.next = false, time.Time{}, time.Time{}
		e.onDrop(p)
		if e.chosen == p {
			e.use(e.best(nil), now, "silent")
		}
	}
}

// invalidate takes a validated path back to probing.
func (e *engine) invalidate(p *path, now time.Time) {
	p.valid, p.srtt, p.tries, p.lostAt, p.next = false, 0, 0, now, now
	p.outgoing = p.outgoing[:0]
	if p == e.chosen {
		p.losses++
		e.use(e.best(nil), now, "silent")
	}
}

// wake gives the time at which the engine next has something to do; zero if never.
func (e *engine) wake(now time.Time) time.Time {
	var wake time.Time
	for _, p := range e.paths {
		wake = sooner(wake, p.next)
		switch {
		case e.lead && p.valid:
			wake = sooner(wake, p.size.next)
		case !e.lead && !p.heard.IsZero():
			wake = sooner(wake, p.heard.Add(followExpiry))
		}
	}
	if e.lead && e.chosen != nil {
		wake = sooner(wake, now.Add(samplePeriod))
	}
	return wake
}

// sooner gives the earlier of two times, of which a zero one means never.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
