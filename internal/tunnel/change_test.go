package tunnel

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// relayed adds a path through a relay, over UDP or, with port 0, over a WebSocket.
func (d *drive) relayed(port uint16) *path {
	s := spot{header: header(7)}
	if port > 0 {
		s.remote = addr(port)
	}
	return d.add(&path{spot: s, kind: wire.Relayed, relay: "r"}, d.now)
}

// link is how a path behaves in a drive.
type link struct {
	rtt     time.Duration
	blocked bool
	narrow  int // the MTU of this path, beside the drive's; 0 for any
}

// live runs the drive for a while: checks on paths whose link is open are answered after its round-trip time; flow moves the
// traffic's counters once a tick.
func (d *drive) live(dur time.Duration, links map[*path]*link, flow func() (rx, tx uint64), until func() bool) time.Duration {
	const tick = 10 * time.Millisecond
	type pending struct {
		p  *path
		id nat.TxID
		at time.Time
	}
	var waiting []pending
	start := d.now
	var rx, tx uint64
	for d.now.Sub(start) < dur && !until() {
		d.now = d.now.Add(tick)
		in, out := flow()
		rx, tx = rx+in, tx+out
		d.traffic(rx, tx, d.now)
		before := len(d.orders)
		d.step()
		for i, o := range d.orders[before:] {
			if l := links[o.path]; l != nil && !l.blocked && (d.narrow == 0 || o.mtu <= d.narrow) && (l.narrow == 0 || o.mtu <= l.narrow) {
				waiting = append(waiting, pending{o.path, d.booked[before+i], d.now.Add(l.rtt)})
			}
		}
		rest := waiting[:0]
		for _, w := range waiting {
			if w.at.After(d.now) {
				rest = append(rest, w)
			} else if l := links[w.p]; l != nil && !l.blocked {
				d.answered(w.p, w.id, &route{spot: w.p.spot}, d.now)
			}
		}
		waiting = rest
	}
	return d.now.Sub(start)
}

func never() bool { return false }

// flows of traffic, a tick's bytes.
func bulk() (uint64, uint64)   { return 20_000, 1_000 }
func silent() (uint64, uint64) { return 0, 0 }
func upload() (uint64, uint64) { return 0, 20_000 }

// trickle is what is left of a download whose acknowledgements are lost: the sender repeats itself ever more slowly.
func trickle() func() (uint64, uint64) {
	n, next, gap := 0, 20, 20
	return func() (uint64, uint64) {
		if n++; n >= next {
			gap *= 2
			next += gap
			return 1452, 80
		}
		return 0, 0
	}
}

func TestKindsAreChosenInOrder(t *testing.T) {
	d := newDrive(true)
	ws, udp, direct, host := d.relayed(0), d.relayed(1), d.candidate(wire.Reflexive, 2), d.candidate(wire.Host, 3)
	links := map[*path]*link{
		ws: {rtt: time.Millisecond}, udp: {rtt: 10 * time.Millisecond}, direct: {rtt: 40 * time.Millisecond}, host: {rtt: 80 * time.Millisecond},
	}
	order := []*path{ws, udp, direct, host}
	for i, p := range order {
		for _, later := range order[i+1:] {
			links[later].blocked = true
		}
		links[p].blocked = false
		d.live(10*time.Second, links, bulk, func() bool { return d.chosen == p })
		if d.chosen != p {
			t.Fatalf("path %d of %d is not chosen when it works", i+1, len(order))
		}
	}
	if got := ws.public(); got.Transport != WebSocket || got.Relay != "r" || got.Kind != wire.Relayed {
		t.Errorf("a path over a WebSocket is shown as %+v", got)
	}
}

// A direct path that is blocked, in one direction or both, is left for the relay within three seconds, and taken again within three
// of its healing, however long it was blocked.
func TestBlockedPathIsLeftAndTakenAgain(t *testing.T) {
	for name, tc := range map[string]struct {
		rtt  time.Duration
		left func() func() (uint64, uint64) // what still flows over the blocked path
	}{
		"both ways":           {20 * time.Millisecond, func() func() (uint64, uint64) { return upload }},
		"acknowledgements":    {20 * time.Millisecond, trickle},
		"datagrams come in":   {20 * time.Millisecond, func() func() (uint64, uint64) { return func() (uint64, uint64) { return 20_000, 0 } }},
		"far away":            {250 * time.Millisecond, trickle},
		"nothing flowed then": {20 * time.Millisecond, func() func() (uint64, uint64) { return upload }},
	} {
		t.Run(name, func(t *testing.T) {
			for _, blocked := range []time.Duration{5 * time.Second, time.Minute} {
				d := newDrive(true)
				relay, direct := d.relayed(1), d.candidate(wire.Reflexive, 2)
				links := map[*path]*link{relay: {rtt: tc.rtt * 2}, direct: {rtt: tc.rtt}}
				before := bulk
				if name == "nothing flowed then" {
					before = silent
				}
				d.live(40*time.Second, links, before, never)
				if d.chosen != direct {
					t.Fatal("the direct path does not carry")
				}
				links[direct].blocked = true
				if took := d.live(10*time.Second, links, tc.left(), func() bool { return d.chosen == relay }); took > 3*time.Second {
					t.Errorf("on the relay after %v", took)
				}
				d.live(blocked, links, bulk, never)
				if d.chosen != relay {
					t.Fatal("not on the relay while the path is blocked")
				}
				links[direct].blocked = false
				if took := d.live(40*time.Second, links, bulk, func() bool { return d.chosen == direct }); took > 3*time.Second {
					t.Errorf("blocked for %v: direct again %v after it healed", blocked, took)
				}
				for _, c := range d.history[1:] {
					if !c.Path.Remote.IsValid() {
						t.Errorf("there was no path at all: %+v", d.history)
					}
				}
			}
		})
	}
}

// A full queue on the way makes answers late. While bytes come in, that alone does not end the path.
func TestFullQueueIsNoLoss(t *testing.T) {
	d := newDrive(true)
	relay, direct := d.relayed(1), d.candidate(wire.Reflexive, 2)
	links := map[*path]*link{relay: {rtt: 30 * time.Millisecond}, direct: {rtt: 20 * time.Millisecond}}
	d.live(10*time.Second, links, bulk, never)
	links[direct].rtt = 1200 * time.Millisecond
	changes := len(d.history)
	d.live(30*time.Second, links, bulk, never)
	if len(d.history) != changes {
		t.Errorf("the path changed: %+v", d.history[changes:])
	}
}

// Traffic stays where it is while nothing else is known to work any better, and with the other side gone it ends everywhere.
func TestTrafficMovesToLivingPathsOnly(t *testing.T) {
	d := newDrive(true)
	relay, direct := d.relayed(1), d.candidate(wire.Reflexive, 2)
	links := map[*path]*link{relay: {rtt: 30 * time.Millisecond}, direct: {rtt: 20 * time.Millisecond}}
	d.live(10*time.Second, links, bulk, never)
	links[direct].blocked, links[relay].blocked = true, true
	took := d.live(10*time.Second, links, upload, func() bool { return d.chosen == nil })
	if took > 4*time.Second {
		t.Errorf("the loss of everything is told after %v", took)
	}
	for _, c := range d.history[len(d.history)-1:] {
		if c.Path.Remote.IsValid() {
			t.Errorf("traffic moved to a dead path: %+v", c)
		}
	}
}

func TestFlappingPathHasToLast(t *testing.T) {
	d := newDrive(true)
	relay, direct := d.relayed(1), d.candidate(wire.Reflexive, 2)
	links := map[*path]*link{relay: {rtt: 30 * time.Millisecond}, direct: {rtt: 20 * time.Millisecond}}
	var waits []time.Duration
	for range 7 {
		links[direct].blocked = false
		waits = append(waits, d.live(time.Minute, links, bulk, func() bool { return d.chosen == direct }))
		links[direct].blocked = true
		d.live(time.Minute, links, bulk, func() bool { return d.chosen == relay })
	}
	if waits[1] > 3*time.Second || waits[2] > 3*time.Second {
		t.Errorf("the first returns took %v", waits[:3])
	}
	if last := waits[len(waits)-1]; last < 5*time.Second || last > steadyMost+5*time.Second {
		t.Errorf("a path that was lost six times takes over again after %v", last)
	}
}

// While traffic is relayed, the other side is asked to check again, or its NAT would let none of our checks in. It does so
// quickly, a few times, and only that.
func TestCallHasTheOtherSideCheckAgain(t *testing.T) {
	d := newDrive(true)
	relay, direct := d.relayed(1), d.candidate(wire.Reflexive, 2)
	links := map[*path]*link{relay: {rtt: 30 * time.Millisecond}, direct: {rtt: 20 * time.Millisecond}}
	d.live(20*time.Second, links, bulk, never)
	links[direct].blocked = true
	d.orders, d.booked = nil, nil
	d.live(20*time.Second, links, bulk, never)
	calls := 0
	for _, o := range d.orders {
		if o.call {
			calls++
			if o.path != relay {
				t.Error("called over another path than the chosen one")
			}
		}
	}
	if calls < 5 || calls > 11 {
		t.Errorf("%d calls in 20 s of trying", calls)
	}

	f := newDrive(false)
	candidate := f.candidate(wire.Reflexive, 2)
	f.run(time.Minute)
	through := f.relayed(1)
	f.step()
	f.answer(through, time.Millisecond)
	for i := range 10 {
		f.requested(through, nat.Asked{Seq: uint64(i + 1), Call: true}, f.now)
	}
	if got := f.run(callEvery / 2)[candidate]; got != answerTries {
		t.Errorf("a burst of calls drew %d checks, want %d", got, answerTries)
	}
}

// A word of the leader's that a later one has overtaken counts no more, and one for a path that is not validated leaves traffic
// where it is.
func TestOvertakenNominationIsIgnored(t *testing.T) {
	d := newDrive(false)
	a, b, c := d.candidate(wire.Reflexive, 1), d.candidate(wire.Reflexive, 2), d.candidate(wire.Host, 3)
	d.step()
	for _, p := range []*path{a, b} {
		d.answer(p, time.Millisecond)
	}
	d.requested(b, nat.Asked{Nominate: true, Seq: 10}, d.now)
	d.requested(a, nat.Asked{Nominate: true, Seq: 9}, d.now)
	if d.chosen != b {
		t.Fatal("an older word won")
	}
	d.requested(c, nat.Asked{Nominate: true, Seq: 11}, d.now)
	if d.chosen != b {
		t.Fatal("traffic left a working path for one that is not validated")
	}
	d.step()
	d.answer(c, time.Millisecond)
	if d.chosen != c {
		t.Fatal("traffic does not follow once the path is validated")
	}
}

// What one check from an address that nobody has named can draw is little.
func TestUnknownAddressDrawsFewChecks(t *testing.T) {
	d := newDrive(false)
	p := d.candidate(wire.Observed, 1)
	d.request(p, false)
	if got := d.run(20 * time.Second)[p]; got > answerTries {
		t.Errorf("one check drew %d, at most %d are allowed", got, answerTries)
	}
}

func TestSignalledCandidateIsRemembered(t *testing.T) {
	d := newDrive(false)
	p := d.candidate(wire.Reflexive, 1)
	d.step()
	d.request(p, true)
	d.answer(p, time.Millisecond)
	d.run(followExpiry + time.Second)
	if p.valid || d.chosen != nil || len(d.dropped) != 1 {
		t.Fatal("a path that was silent for so long is still taken")
	}
	if d.find(p.spot) == nil {
		t.Fatal("a candidate that the other side has named is forgotten")
	}
	d.step()
	d.request(p, true)
	d.step()
	d.answer(p, time.Millisecond)
	if d.chosen != p || !p.open.Load() {
		t.Error("it does not come back")
	}
}

func TestReplayWindow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var r replay
		seen := map[uint64]bool{0: true}
		newest := uint64(0)
		base := rapid.Uint64Range(0, 1<<60).Draw(t, "base")
		for range rapid.IntRange(1, 200).Draw(t, "count") {
			n := base + rapid.Uint64Range(0, 3*replayBits).Draw(t, "n")
			if rapid.Bool().Draw(t, "near") {
				n = base + rapid.Uint64Range(0, 40).Draw(t, "small")
			}
			want := !seen[n] && n+replayBits > newest
			if got := r.fresh(n); got != want {
				t.Fatalf("number %d after %d: fresh %v, want %v", n, newest, got, want)
			}
			if want {
				seen[n] = true
				newest = max(newest, n)
			}
		}
	})
}

func TestMTUIsFound(t *testing.T) {
	for _, narrow := range []int{1420, 1419, 1416, 1390, 1280, 1000, 600} {
		d := newDrive(true)
		d.narrow = narrow
		p := d.candidate(wire.Reflexive, 1)
		links := map[*path]*link{p: {rtt: 40 * time.Millisecond}}
		want := 0
		for _, mtu := range mtus {
			if mtu <= narrow && mtu > want {
				want = mtu
			}
		}
		took := d.live(20*time.Second, links, silent, func() bool { return d.settle() == want })
		if d.settle() != want || took > 1500*time.Millisecond {
			t.Errorf("%d bytes fit: %d are relied upon after %v", narrow, d.settle(), took)
		}
		d.orders, d.booked = nil, nil
		d.live(5*time.Minute, links, silent, never)
		padded := 0
		for _, o := range d.orders {
			if o.mtu > 0 {
				padded++
			}
		}
		if d.settle() != want || padded > 3*len(mtus) {
			t.Errorf("%d bytes fit: %d are relied upon after minutes and %d padded checks", narrow, d.settle(), padded)
		}
	}
}

// A path that takes less from some moment on is noticed by the size of its busy checks; one that takes more again is found out later.
func TestMTUFollowsThePath(t *testing.T) {
	d := newDrive(true)
	d.narrow = 1420
	p := d.candidate(wire.Reflexive, 1)
	links := map[*path]*link{p: {rtt: 40 * time.Millisecond}}
	d.live(10*time.Second, links, bulk, never)
	d.narrow = 1350
	took := d.live(20*time.Second, links, bulk, func() bool { return d.settle() == 1348 })
	if d.settle() != 1348 || took > 6*time.Second || d.chosen != p || len(d.history) != 1 {
		t.Errorf("after %v: %d, history %+v", took, d.settle(), d.history)
	}
	d.narrow = 1420
	d.live(2*sizeRaise, links, bulk, func() bool { return d.settle() == 1420 })
	if d.settle() != 1420 {
		t.Errorf("a path that takes more again is used with %d", d.settle())
	}
}

// The MTU is what every path takes that traffic may move to.
func TestMTUHoldsOnEveryPath(t *testing.T) {
	d := newDrive(true)
	a, b := d.candidate(wire.Host, 1), d.relayed(2)
	for _, p := range []*path{a, b} {
		p.valid = true
	}
	a.size.stands, b.size.stands = 1420, 1416
	if got := d.settle(); got != 1416 {
		t.Errorf("the session's MTU is %d", got)
	}
	b.valid = false
	if got := d.settle(); got != 1420 {
		t.Errorf("without the narrow path the session's MTU is %d", got)
	}
	f := newDrive(false)
	p := f.candidate(wire.Host, 1)
	f.requested(p, nat.Asked{Seq: 2, MTU: 1400}, f.now)
	if got := f.settle(); got != 1400 {
		t.Errorf("the follower was told 1400 and takes %d", got)
	}
}
