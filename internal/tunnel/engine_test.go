package tunnel

import (
	"net/netip"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// drive runs an engine against a clock of its own.
type drive struct {
	*engine
	now     time.Time
	carried []*path // what onChange said, nil for none
	dropped []*path
	sent    map[*path][]nat.TxID
	ids     int
	seq     uint64
	narrow  int     // the MTU of every path; 0 leaves padded checks out
	orders  []order // all that were given
	booked  []nat.TxID
}

func newDrive(lead bool) *drive {
	d := &drive{now: time.Unix(1_000_000, 0), sent: map[*path][]nat.TxID{}}
	d.engine = &engine{lead: lead, most: DefaultMTU, succeeded: func(time.Time) bool { return false }}
	d.onChange = func(p *path) { d.carried = append(d.carried, p) }
	d.onDrop = func(p *path) { d.dropped = append(d.dropped, p) }
	return d
}

func addr(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 1}), port)
}

func (d *drive) candidate(kind wire.CandidateKind, port uint16) *path {
	return d.add(&path{spot: spot{remote: addr(port)}, kind: kind}, d.now)
}

// step sends what is due.
func (d *drive) step() (due []*path) {
	d.expire(d.now)
	for _, o := range d.due(d.now) {
		d.ids++
		id := nat.TxID{10: byte(d.ids >> 8), 11: byte(d.ids)}
		o.booked(id, o.mtu, d.now)
		d.orders, d.booked = append(d.orders, o), append(d.booked, id)
		if o.mtu > 0 && d.narrow == 0 {
			continue // no search
		}
		d.sent[o.path] = append(d.sent[o.path], id)
		due = append(due, o.path)
	}
	return due
}

// run steps through d of time, as the timer would.
func (d *drive) run(dur time.Duration) (checks map[*path]int) {
	checks = map[*path]int{}
	for end := d.now.Add(dur); ; {
		for _, p := range d.step() {
			checks[p]++
		}
		wake := d.wake(d.now)
		if wake.IsZero() || wake.After(end) {
			d.now = end
			return checks
		}
		d.now = maxTime(wake, d.now.Add(time.Microsecond))
	}
}

func maxTime(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// answer answers the last check on p after rtt.
func (d *drive) answer(p *path, rtt time.Duration) bool {
	d.now = d.now.Add(rtt)
	ids := d.sent[p]
	return d.answered(p, ids[len(ids)-1], &route{spot: p.spot}, d.now)
}

// request is a check from the other side.
func (d *drive) request(p *path, nominate bool) {
	d.seq++
	d.requested(p, nat.Asked{Nominate: nominate, Seq: d.seq}, d.now)
}

func TestCandidateRestsWhenNothingAnswers(t *testing.T) {
	for _, lead := range []bool{true, false} {
		d := newDrive(lead)
		p := d.candidate(wire.Reflexive, 1)
		if got := d.run(100 * time.Millisecond)[p]; got != 3 {
			t.Errorf("lead %v: %d checks in the first 100 ms, want 3 (at 0, 20, 60)", lead, got)
		}
		d.run(20 * time.Second)
		got := d.run(60 * time.Second)[p]
		if lead && (got < 10 || got > 13) {
			t.Errorf("leading: %d checks a minute at rest without any path, want one every 5 s", got)
		}
		if !lead && got != 0 {
			t.Errorf("following: %d checks at rest, want none", got)
		}
	}
}

func TestAnswerValidatesAndCarriesTraffic(t *testing.T) {
	d := newDrive(true)
	p := d.candidate(wire.Reflexive, 1)
	d.step()
	if d.chosen != nil {
		t.Fatal("traffic before any answer")
	}
	if d.answered(p, nat.TxID{1, 2, 3}, nil, d.now) || p.valid {
		t.Fatal("an answer to no check of ours validated the path")
	}
	if !d.answer(p, 30*time.Millisecond) || d.chosen != p || p.srtt != 30*time.Millisecond {
		t.Fatalf("after the answer: chosen %v, rtt %v", d.chosen, p.srtt)
	}
	if due := d.step(); len(due) != 1 || due[0] != p {
		t.Fatal("the choice is not told to the other side at once")
	}
}

func TestBetterPathTakesOver(t *testing.T) {
	for name, tc := range map[string]struct {
		first, second       wire.CandidateKind
		firstRTT, secondRTT time.Duration
		moves               bool
	}{
		"a better kind wins":            {wire.Reflexive, wire.Host, 5 * time.Millisecond, 6 * time.Millisecond, true},
		"a worse kind does not":         {wire.Host, wire.Reflexive, 50 * time.Millisecond, 5 * time.Millisecond, false},
		"much faster wins":              {wire.Reflexive, wire.Observed, 50 * time.Millisecond, 20 * time.Millisecond, true},
		"a little faster does not":      {wire.Reflexive, wire.Observed, 50 * time.Millisecond, 45 * time.Millisecond, false},
		"a fifth of nothing is nothing": {wire.Reflexive, wire.Observed, 2 * time.Millisecond, time.Millisecond, false},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDrive(true)
			a := d.candidate(tc.first, 1)
			d.step()
			d.answer(a, tc.firstRTT)
			b := d.candidate(tc.second, 2)
			d.step()
			d.answer(b, tc.secondRTT)
			if got := d.chosen == b; got != tc.moves {
				t.Errorf("moved: %v, want %v", got, tc.moves)
			}
		})
	}
}

func TestSilentPathIsReplacedWithinThreeSeconds(t *testing.T) {
	d := newDrive(true)
	a, b := d.candidate(wire.Host, 1), d.candidate(wire.Reflexive, 2)
	d.step()
	d.answer(b, 10*time.Millisecond)
	d.answer(a, 0)
	d.run(0)
	d.answer(a, time.Millisecond)
	if d.chosen != a {
		t.Fatal("the host path does not carry")
	}
	// From here on a is dead: traffic goes out, nothing comes back, b alone answers checks.
	start, tx := d.now, uint64(0)
	for d.chosen == a {
		d.now = d.now.Add(10 * time.Millisecond)
		tx += 100
		d.traffic(0, tx, d.now)
		for _, p := range d.step() {
			if p == b {
				d.answer(b, 0)
			}
		}
		if d.now.Sub(start) > 3*time.Second {
			t.Fatalf("still on the dead path after %v", d.now.Sub(start))
		}
	}
	if d.chosen != b {
		t.Fatal("the other path did not take over")
	}
	if last := d.history[len(d.history)-1]; last.Why != "silent" || last.Path.Remote != b.spot.remote {
		t.Errorf("history says %+v", last)
	}
}

// Who only receives sends nothing when its path dies: that traffic has stopped is reason enough to look a few times.
func TestSilenceAfterTrafficIsLookedInto(t *testing.T) {
	for _, dies := range []bool{true, false} {
		d := newDrive(true)
		a, b := d.candidate(wire.Host, 1), d.candidate(wire.Reflexive, 2)
		d.step()
		d.answer(b, 10*time.Millisecond)
		d.answer(a, 0)
		d.run(0)
		d.answer(a, time.Millisecond)
		checks := 0
		for at := time.Duration(0); at < 9*time.Second; at += 10 * time.Millisecond {
			d.now = d.now.Add(10 * time.Millisecond)
			rx := uint64(at)
			if at > time.Second {
				rx = uint64(time.Second)
			}
			d.traffic(rx, 0, d.now)
			for _, p := range d.step() {
				if p == b || !dies || at < time.Second {
					d.answer(p, 0)
				}
				if p == a && at > time.Second {
					checks++
				}
			}
			if dies && at == 4*time.Second && d.chosen != b {
				t.Fatal("three seconds after its last packet the dead path is still in use")
			}
		}
		if !dies && (d.chosen != a || checks < 3 || checks > 6) {
			t.Errorf("on a path that rests, %d checks in eight seconds", checks)
		}
	}
}

func TestOneWayTrafficAloneKeepsThePath(t *testing.T) {
	d := newDrive(true)
	p := d.candidate(wire.Host, 1)
	d.step()
	d.answer(p, time.Millisecond)
	for tx := range uint64(2000) { // 20 s of unanswered traffic, every check answered
		d.now = d.now.Add(10 * time.Millisecond)
		d.traffic(0, tx, d.now)
		for range d.step() {
			d.answer(p, 0)
		}
	}
	if d.chosen != p || len(d.carried) != 1 {
		t.Errorf("the path changed %d times", len(d.carried))
	}
}

func TestLossOfTheOnlyPathIsToldAndProbedAnew(t *testing.T) {
	d := newDrive(true)
	p, q := d.candidate(wire.Host, 1), d.candidate(wire.Reflexive, 2)
	d.step()
	d.answer(p, time.Millisecond)
	d.run(30 * time.Second)
	if d.chosen != nil || len(d.carried) != 2 || d.carried[1] != nil {
		t.Fatalf("after 30 s of silence: chosen %v, told %d times", d.chosen, len(d.carried))
	}
	if got := d.run(30 * time.Second); got[p] == 0 || got[q] == 0 {
		t.Errorf("without a path, probes in half a minute: %d and %d", got[p], got[q])
	}
}

func TestIdlePathIsKeptWithinNATTimeouts(t *testing.T) {
	d := newDrive(true)
	p := d.candidate(wire.Host, 1)
	d.step()
	d.answer(p, time.Millisecond)
	var gaps []time.Duration
	last := d.now
	for range 20 {
		for len(d.step()) == 0 {
			d.now = maxTime(d.wake(d.now), d.now.Add(time.Microsecond))
		}
		gaps = append(gaps, d.now.Sub(last))
		last = d.now
		d.answer(p, time.Millisecond)
	}
	for _, gap := range gaps {
		if gap > 20*time.Second {
			t.Errorf("%v without a packet: a NAT may forget after 30 s", gap)
		}
	}
}

func TestFollowerGoesWhereTheLeaderNominates(t *testing.T) {
	d := newDrive(false)
	a, b := d.candidate(wire.Host, 1), d.candidate(wire.Reflexive, 2)
	d.step()
	d.answer(a, time.Millisecond)
	if d.chosen != a {
		t.Fatal("the first validated path does not carry")
	}
	d.request(b, true)
	if d.chosen != a {
		t.Fatal("traffic moved to a path that is not validated")
	}
	d.step()
	d.answer(b, time.Millisecond)
	if d.chosen != b {
		t.Fatal("the nominated path does not carry once it is validated")
	}
	d.request(a, false)
	if d.chosen != b {
		t.Fatal("a check without nomination moved traffic")
	}
	d.request(a, true)
	if d.chosen != a {
		t.Fatal("the follower did not follow back")
	}
}

func TestFollowerForgetsTheSilent(t *testing.T) {
	d := newDrive(false)
	a := d.candidate(wire.Observed, 1)
	d.request(a, true)
	d.step()
	d.answer(a, time.Millisecond)
	d.run(followExpiry - time.Second)
	if len(d.dropped) != 0 {
		t.Fatal("forgotten too early")
	}
	d.run(2 * time.Second)
	if len(d.dropped) != 1 || d.chosen != nil || len(d.paths) != 0 {
		t.Fatalf("after %v: %d dropped, chosen %v", followExpiry, len(d.dropped), d.chosen)
	}
	if !d.wake(d.now).IsZero() {
		t.Error("a peer without paths still sets timers")
	}
}

// Whoever holds a session can make up addresses, but neither memory nor checks grow with them.
func TestObservedAddressesAreBounded(t *testing.T) {
	d := newDrive(false)
	good := d.candidate(wire.Host, 1)
	d.step()
	d.answer(good, time.Millisecond)
	for port := uint16(2); port < 5000; port++ {
		if p := d.candidate(wire.Observed, port); p != nil {
			d.request(p, false)
		}
	}
	if len(d.paths) > maxPaths {
		t.Errorf("%d paths, at most %d are allowed", len(d.paths), maxPaths)
	}
	if d.chosen != good || d.find(good.spot) == nil {
		t.Error("made-up addresses pushed the real path out")
	}
}

// Whatever happens in whatever order, traffic is only ever on a validated path, or on none.
func TestTrafficIsOnlyOnValidatedPaths(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		d := newDrive(rapid.Bool().Draw(rt, "lead"))
		kinds := rapid.SampledFrom([]wire.CandidateKind{wire.Host, wire.Reflexive, wire.Observed})
		pick := func() *path {
			if len(d.paths) == 0 {
				return nil
			}
			return d.paths[rapid.IntRange(0, len(d.paths)-1).Draw(rt, "path")]
		}
		var rx, tx uint64
		rt.Repeat(map[string]func(*rapid.T){
			"add":  func(rt *rapid.T) { d.candidate(kinds.Draw(rt, "kind"), uint16(rapid.IntRange(1, 6).Draw(rt, "port"))) },
			"step": func(*rapid.T) { d.step() },
			"wait": func(rt *rapid.T) {
				d.now = d.now.Add(time.Duration(rapid.IntRange(1, 50_000).Draw(rt, "ms")) * time.Millisecond)
				d.step()
			},
			"answer": func(*rapid.T) {
				if p := pick(); p != nil && len(d.sent[p]) > 0 {
					d.answer(p, time.Millisecond)
				}
			},
			"request": func(rt *rapid.T) {
				if p := pick(); p != nil {
					d.request(p, rapid.Bool().Draw(rt, "nominate"))
				}
			},
			"traffic": func(rt *rapid.T) {
				rx += rapid.Uint64Range(0, 1).Draw(rt, "rx")
				tx += rapid.Uint64Range(0, 1).Draw(rt, "tx")
				d.traffic(rx, tx, d.now)
			},
			"": func(rt *rapid.T) {
				if c := d.chosen; c != nil && (!c.valid || d.find(c.spot) != c) {
					rt.Fatalf("traffic is on %v, validated %v", c.spot.remote, c.valid)
				}
				if d.chosen == nil && d.best(nil) != nil {
					rt.Fatal("a validated path waits while none is chosen")
				}
				if len(d.history) > historySize {
					rt.Fatal("the history grows")
				}
			},
		})
	})
}
