package tunnel

import (
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// Transport is how the packets of a path leave this host.
type Transport string

// The transports.
const (
	UDP       Transport = "udp"
	WebSocket Transport = "websocket"
)

// Path is one way to a peer.
type Path struct {
	Kind      wire.CandidateKind `json:"kind"`            // the remote candidate's kind; [wire.Relayed] through a relay
	Remote    netip.AddrPort     `json:"remote"`          // the peer's address, or the relay's; zero over a WebSocket and without a path
	Relay     string             `json:"relay,omitempty"` // the relay's name
	Transport Transport          `json:"transport"`       // "" without a path
	RTT       time.Duration      `json:"rtt"`             // smoothed round-trip time of path checks, in nanoseconds
}

// Change is one change of path.
type Change struct {
	At   time.Time `json:"at"`
	Path Path      `json:"path"` // zero where none was left
	Why  string    `json:"why"`
}

// spot is where a path's packets come from and go to. It tells paths apart.
type spot struct {
	via    door           // nil for the tunnel's own sockets
	remote netip.AddrPort // zero over a stream
	header uint32         // what stands before each packet on a relay: 0x4 and the channel; 0 on a direct path
}

// path is one way to a peer. Its fields belong to the engine but for those of the first group, which never change.
type path struct {
	peer  *Peer
	spot  spot
	kind  wire.CandidateKind
	relay string // the relay's name, "" on a direct path

	route     *route        // how to send there, with the local address that it was last reached from
	valid     bool          // our own check has come back
	heard     time.Time     // last authentic check or answer from there
	answered  time.Time     // last answer to a check of ours
	replied   time.Time     // when a check from there was last answered
	srtt      time.Duration // smoothed as in RFC 6298, section 2, with alpha 1/4
	tries     int           // checks sent since the last answer
	limit     int           // the following side: checks before the path rests
	suspected time.Time     // when the first of these checks was sent that a validated path has not answered
	next      time.Time     // when the next check is due; zero means none
	outgoing  []sent        // unanswered checks, oldest first
	parked    []byte        // a handshake message that came before the path was validated
	size      sizer         // which packets fit
	far       bool          // the other side is on a stream to the relay

	since  time.Time // when it was validated
	lostAt time.Time // when it was last lost; zero if never
	losses int       // how often it was lost while it carried traffic

	open atomic.Bool // read by receive goroutines: validated once, so packets from there are taken
	gone atomic.Bool // read by receive goroutines: no longer the path of its spot
}

// sent is one check that has not been answered.
type sent struct {
	id  nat.TxID
	at  time.Time
	mtu int // which packet inside the tunnel it stands for; 0 for a plain check
}

const maxOutgoing = 32

// ranks of paths, best first.
const (
	rankHost   = iota // an address of the same network
	rankDirect        // through NATs
	rankRelay         // through a relay over UDP
	rankStream        // through a relay over a WebSocket
)

// rank orders paths by kind, the better ones first.
func (p *path) rank() int {
	switch {
	case p.spot.stream():
		return rankStream
	case p.kind == wire.Relayed:
		return rankRelay
	case p.kind == wire.Host:
		return rankHost
	}
	return rankDirect
}

// direct reports a path that needs no relay.
func (p *path) direct() bool { return p.rank() <= rankDirect }

// stream reports a spot on a relay's WebSocket.
func (s spot) stream() bool { return s.header != 0 && !s.remote.IsValid() }

func (p *path) public() Path {
	t := UDP
	if p.spot.stream() {
		t = WebSocket
	}
	return Path{Kind: p.kind, Remote: p.spot.remote, Relay: p.relay, Transport: t, RTT: p.srtt}
}

// booked notes a check that was sent on p; the oldest unanswered one is forgotten when there are too many.
func (p *path) booked(id nat.TxID, mtu int, now time.Time) {
	if len(p.outgoing) >= maxOutgoing {
		p.outgoing = append(p.outgoing[:0], p.outgoing[1:]...)
	}
	p.outgoing = append(p.outgoing, sent{id, now, mtu})
}

// took removes the check with this id and gives it; false where there is none.
func (p *path) took(id nat.TxID) (sent, bool) {
	for i, s := range p.outgoing {
		if s.id == id {
			p.outgoing = append(p.outgoing[:i], p.outgoing[i+1:]...)
			return s, true
		}
	}
	return sent{}, false
}

// again is when a check that is to be repeated at once is due: over a stream not while the last one is on its way. It may be over already.
func (p *path) again(now time.Time) time.Time {
	if n := len(p.outgoing); n > 0 && p.spot.stream() {
		return p.outgoing[n-1].at.Add(streamRetry)
	}
	return now
}

// owes reports whether a check from the other side is to be answered, and notes that it is. Over a stream a mere repetition is not: the
// answer to the check before is on its way, and a proxy would hold back what follows a second one.
func (p *path) owes(asked nat.Asked, now time.Time) bool {
	asked.Seq, asked.MTU, asked.Tally, asked.Stream = 0, 0, nat.Tally{}, false
	if p.spot.stream() && asked == (nat.Asked{}) && now.Sub(p.replied) < streamAgain {
		return false
	}
	p.replied = now
	return true
}

func (p *path) measure(rtt time.Duration) {
	if p.srtt == 0 {
		p.srtt = rtt
		return
	}
	p.srtt += (rtt - p.srtt) / 4
}

// patience is how long an answer is waited for before the check is repeated.
func (p *path) patience() time.Duration {
	return min(max(p.srtt+p.srtt/2, staleRetry), 2*staleRetry)
}
