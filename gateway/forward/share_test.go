package forward

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestCensus(t *testing.T) {
	var c census
	var members [10]int64
	at := time.Unix(1000, 0)
	for i := range members {
		if n := c.note(&members[i], at); n != i+1 {
			t.Errorf("%d members after the %dth", n, i+1)
		}
	}
	if n := c.note(&members[3], at); n != 10 {
		t.Errorf("one who comes again makes it %d", n)
	}
	if n := c.members(at); n != 10 {
		t.Errorf("%d members", n)
	}
	if n := c.members(at.Add(sharePeriod)); n != 10 {
		t.Errorf("%d members a period later", n)
	}
	if n := c.members(at.Add(2 * sharePeriod)); n != 0 {
		t.Errorf("%d members two periods later", n)
	}
	for _, step := range []struct{ want int }{{10}, {1}, {1}} {
		at = at.Add(sharePeriod)
		if n := c.note(&members[0], at); n != step.want {
			t.Errorf("%d at %v, want %d", n, at, step.want)
		}
	}
	if n := c.note(&members[1], at.Add(time.Hour)); n != 1 {
		t.Errorf("%d after an hour, want 1", n)
	}
}

// TestShare: sessions have equal parts, whatever the number of their flows.
func TestShare(t *testing.T) { synctest.Test(t, testShare) } // no period ends in between

func testShare(t *testing.T) {
	f := &Forwarder{}
	sessions := make([]*Session, 3000)
	for i := range sessions {
		sessions[i] = &Session{f: f}
	}
	if n, full := (&flow{s: sessions[0]}).share(); n < shareBytes/2 || full { // half, where a period ends in between
		t.Errorf("one session may have %d, full: %v", n, full)
	}
	var n int64
	for range 4 {
		n, _ = (&flow{s: sessions[1]}).share()
	}
	if n > shareBytes/2/4 {
		t.Errorf("a flow of four of one of two sessions may have %d", n)
	}
	for _, s := range sessions {
		n, _ = (&flow{s: s}).share()
	}
	if n != leastShare {
		t.Errorf("one of 3000 sessions may have %d", n)
	}
	if n, bounded := (&flow{s: sessions[2]}).readShare(); n != windowPart*batchBytes/2 || !bounded {
		t.Errorf("the second flow of one of 3000 sessions may read %d ahead", n)
	}
	if n, bounded := (&flow{s: &Session{f: &Forwarder{}}}).readShare(); n != shareBytes || bounded {
		t.Errorf("one session may read %d ahead", n)
	}
	f.purse.lent.Store(shareBytes)
	if _, full := (&flow{s: sessions[0]}).share(); !full {
		t.Error("nothing is full where all is lent")
	}
}

// TestShareGrowsWithPace: where the gateway carries much, each of many sessions may have a batch on its way, and no more than that; what is
// shared between a few is what it is.
func TestShareGrowsWithPace(t *testing.T) { synctest.Test(t, testShareGrowsWithPace) }

func testShareGrowsWithPace(t *testing.T) {
	for _, c := range []struct {
		name           string
		sessions       int
		rate           int64 // bytes a second
		send, read     int64
		lent           int64
		full, fullMore bool // with so much lent, and with a full part more for each
	}{
		{"slow", 1000, 20e6, shareBytes / 1000, windowPart * batchBytes, shareBytes - 1, false, true},
		{"middling", 1000, 250e6, 75e3, windowPart * batchBytes, 74e6, false, true},
		{"fast", 1000, 2500e6, fullShare, windowPart * batchBytes, 1000*fullShare - 1, false, true},
		{"few", 16, 250e6, shareBytes / 16, shareBytes / 32, shareBytes - 1, false, true},
		{"alone", 1, 250e6, shareBytes, shareBytes, 100 << 30, false, false},
	} {
		f := &Forwarder{}
		f.pace.note(time.Now())
		for range 40 {
			time.Sleep(sharePeriod)
			f.pace.carried.Add(int64(float64(c.rate) * sharePeriod.Seconds()))
			f.pace.note(time.Now())
		}
		f.purse.lent.Store(c.lent)
		var last *flow
		for range c.sessions {
			last = &flow{s: &Session{f: f}}
			last.part()
		}
		send, full := last.share()
		if read, _ := last.readShare(); !near(send, c.send) || !near(read, c.read) || full != c.full {
			t.Errorf("%s: %d to send, %d to read, full: %v; want %d, %d, %v", c.name, send, read, full, c.send, c.read, c.full)
		}
		f.purse.lent.Add(fullShare * int64(c.sessions))
		if _, full := last.share(); full != c.fullMore {
			t.Errorf("%s: full with %d lent: %v", c.name, f.purse.lent.Load(), full)
		}
	}
}

// near tells figures that differ by rounding.
func near(a, b int64) bool { return max(a, b)-min(a, b) <= max(a, b)/1000 }
