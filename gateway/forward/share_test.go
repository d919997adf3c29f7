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
	if n := (&flow{s: sessions[2]}).readShare(); n != leastShare/4 {
		t.Errorf("the second flow of one of 3000 sessions may read %d ahead", n)
	}
	if n := (&flow{s: &Session{f: &Forwarder{}}}).readShare(); n != shareBytes {
		t.Errorf("one session may read %d ahead", n)
	}
	f.purse.lent.Store(shareBytes)
	if _, full := (&flow{s: sessions[0]}).share(); !full {
		t.Error("nothing is full where all is lent")
	}
}
