package tunnel

import (
	"cmp"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// Timing of path checks. A path is probed quickly at first, so that two NATs open towards each other within the same
// round trip, and kept alive well within the 30 s after which NATs forget UDP mappings (RFC 4787, section 4.3).
const (
	firstRetry    = 20 * time.Millisecond   // doubled with every try …
	slowestRetry  = 1280 * time.Millisecond // … up to this
	leadTries     = 11                      // checks before a candidate rests, leading side: 7.7 s
	followTries   = 8                       // the same, following side: 3.8 s
	restUnchosen  = 5 * time.Second         // a resting candidate is probed again while there is no path at all
	restChosen    = 30 * time.Second        // and this often while there is one
	keepChosen    = 10 * time.Second        // checks on the chosen path
	keepOther     = 15 * time.Second        // and on the others that are validated
	staleRetry    = 250 * time.Millisecond  // first retry of a check on a validated path; the others come after twice that
	staleTries    = 3                       // unanswered checks after which a validated path is lost: 1.25 s
	staleTriesAlt = 2                       // the same where another validated path waits
	suspectAfter  = 2 * time.Second         // unanswered traffic for so long makes a path suspect
	samplePeriod  = 500 * time.Millisecond  // how often the leading side looks at its traffic
	followExpiry  = 45 * time.Second        // the following side forgets a path that has been silent for so long
	maxPaths      = 48                      // paths of one peer, observed ones included
	historySize   = 16
)

// engine decides which paths of one peer are checked when, which are validated and which one carries traffic. It does no
// input or output and reads no clock: its methods get the time and say what is to be done, so that every rule can be tested
// by calling them.
//
// One side leads, the client: it probes, keeps paths alive, suspects and chooses. The other follows: it validates what
// the leader checks and sends where the leader last nominated. A path:
//
//	         check answered             unanswered × staleTries
//	probing ───────────────► validated ─────────────────────────► probing
//	   │ tries used up          ▲
//	   ▼                        │ check answered
//	resting ────────────────────┘ (probed again every restUnchosen or restChosen)
type engine struct {
	lead   bool
	paths  []*path
	chosen *path

	sampled  time.Time // last look at the traffic
	rx, tx   uint64    // byte counters at that look
	quiet    time.Time // since when traffic has gone unanswered; zero while it has not
	history  []Change
	onChange func(p *path) // traffic moves to p; nil where no path is left
	onDrop   func(p *path) // p is forgotten
}

// path is one remote address of a peer. Its fields belong to the engine but for remote, peer and kind, which never
// change after it is made.
type path struct {
	peer   *Peer
	remote netip.AddrPort
	kind   wire.CandidateKind

	ep        *conn.StdNetEndpoint // how to send there: address, and the local address that it was reached from
	valid     bool                 // our own check has come back
	heard     time.Time            // last authentic check or answer from there
	srtt      time.Duration        // smoothed as in RFC 6298, section 2, with alpha 1/4
	tries     int                  // checks sent since the last answer
	next      time.Time            // when the next check is due; zero means none
	outgoing  []sent               // unanswered checks, oldest first
	parked    []byte               // a handshake message that came before the path was validated
	nominated bool                 // the following side: the leader's last word was this path

	open atomic.Bool // read by receive goroutines: validated once, so packets from there are taken
	gone atomic.Bool // read by receive goroutines: no longer the path of its address
}

// sent is one check that has not been answered.
type sent struct {
	id nat.TxID
	at time.Time
}

const maxOutgoing = 8

// find gives the path to an address.
func (e *engine) find(remote netip.AddrPort) *path {
	for _, p := range e.paths {
		if p.remote == remote {
			return p
		}
	}
	return nil
}

// add makes a path known and due for a check at once. It returns nil where it is known already or there are too many.
func (e *engine) add(p *path, now time.Time) *path {
	if e.find(p.remote) != nil {
		return nil
	}
	if len(e.paths) >= maxPaths && !e.evict() {
		return nil
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
	e.drop(oldest)
	return true
}

// due gives the paths on which a check is to be sent now, and books the checks after that. The caller
// notes with [path.booked] which id it used.
func (e *engine) due(now time.Time) []*path {
	var due []*path
	for _, p := range e.paths {
		if p.next.IsZero() || p.next.After(now) {
			continue
		}
		if p.valid && e.lost(p) {
			e.invalidate(p, now)
		}
		due = append(due, p)
	}
	for _, p := range due {
		p.tries++
		p.next = e.after(p, now)
	}
	return due
}

// lost reports whether a validated path has gone unanswered for too long.
func (e *engine) lost(p *path) bool {
	limit := staleTries
	if p == e.chosen && e.best(p) != nil {
		limit = staleTriesAlt
	}
	return p.tries >= limit
}

// after gives the time of the check that follows the one sent now.
func (e *engine) after(p *path, now time.Time) time.Time {
	switch {
	case p.valid && !e.lead:
		return time.Time{} // the leader keeps it alive
	case p.valid:
		return now.Add(min(staleRetry<<(p.tries-1), 2*staleRetry))
	case e.lead && p.tries >= leadTries:
		rest := restChosen
		if e.chosen == nil {
			rest = restUnchosen
		}
		return now.Add(rest)
	case !e.lead && p.tries >= followTries:
		return time.Time{}
	}
	return now.Add(min(firstRetry<<(p.tries-1), slowestRetry))
}

// booked notes the id of a check that was sent on p; the oldest unanswered one is forgotten when there are too many.
func (p *path) booked(id nat.TxID, now time.Time) {
	if len(p.outgoing) >= maxOutgoing {
		p.outgoing = slices.Delete(p.outgoing, 0, 1)
	}
	p.outgoing = append(p.outgoing, sent{id, now})
}

// answered handles the authentic answer to a check: p is validated, and may be chosen. It reports false for an answer
// that nobody waits for.
func (e *engine) answered(p *path, id nat.TxID, ep *conn.StdNetEndpoint, now time.Time) bool {
	i := slices.IndexFunc(p.outgoing, func(s sent) bool { return s.id == id })
	if i < 0 {
		return false
	}
	p.measure(now.Sub(p.outgoing[i].at))
	p.outgoing = p.outgoing[:0]
	p.heard, p.ep, p.tries = now, ep, 0
	p.valid = true
	p.open.Store(true)
	p.next = time.Time{}
	if e.lead {
		keep := keepOther
		if p == e.chosen {
			keep, e.quiet = keepChosen, time.Time{}
		}
		p.next = now.Add(keep)
	}
	e.choose(now, "validated")
	return true
}

func (p *path) measure(rtt time.Duration) {
	if p.srtt == 0 {
		p.srtt = rtt
		return
	}
	p.srtt += (rtt - p.srtt) / 4
}

// requested handles an authentic check from the peer. A path that is not validated is checked back at once.
func (e *engine) requested(p *path, nominate bool, now time.Time) {
	p.heard = now
	if !p.valid {
		p.tries = min(p.tries, 2) // the other side is alive: quick retries again
		p.next = now
	}
	if e.lead || !nominate {
		return
	}
	for _, other := range e.paths {
		other.nominated = other == p
	}
	e.choose(now, "nominated")
}

// traffic looks at the byte counters. The leading side suspects its path after two seconds of unanswered traffic and checks it at once.
func (e *engine) traffic(rx, tx uint64, now time.Time) {
	if !e.lead || now.Sub(e.sampled) < samplePeriod {
		return
	}
	answered, sent := rx != e.rx, tx != e.tx
	e.rx, e.tx, e.sampled = rx, tx, now
	switch {
	case answered:
		e.quiet = time.Time{}
	case sent && e.quiet.IsZero():
		e.quiet = now
	}
	if p := e.chosen; p != nil && !e.quiet.IsZero() && now.Sub(e.quiet) >= suspectAfter-samplePeriod && p.tries == 0 {
		p.next = now
	}
}

// drop forgets a path.
func (e *engine) drop(p *path) {
	e.paths = slices.DeleteFunc(e.paths, func(q *path) bool { return q == p })
	e.onDrop(p)
}

// expire drops, on the following side, what has been silent for too long.
func (e *engine) expire(now time.Time) {
	if e.lead {
		return
	}
	var gone []*path
	for _, p := range e.paths {
		if !p.heard.IsZero() && now.Sub(p.heard) >= followExpiry {
			gone = append(gone, p)
		}
	}
	for _, p := range gone {
		e.drop(p)
		if e.chosen == p {
			e.use(e.best(nil), now, "expired")
		}
	}
}

// invalidate takes a validated path back to probing.
func (e *engine) invalidate(p *path, now time.Time) {
	p.valid, p.srtt, p.tries = false, 0, 0
	p.outgoing = p.outgoing[:0]
	if p == e.chosen {
		e.use(e.best(p), now, "silent")
	}
}

// wake gives the time at which the engine next has something to do; zero if never.
func (e *engine) wake(now time.Time) time.Time {
	var wake time.Time
	soonest := func(t time.Time) {
		if !t.IsZero() && (wake.IsZero() || t.Before(wake)) {
			wake = t
		}
	}
	for _, p := range e.paths {
		soonest(p.next)
		if !e.lead && !p.heard.IsZero() {
			soonest(p.heard.Add(followExpiry))
		}
	}
	if e.lead && e.chosen != nil {
		soonest(now.Add(samplePeriod))
	}
	return wake
}

// choose moves traffic where that is better.
func (e *engine) choose(now time.Time, why string) {
	best := e.best(nil)
	if best == nil || best == e.chosen {
		return
	}
	if e.chosen == nil || !e.chosen.valid || e.better(best, e.chosen) {
		e.use(best, now, why)
	}
}

// best gives the best validated path but for one; nil if there is none.
func (e *engine) best(but *path) *path {
	var best *path
	for _, p := range e.paths {
		if p.valid && p != but && (best == nil || e.order(p, best) < 0) {
			best = p
		}
	}
	return best
}

// order compares two validated paths: the nominated one, then kind, then round-trip time.
func (e *engine) order(a, b *path) int {
	if a.nominated != b.nominated {
		if a.nominated {
			return -1
		}
		return 1
	}
	return cmp.Or(cmp.Compare(rank(a.kind), rank(b.kind)), cmp.Compare(a.srtt, b.srtt))
}

// better reports whether a is enough better than the chosen b to move: by nomination or kind always, by round-trip time only with a
// fifth and two milliseconds to spare, so that traffic does not flap between equals.
func (e *engine) better(a, b *path) bool {
	if a.nominated != b.nominated || rank(a.kind) != rank(b.kind) {
		return e.order(a, b) < 0
	}
	return e.lead && a.srtt < b.srtt-max(b.srtt/5, 2*time.Millisecond)
}

// rank orders kinds of path: an address of the same network beats one through NATs.
func rank(k wire.CandidateKind) int {
	switch k {
	case wire.Host:
		return 0
	default:
		return 1
	}
}

// use makes p carry the traffic.
func (e *engine) use(p *path, now time.Time, why string) {
	e.chosen = p
	e.quiet = time.Time{}
	if p != nil && e.lead {
		p.next = now // tell the other side
	}
	if p == nil && e.lead {
		for _, q := range e.paths { // nothing is left: everything is worth a try again
			q.tries, q.next = 0, now
		}
	}
	c := Change{At: now, Why: why}
	if p != nil {
		c.Path = p.public()
	}
	e.history = append(e.history, c)
	if len(e.history) > historySize {
		e.history = slices.Delete(e.history, 0, 1)
	}
	e.onChange(p)
}

func (p *path) public() Path { return Path{Kind: p.kind, Remote: p.remote, RTT: p.srtt} }
