package tunnel

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// Never is more sent, nor the other side told, than fits, and what fits is known two round trips after the first answer.
func TestNoMoreIsSentThanFits(t *testing.T) {
	for narrow, most := range map[int]int{1420: 1420, 1419: 1408, 1416: 1408, 1348: 1344, 1340: 1328, 1299: 1280, 1280: 1280} {
		d := newDrive(true)
		d.narrow = narrow
		p := d.candidate(wire.Reflexive, 1)
		links := map[*path]*link{p: {rtt: 40 * time.Millisecond}}
		took := d.live(20*time.Second, links, bulk, func() bool {
			if fits, told := d.fit(), d.told(); fits > narrow || told > narrow {
				t.Fatalf("%d bytes fit: %d are sent, %d told", narrow, fits, told)
			}
			return d.fit() == most
		})
		if took > 200*time.Millisecond {
			t.Errorf("%d bytes fit: %d are sent after %v", narrow, d.fit(), took)
		}
		if d.live(time.Second, links, silent, func() bool { return d.said >= most }); d.said < most {
			t.Errorf("%d bytes fit: the other side is told %d", narrow, d.said)
		}
		d.live(5*time.Second, links, bulk, never)
		if d.fit() != most {
			t.Errorf("%d bytes fit: %d are sent in the end", narrow, d.fit())
		}
	}
}

// The other side hears what fits as soon as it is known, not with the next check that is due.
func TestTheOtherSideIsToldAtOnce(t *testing.T) {
	d := newDrive(true)
	d.narrow = 1420
	p := d.candidate(wire.Reflexive, 1)
	links := map[*path]*link{p: {rtt: 40 * time.Millisecond}}
	d.live(time.Second, links, silent, func() bool { return d.settle() == 1420 })
	checks := 0
	before := len(d.orders)
	d.live(20*time.Millisecond, links, silent, never)
	for _, o := range d.orders[before:] {
		if o.path == p && o.mtu == 0 {
			checks++
		}
	}
	if d.said != 1420 || checks != 1 {
		t.Errorf("told %d in %d checks", d.said, checks)
	}
}

// A better path that takes less carries nothing before the session's packets fit it.
func TestBetterPathTakesOverOnceItsSizeIsKnown(t *testing.T) {
	d := newDrive(true)
	d.narrow = 1420
	relay := d.relayed(1)
	links := map[*path]*link{relay: {rtt: 40 * time.Millisecond}}
	d.live(time.Second, links, bulk, never)
	direct := d.candidate(wire.Host, 2)
	links[direct] = &link{rtt: 20 * time.Millisecond, narrow: 1350}
	took := d.live(10*time.Second, links, bulk, func() bool { return d.chosen == direct })
	if d.chosen != direct || d.fit() > 1350 || took > time.Second {
		t.Errorf("after %v the direct path carries: %t, and %d are sent", took, d.chosen == direct, d.fit())
	}
}

// A WebSocket takes packets of any size, and is not kept busy with large checks at first.
func TestStreamsAreNotSearchedAtOnce(t *testing.T) {
	d := newDrive(true)
	d.narrow = 1420
	p := d.relayed(0)
	links := map[*path]*link{p: {rtt: 40 * time.Millisecond}}
	d.smallChecksFor(t, streamSearch, links)
	if len(d.orders) > 4 || d.fit() != DefaultMTU || d.told() != 0 {
		t.Errorf("%d checks, %d are sent, %d told", len(d.orders), d.fit(), d.told())
	}
	d.live(time.Second, links, bulk, never)
	if d.told() != 1420 {
		t.Errorf("%d told later", d.told())
	}
}

// Nor is the other side's, where that has said that it is on one. What is sent meanwhile fits every path.
func TestTheOtherSidesStreamIsNotSearchedAtOnce(t *testing.T) {
	d := newDrive(true)
	d.narrow = 1420
	p := d.relayed(1)
	links := map[*path]*link{p: {rtt: 40 * time.Millisecond}}
	d.requested(p, nat.Asked{Seq: 1, Stream: true}, d.now)
	d.smallChecksFor(t, streamSearch, links)
	if !p.valid || d.fit() != StartMTU {
		t.Errorf("validated: %t, %d are sent", p.valid, d.fit())
	}
	d.live(time.Second, links, bulk, never)
	if d.fit() != 1420 || d.told() != 1420 {
		t.Errorf("%d are sent later, %d told", d.fit(), d.told())
	}
}

// smallChecksFor lets time pass in which no check is padded.
func (d *drive) smallChecksFor(t *testing.T, dur time.Duration, links map[*path]*link) {
	t.Helper()
	d.live(dur, links, bulk, never)
	for _, o := range d.orders {
		if o.mtu > 0 {
			t.Fatalf("a check of %d bytes within %v", o.mtu, dur)
		}
	}
}

func TestPaddingFits(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		fits, most := rapid.IntRange(MinMTU, 1420).Draw(t, "fits"), 1420
		n := rapid.IntRange(1, unpadded(fits, most)).Draw(t, "packet")
		if padded := min((n+15)&^15, most); padded > fits {
			t.Fatalf("%d bytes are padded to %d, and %d fit", n, padded, fits)
		}
	})
}
