package repair

import "time"

// When parities are worth their cost. Loss that has a full queue behind it is a word to senders and must reach them: what shows it are a high
// rate, and loss that grows as soon as parities hide it.
const (
	onShare   = 0.003                  // loss from which on parities are sent …
	offShare  = 0.001                  // … and below which they are not any more
	onPackets = 300                    // packets that it takes to see the former
	onLost    = 3                      // and lost ones
	onReports = 2                      // reports that have to tell of loss: one may be of a single full queue
	apart     = 500 * time.Millisecond // between reports that count: a rate over less is a burst's
	window    = 1000                   // packets after which what was counted is forgotten while parities are off
	offWindow = 4000                   // and the same while they are on
	mostShare = 0.15                   // more cannot be repaired
	growth    = 3                      // loss that has grown so many times since parities are sent …
	grownFrom = 0.03                   // … and is at least this …
	grownFor  = 3                      // … in so many reports in a row is the parities' own doing: one is a connection's slow start
	onRate    = 200_000_000            // bit/s above which loss is taken for a full queue …
	offRate   = 600_000_000            // … even while parities are sent
	pauseMin  = time.Minute            // after such a mistake; doubled each time …
	pauseMost = 16 * time.Minute
)

// Governor decides for a sender whether parities are worth it on the path in use. It is not safe for concurrent use.
type Governor struct {
	on      bool
	seen    bool  // there has been a report
	last    Count // the last one
	at      time.Time
	bytes   uint64
	sent    uint32 // packets counted in this window
	lost    uint32
	reports int // of this window that told of loss
	grown   int // reports in a row that told of far more loss than when parities began

	began float64 // loss when parities began
	shown float64 // loss as last known
	until time.Time
	pause time.Duration
}

// Report takes what the receiver has counted, and how many bytes this side has sent so far. It says whether to send parities.
func (g *Governor) Report(c Count, bytes uint64, now time.Time) bool {
	sent, lost, ok := c.Since(g.last)
	if g.seen && !ok {
		return g.on // overtaken by a later one
	}
	elapsed := now.Sub(g.at)
	if g.seen && elapsed < apart {
		return g.on
	}
	rate := 8 * float64(bytes-g.bytes) / elapsed.Seconds()
	first := !g.seen
	g.seen, g.last, g.at, g.bytes = true, c, now, bytes
	if first {
		return g.on
	}
	g.sent, g.lost = g.sent+sent, g.lost+lost
	if lost > 0 {
		g.reports++
	}
	if one := float64(lost) / max(float64(sent), 1); one > mostShare || one >= grownFrom && one > growth*g.began {
		g.grown++
	} else {
		g.grown = 0
	}
	share := float64(g.lost) / max(float64(g.sent), 1)
	if g.sent >= onPackets {
		g.shown = share
	}
	if g.on {
		g.whileOn(share, rate, now)
	} else {
		g.whileOff(share, rate, now)
	}
	return g.on
}

// Reset begins anew on another path.
func (g *Governor) Reset() { *g = Governor{last: g.last, seen: g.seen, at: g.at, bytes: g.bytes} }

// On reports what was decided last.
func (g *Governor) On() bool { return g.on }

// Loss gives the share of packets that were lost lately, as far as known.
func (g *Governor) Loss() float64 { return g.shown }

func (g *Governor) whileOff(share, rate float64, now time.Time) {
	switch {
	case rate > onRate:
		g.begin()
	case g.sent >= onPackets && g.lost >= onLost && g.reports >= onReports && share >= onShare && share <= mostShare && !now.Before(g.until):
		g.on, g.began, g.grown = true, share, 0
		g.begin()
	case g.sent >= window:
		g.begin()
	}
}

func (g *Governor) whileOn(share, rate float64, now time.Time) {
	switch {
	case rate > offRate:
		g.off()
	case g.grown >= grownFor:
		g.pause = min(max(2*g.pause, pauseMin), pauseMost)
		g.until = now.Add(g.pause)
		g.off()
	case g.sent >= offWindow && share < offShare:
		g.off()
	case g.sent >= offWindow:
		g.begin()
	}
}

func (g *Governor) off() {
	g.on = false
	g.begin()
}

// begin begins a window.
func (g *Governor) begin() { g.sent, g.lost, g.reports = 0, 0, 0 }
