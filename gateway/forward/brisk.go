package forward

import (
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

const (
	// briskTrip and briskRate, in bytes a second, are what makes a flow's path brisk: a round trip of at most so long, and at least so much
	// carried. From slowTrip on it is not any more.
	briskTrip = 5 * time.Millisecond
	briskRate = 150 << 20
	slowTrip  = 40 * time.Millisecond
	// briskSend bounds what a flow has on its way over a brisk path, bytes.
	briskSend = 4 << 20
	// briskLook is how long a flow's rate is measured at least.
	briskLook = 10 * time.Millisecond
)

// brisk chooses how a flow finds out how much it may have on its way.
//
// CUBIC's slow start ends when round trips grow, or take as long as the acknowledgements of what was sent at once (HyStart): then a queue
// on the path begins to fill. On a path of less than a millisecond and several Gbit/s what takes so long is both ends' own work, and the window
// stays at a few hundred packets, with which their processors wait for each other. There Reno is used, which goes on until something is lost, or until
// the send buffer holds no more. As nothing else bounds it then, the buffer is smaller.
type brisk struct {
	ep tcpip.Endpoint
	on bool

	at   time.Time // of the last look …
	from int64     // … and what had been carried then
}

// look is told how much the flow has carried in all, whenever its send buffer is full, and says whether its path is brisk.
func (b *brisk) look(carried int64, now time.Time) bool {
	within, n := now.Sub(b.at), carried-b.from
	if within < briskLook {
		return b.on
	}
	first := b.at.IsZero()
	b.at, b.from = now, carried
	if first || !b.on && float64(n) < briskRate*within.Seconds() {
		return b.on
	}
	var info tcpip.TCPInfoOption
	if b.ep.GetSockOpt(&info) != nil || info.CcState != tcpip.Open {
		return b.on
	}
	switch {
	case b.on && info.RTT > slowTrip:
		b.set("cubic", false)
	case !b.on && info.RTT <= briskTrip && info.SndCwnd >= info.SndSsthresh:
		b.set("reno", true)
	}
	return b.on
}

// set begins a slow start: the stack does so whenever what controls the window changes.
func (b *brisk) set(control tcpip.CongestionControlOption, on bool) {
	if b.ep.SetSockOpt(&control) == nil {
		b.on = on
	}
}
