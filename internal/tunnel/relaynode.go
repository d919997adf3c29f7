package tunnel

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/relay"
)

// Timing of what is said to relays.
const (
	askRetry    = 100 * time.Millisecond // doubled with every try
	askTries    = 4                      // unanswered questions after which a relay is down: 1.5 s
	askDown     = 5 * time.Second        // a relay that is down is asked so often …
	keepReady   = 25 * time.Second       // and one that is kept ready so often, which keeps our NAT's mapping, too,
	keepInUse   = 2 * time.Second        // or so often while traffic flows through it: a restart is noticed
	earlyDials  = 2                      // WebSockets that are dialled before it is known which relays will be used
	earlyFor    = 30 * time.Second       // and for how long
	unusedFor   = 30 * time.Second       // a WebSocket that is not needed is closed after this
	redialFirst = 250 * time.Millisecond // doubled with every failure …
	redialMost  = 30 * time.Second       // … up to this
	usefulFor   = 30 * time.Second       // a WebSocket that lasted so long was no failure
	dialLimit   = 15 * time.Second
)

// udpState is what is known of a relay's UDP port.
type udpState int

const (
	udpUnknown udpState = iota
	udpUp
	udpDown
)

// node is one relay as a tunnel knows it. It does no input or output; its owner holds the lock.
//
//	unknown ──answer──► up ──askTries unanswered──► down
//	   └──── askTries unanswered ──────────────────► │
//	                    ▲──────────── answer ────────┘
type node struct {
	Relay
	kept bool // named by [Tunnel.SetRelays]
	turn int  // its place there
	legs map[*leg]struct{}
	// version rises with every change of what [node.view] gives.
	version atomic.Uint64

	reaches []reach
	used    int // the index of the address in use; -1 while none has answered
	state   udpState
	unsure  bool      // the local network has changed since the last answer
	tries   int       // questions since the last answer
	next    time.Time // when the next one is due; zero means never
	traffic int       // peers whose chosen path leads through here

	stream  *stream
	stands  nat.TxID // of the STAND in flight, or of the last one that was taken
	stood   bool     // the relay has taken it
	dialing bool
	dialed  time.Duration // how long the last dialling took, the relay's first word included
	lonely  map[*leg]struct{}
	needed  time.Time // when the stream was last needed
	redial  time.Time // not before
	lost    time.Time // when the stream ended, or could not be had, the last time
	failed  int
	err     error // of the last dialling
}

// reach is one address of a relay.
type reach struct {
	addr   netip.AddrPort
	offer  relay.Offer
	mapped netip.AddrPort // where the relay sees us
	rtt    time.Duration
	asked  []sent
}

// news is what an answer changed.
type news struct {
	first  bool // the relay answers, which it did not before
	rebind bool // whoever is bound has to bind again: another address, another mapped address, another key
}

func newNode(r Relay) *node {
	n := &node{Relay: r, used: -1, legs: map[*leg]struct{}{}, lonely: map[*leg]struct{}{}}
	n.version.Store(1)
	for _, a := range r.UDP {
		if a = unmap(a); usable(a) && len(n.reaches) < 4 {
			n.reaches = append(n.reaches, reach{addr: a})
		}
	}
	if len(n.reaches) == 0 {
		n.state = udpDown
	}
	return n
}

// ask has the relay asked at once, unless it is being asked.
func (n *node) ask(now time.Time) {
	if len(n.reaches) > 0 && (n.tries == 0 || n.tries > askTries) {
		n.tries, n.next = 0, now
	}
}

// due gives the addresses that are to be asked now: the one in use, or all of them where that does not answer. keep says that
// the relay is to be kept ready. changed says that it is down from now on.
func (n *node) due(now time.Time, keep bool) (to []netip.AddrPort, changed bool) {
	if n.next.IsZero() || n.next.After(now) {
		return nil, false
	}
	if n.tries++; n.tries > askTries {
		if changed = n.state != udpDown; changed {
			n.version.Add(1)
		}
		n.state = udpDown
		n.next = time.Time{}
		if keep || len(n.legs) > 0 {
			n.next = now.Add(askDown)
		}
		if n.tries == askTries+1 {
			return nil, changed
		}
	} else {
		n.next = now.Add(askRetry << (n.tries - 1))
	}
	for i, r := range n.reaches {
		if i == n.used || n.used < 0 || n.tries > 1 {
			to = append(to, r.addr)
		}
	}
	return to, changed
}

// booked notes the question that was sent to an address. It gives the ids of questions whose answer is not waited for any more.
func (n *node) booked(to netip.AddrPort, id nat.TxID, now time.Time) (old []nat.TxID) {
	for i := range n.reaches {
		r := &n.reaches[i]
		if r.addr != to {
			continue
		}
		if len(r.asked) > askTries {
			old = append(old, r.asked[0].id)
			r.asked = slices.Delete(r.asked, 0, 1)
		}
		r.asked = append(r.asked, sent{id: id, at: now})
	}
	return old
}

// answered takes the answer to a question; ok is false where nobody waits for it.
func (n *node) answered(from netip.AddrPort, id nat.TxID, mapped netip.AddrPort, offer relay.Offer, now time.Time) (what news, ok bool) {
	i := slices.IndexFunc(n.reaches, func(r reach) bool { return r.addr == from })
	if i < 0 {
		return what, false
	}
	r := &n.reaches[i]
	at := slices.IndexFunc(r.asked, func(s sent) bool { return s.id == id })
	if at < 0 {
		return what, false
	}
	r.rtt = now.Sub(r.asked[at].at)
	r.asked = r.asked[:0]
	what.first = n.state != udpUp
	what.rebind = i == n.used && (mapped != r.mapped || offer.Key != r.offer.Key)
	r.mapped, r.offer = mapped, offer
	if n.prefers(i) {
		what.rebind = what.rebind || n.used >= 0
		n.used = i
	}
	n.state, n.tries, n.next, n.unsure = udpUp, 0, time.Time{}, false
	n.version.Add(1)
	return what, true
}

// prefers reports whether the address i is to be used from now on: the first that answers, and IPv4 rather than IPv6 while nobody
// is bound and it is no slower, because more of an Ethernet packet is left to the tunnel.
func (n *node) prefers(i int) bool {
	if n.used < 0 || n.state == udpDown {
		return i != n.used
	}
	now, then := &n.reaches[n.used], &n.reaches[i]
	return len(n.legs) == 0 && then.addr.Addr().Is4() && now.addr.Addr().Is6() && then.rtt <= now.rtt+now.rtt/4+2*time.Millisecond
}

// rearm books the next question after an answer.
func (n *node) rearm(now time.Time, keep bool) {
	if n.state != udpUp || n.tries > 0 || !keep || !n.kept && len(n.legs) == 0 {
		return
	}
	wait := keepReady
	if n.traffic > 0 {
		wait = keepInUse
	}
	if at := now.Add(wait); n.next.IsZero() || at.Before(n.next) {
		n.next = at
	}
}

// needs reports whether a WebSocket is needed. A gateway needs one while UDP does not answer: for its sessions, or, as long as it
// may stand, for those to come, and then it does not wait to see whether UDP answers. A client needs one while no path over UDP
// carries its traffic, and at first, so that blocked UDP costs no time.
func (n *node) needs(keep, early, stands bool) bool {
	switch {
	case n.URL == "":
		return false
	case keep:
		return n.state == udpDown && len(n.legs) > 0 || n.kept && stands && (n.state != udpUp || n.unsure)
	}
	return len(n.lonely) > 0 || early && n.kept && n.turn < earlyDials
}

// view is what a leg has to know of its relay.
type view struct {
	up     bool // over UDP
	addr   netip.AddrPort
	mapped netip.AddrPort
	offer  relay.Offer
	stream *stream // nil where none is open
}

func (n *node) view() view {
	v := view{stream: n.stream}
	if n.used >= 0 && n.state == udpUp {
		r := &n.reaches[n.used]
		v.up, v.addr, v.mapped, v.offer = true, r.addr, r.mapped, r.offer
	}
	return v
}

// status is what is told of the relay.
func (n *node) status() RelayStatus {
	s := RelayStatus{Relay: n.Relay, Stream: n.stream != nil, Standing: n.stream != nil && n.stood, Err: n.err}
	if n.used >= 0 && n.state == udpUp {
		r := &n.reaches[n.used]
		s.Reachable, s.RTT, s.Mapped, s.Key = true, r.rtt, r.mapped, r.offer.Key
	} else if n.stream != nil {
		s.RTT, s.Key = n.dialed, n.stream.conn.Offer().Key
	}
	return s
}
