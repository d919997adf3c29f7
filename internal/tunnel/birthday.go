package tunnel

import (
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// Bounds of the birthday method. None of what is sent looks like a scan: it goes to one address, where the peer has been seen.
const (
	birthdaySockets = 256                   // that the side behind a hard NAT opens
	birthdayFewest  = 64                    // fewer are not worth a try
	birthdayProbes  = 2048                  // of one session, however long it lasts and however often it tries
	birthdayTry     = 1024                  // of one try, where the other side's sockets stand open: half of what there is
	birthdayTries   = 16                    // that a leading side can have the other prepare for, in a session's life
	birthdayBatch   = 9                     // probes at a time …
	birthdayTick    = 20 * time.Millisecond // … so often: 450 a second
)

// Timing of the birthday method.
const (
	birthdayAfter   = time.Second            // traffic has been relayed for so long
	birthdayAgain   = 500 * time.Millisecond // between two words to the other side
	birthdayAsks    = 20                     // words that are not answered
	birthdayStage   = 10 * time.Second       // for the other side to get ready, and for us
	birthdayHead    = 600 * time.Millisecond // in which 256 sockets say their first word, before ports are tried
	birthdayStand   = 6 * time.Second        // for which they stand open
	birthdayLinger  = 2 * time.Second        // for answers to the last probes
	birthdayRest    = 2 * time.Second        // between two tries, doubled each time …
	birthdayRestMax = 5 * time.Minute        // … up to this
)

// birthdayPhase is how far a try is.
type birthdayPhase int

const (
	birthdayIdle    birthdayPhase = iota
	birthdayMeeting               // words go to and fro
	birthdayOpening               // our sockets are being opened
	birthdayReady                 // and now for the other side
	birthdayProbing
)

// birthday finds a path through two NATs of which at least one is hard: it gives every destination another port, which the other
// side can only guess. Each of many sockets behind it has a port of its own, so few guesses are enough (the birthday paradox).
// Meanwhile traffic is relayed. Like [engine] it does no input or output and reads no clock.
//
// Both sides tell each other in checks what they are behind; the coordinator has no part in it. The leading side begins and numbers
// the tries; the other answers.
//
//	idle ──relayed for a while, or a word comes──► meeting ──► opening ──► ready ──both are──► probing
//	  ▲                                               │           │          │                   │
//	  └──────── no answer, no use, done, a direct path ───────────┴──────────┴───────────────────┘
//
// A hard side opens 256 sockets and sends from each to the one port of an easy side, which tries ports of the hard side's address from
// its one socket. Where both are hard, each guesses ports from many sockets, which has a chance only if both map to few.
type birthday struct {
	lead    bool
	crowd   *crowd
	shuffle func(ports) []uint16 // [ports.shuffled], but in tests

	phase   birthdayPhase
	round   uint8
	theirs  nat.Behind // the other side's last word in this round
	plan    method     // our part in this round, whatever is heard later: what is open and what is guessed belong to it
	ports   ports      // that our NAT maps to, as found out in this round
	sockets int        // that are open for this round
	ends    time.Time  // of the phase

	relayed time.Time // since when traffic has been relayed; zero while it is not
	tick    time.Time // of the next probes
	left    int       // of this round
	turn    int       // of the socket that is next
	guess   guesses
	said    time.Time // our last word
	heard   bool      // the following side: a word is to be answered
	asks    int       // words without an answer
	spent   int       // probes of this session
	begun   time.Time // the following side: when this round was heard of
	entered int       // rounds that were prepared for
	rest    time.Time // no try before
	rests   int
	useless *mapper // what we were behind when the other side's word left no hope
}

// situation is what a birthday needs to know of its peer.
type situation struct {
	own     *mapper
	relayed bool           // there is a path, and no direct one
	target  netip.AddrPort // where the peer has been seen from outside; zero where that is not known
}

// probe is one check that is sent to find a path.
type probe struct {
	socket int // of those that are open; -1 for the tunnel's own
	port   uint16
}

// errand is what a birthday wants done.
type errand struct {
	say    bool // tell the other side [birthday.word]
	open   int  // sockets
	sample bool // and find out which ports they are mapped to
	probes []probe
	over   bool // what is open for this round is not needed any more
}

// errandOver is what is left to do where a round ends.
var errandOver = errand{over: true}

// hear takes the other side's word. The following side starts a round with it.
func (b *birthday) hear(word nat.Behind, now time.Time) (over bool) {
	if b.lead {
		if b.phase != birthdayIdle && word.Round == b.round {
			b.theirs, b.asks = word, 0
		}
		return false
	}
	if word.Round != b.round {
		if now.Sub(b.begun) < birthdayAfter {
			return false // a leading side waits longer than that between two; it will say it again
		}
		over = b.phase != birthdayIdle
		b.finish()
		b.phase, b.round, b.begun = birthdayMeeting, word.Round, now
	}
	if b.phase == birthdayIdle {
		return false // a round that is over
	}
	if b.phase == birthdayMeeting {
		b.ends = now.Add(birthdayStage)
	}
	b.theirs, b.heard = word, true
	return over
}

// finish ends a round.
func (b *birthday) finish() {
	if b.phase > birthdayMeeting {
		b.crowd.leave()
	}
	b.phase, b.plan, b.theirs, b.sockets, b.ports, b.left, b.heard, b.guess = birthdayIdle, noMethod, nat.Behind{}, 0, ports{}, 0, false, guesses{}
}

// end ends a round and says what that takes.
func (b *birthday) end(now time.Time) errand {
	if b.phase == birthdayIdle {
		return errand{}
	}
	b.finish()
	b.rest = now.Add(min(birthdayRest<<min(b.rests, 10), birthdayRestMax))
	b.rests++
	return errandOver
}

// reset is for a network that has changed: what was learnt of the old one says nothing.
func (b *birthday) reset() { b.rest, b.rests, b.useless = time.Time{}, 0, nil }

// word is what the other side is told.
func (b *birthday) word(own *mapper) nat.Behind {
	p := b.known(own)
	return nat.Behind{Mapping: own.mapping, Ready: b.phase >= birthdayReady, Round: b.round, Low: p.low, High: p.high}
}

// known are the ports that our NAT maps to, as far as known.
func (b *birthday) known(own *mapper) ports {
	if own.ports.known() {
		return own.ports
	}
	return b.ports
}

// step gives what is to be done now.
func (b *birthday) step(s situation, now time.Time) errand {
	if !s.relayed {
		b.relayed = time.Time{}
		if b.phase == birthdayIdle {
			b.rests = 0
		}
		return b.end(now)
	}
	if b.relayed.IsZero() {
		b.relayed = now
	}
	if b.phase == birthdayIdle && !b.begin(s, now) {
		return errand{}
	}
	if !now.Before(b.ends) || b.lead && b.asks > birthdayAsks {
		return b.end(now)
	}
	var e errand
	if b.phase == birthdayMeeting {
		e = b.meet(s, now)
	}
	if b.phase == birthdayReady {
		e = b.start(s, now)
	}
	if b.phase == birthdayProbing {
		e.probes = b.batch(s, now)
	}
	e.say = b.say(now)
	return e
}

// begin begins a round, on the leading side.
func (b *birthday) begin(s situation, now time.Time) bool {
	if !b.lead || s.own.mapping == wire.MappingUnknown || s.own == b.useless || !s.target.IsValid() || b.spent >= birthdayProbes {
		return false
	}
	if now.Before(b.rest) || now.Sub(b.relayed) < birthdayAfter {
		return false
	}
	b.round++
	b.phase, b.asks, b.said = birthdayMeeting, 0, time.Time{}
	b.ends = now.Add(birthdayAsks * birthdayAgain * 2)
	return true
}

// method is how a pair of NATs is got through.
type method int

const (
	noMethod  method = iota
	openPorts        // from many sockets to the easy side's port
	tryPorts         // from one socket to ports of the hard side
	tryMany          // from many sockets to ports of a side that is hard like us
)

// method says what our part is; noMethod where there is no hope. Two hard sides first have to find out to how many ports each
// maps: with n probes each and a and b ports they meet n²/ab times on average, and less than twice is not worth it.
func (b *birthday) method(own *mapper) method {
	hard, theirs := own.mapping == wire.MappingHard, b.theirs.Mapping == wire.MappingHard
	switch {
	case own.mapping == wire.MappingUnknown || !b.theirs.Known() || !hard && !theirs:
		return noMethod
	case !theirs:
		return openPorts
	case !hard:
		return tryPorts
	}
	mine, others := b.known(own).size(), (ports{b.theirs.Low, b.theirs.High}).size()
	const most = birthdayProbes * birthdayProbes / 2
	if max(mine, leastRange)*max(others, leastRange) > most {
		return noMethod
	}
	return tryMany
}

// budget is how many probes one try may take.
func (m method) budget() int {
	switch m {
	case openPorts:
		return birthdaySockets
	case tryPorts:
		return birthdayTry
	}
	return birthdayProbes
}

// giveUp ends a round that is of no use, until one side is behind something else. The following side just says what it is behind.
func (b *birthday) giveUp(s situation, now time.Time) errand {
	if !b.lead {
		return errand{}
	}
	b.useless = s.own
	return b.end(now)
}

// meet goes on once it is known what the other side is behind, and that side is ready where it is not for us to begin.
func (b *birthday) meet(s situation, now time.Time) errand {
	if !b.theirs.Known() {
		return errand{}
	}
	m := b.method(s.own)
	if m == noMethod {
		return b.giveUp(s, now)
	}
	if b.lead && !b.theirs.Ready || !s.target.IsValid() || b.spent+m.budget()/2 > birthdayProbes || !b.lead && b.entered >= birthdayTries {
		return errand{}
	}
	want := 0
	if m != tryPorts {
		want = birthdaySockets
	}
	got, ok := b.crowd.enter(want)
	if !ok {
		return errand{} // others are at it: the next word finds a place, perhaps
	}
	b.plan, b.ends = m, now.Add(birthdayStage)
	b.entered++
	if want == 0 {
		b.phase, b.said, b.heard = birthdayReady, time.Time{}, true
		return errand{}
	}
	b.phase = birthdayOpening
	return errand{open: got, sample: !b.known(s.own).known()}
}

// opened notes that sockets are open and to which ports they are mapped. It is false where nobody waits for them any more.
func (b *birthday) opened(round uint8, n int, mapped ports, now time.Time) bool {
	if b.phase != birthdayOpening || b.round != round || n < birthdayFewest {
		return false
	}
	b.phase, b.sockets, b.ports = birthdayReady, n, mapped
	b.ends = now.Add(birthdayStage)
	b.said, b.heard = time.Time{}, true
	return true
}

// start starts probing when both sides are ready.
func (b *birthday) start(s situation, now time.Time) errand {
	if !b.theirs.Ready {
		return errand{}
	}
	m := b.method(s.own)
	if m == tryMany && !(b.known(s.own).known() && b.theirs.High > 0) {
		m = noMethod // nobody could say where our sockets are
	}
	switch m {
	case b.plan:
	case noMethod:
		b.useless = s.own
		return b.end(now)
	default: // a side is behind something else than when this began
		return b.end(now)
	}
	b.phase, b.tick, b.turn = birthdayProbing, now, 0
	b.left = min(m.budget(), birthdayProbes-b.spent)
	b.ends = now.Add(birthdayStage)
	switch m {
	case openPorts:
		b.left = min(b.left, b.sockets)
		b.ends = now.Add(birthdayStand)
	case tryPorts:
		b.tick = now.Add(birthdayHead)
	}
	if m != openPorts && !b.guess.in.known() {
		b.guess.in = ports{b.theirs.Low, b.theirs.High}.sane()
	}
	return errand{}
}

// batch gives the next probes.
func (b *birthday) batch(s situation, now time.Time) (out []probe) {
	if b.left == 0 || now.Before(b.tick) || !s.target.IsValid() {
		return nil
	}
	b.tick = now.Add(birthdayTick)
	n := min(b.left, birthdayBatch)
	b.left -= n
	b.spent += n
	for range n {
		switch b.plan {
		case openPorts:
			out = append(out, probe{b.turn % max(b.sockets, 1), s.target.Port()})
			b.turn++
		case tryPorts:
			out = append(out, probe{-1, b.guess.next(b.shuffle)})
		case tryMany:
			out = append(out, probe{rand.IntN(max(b.sockets, 1)), b.guess.next(b.shuffle)})
		}
	}
	if b.left == 0 && b.plan != openPorts {
		b.ends = now.Add(birthdayLinger)
	}
	return out
}

// say reports whether the other side is to be told now. The leading side repeats itself; the other answers what it has heard.
func (b *birthday) say(now time.Time) bool {
	if b.phase == birthdayIdle || now.Sub(b.said) < birthdayTick {
		return false
	}
	if b.lead && now.Sub(b.said) < birthdayAgain || !b.lead && !b.heard {
		return false
	}
	b.said, b.heard = now, false
	b.asks++
	return true
}

// wake is when step wants to be called; zero if that may wait for anything to happen.
func (b *birthday) wake() time.Time {
	if b.phase == birthdayIdle {
		return time.Time{}
	}
	wake := b.ends
	if b.phase == birthdayProbing && b.left > 0 {
		wake = sooner(wake, b.tick)
	}
	if b.lead {
		wake = sooner(wake, b.said.Add(birthdayAgain))
	} else if b.heard {
		wake = sooner(wake, b.said.Add(birthdayTick))
	}
	return wake
}
