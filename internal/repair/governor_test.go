package repair

import (
	"math/rand/v2"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// sender drives a governor: a report every second on packets that were lost as told.
type sender struct {
	Governor
	count Count
	bytes uint64
	now   time.Time
}

func newSender() *sender {
	s := &sender{now: time.Unix(1e9, 0)}
	s.Report(s.count, 0, s.now)
	return s
}

// second sends packets of size bytes for a second, of which some are lost, and gives what the governor says.
func (s *sender) second(packets, lost uint32, size int) bool {
	s.now = s.now.Add(time.Second)
	s.count.Sent += packets
	s.count.Came += packets - lost
	s.bytes += uint64(packets) * uint64(size)
	return s.Report(s.count, s.bytes, s.now)
}

func TestParitiesBeginAndEndWithLoss(t *testing.T) {
	s := newSender()
	for range 60 {
		if s.second(500, 0, 1400) {
			t.Fatal("parities without loss")
		}
	}
	took := 1
	for !s.second(200, 2, 1400) {
		if took++; took > 10 {
			t.Fatal("no parities at 1 % of loss")
		}
	}
	if got := s.Loss(); got < 0.003 || got > 0.02 {
		t.Errorf("the loss is said to be %v", got)
	}
	for range 60 { // much faster now
		if !s.second(5000, 50, 1400) {
			t.Fatal("no parities any more at 1 % of loss")
		}
	}
	took = 0
	for s.second(500, 0, 1400) {
		if took++; took > 30 {
			t.Fatal("parities for long after the loss has ended")
		}
	}
}

// One queue that was full once is no reason.
func TestOneBurstIsNoLoss(t *testing.T) {
	s := newSender()
	for range 10 {
		s.second(500, 0, 1400)
	}
	if s.second(500, 60, 1400) {
		t.Error("parities after one burst")
	}
	for range 60 {
		if s.second(500, 0, 1400) {
			t.Fatal("parities after one burst")
		}
	}
}

// Loss at a high rate is a full queue's.
func TestFastSendersGetNoParities(t *testing.T) {
	s := newSender()
	for range 60 {
		if s.second(100_000, 1000, 1400) {
			t.Fatal("parities at 1.1 Gbit/s")
		}
	}
	for range 10 {
		s.second(200, 2, 1400)
	}
	if !s.On() {
		t.Fatal("no parities for a slow one")
	}
	if s.second(100_000, 0, 1400) {
		t.Error("parities although it has become fast")
	}
}

// Loss that grows when parities hide it comes from what is sent: they end, for longer each time.
func TestParitiesEndWhereTheyCauseLoss(t *testing.T) {
	s := newSender()
	var pauses []int
	for range 3 {
		waited := 0
		for !s.second(400, 4, 1400) {
			if waited++; waited > 3000 {
				t.Fatal("parities never come back")
			}
		}
		pauses = append(pauses, waited)
		for i := 0; s.second(2000, 120, 1400); i++ {
			if i > 3 {
				t.Fatal("parities go on while loss grows")
			}
		}
	}
	if pauses[1] < 50 || pauses[2] < 2*pauses[1]-10 {
		t.Errorf("pauses are %v s", pauses)
	}
}

// A connection's slow start fills a queue once, and that is no reason to end them.
func TestOneBurstEndsNoParities(t *testing.T) {
	s := newSender()
	for range 10 {
		s.second(400, 4, 1400)
	}
	for range 20 {
		if !s.second(2000, 400, 1400) || !s.second(2000, 20, 1400) || !s.second(2000, 20, 1400) {
			t.Fatal("parities end with one burst")
		}
	}
}

// What nobody could repair is left alone.
func TestHopelessLossGetsNoParities(t *testing.T) {
	s := newSender()
	for range 60 {
		if s.second(500, 150, 1400) {
			t.Fatal("parities at 30 % of loss")
		}
	}
}

// Reports come in checks, which may be late or repeated; and another path is another matter.
func TestReportsThatSayNothingNew(t *testing.T) {
	s := newSender()
	old := s.count
	for range 10 {
		s.second(500, 5, 1400)
	}
	if !s.On() || !s.Report(old, s.bytes, s.now) || !s.Report(s.count, s.bytes, s.now) {
		t.Error("an old report ends the parities")
	}
	s.bytes += 100 << 20 // a burst between two checks that come one upon the other
	if s.now = s.now.Add(time.Millisecond); !s.Report(s.count, s.bytes, s.now) {
		t.Error("a burst ends the parities")
	}
	s.now = s.now.Add(30 * time.Second)
	if s.Reset(); s.On() || s.Loss() != 0 {
		t.Error("on another path from the start")
	}
	if s.second(500, 5, 1400) {
		t.Error("one report on a new path is enough")
	}
}

// The tally counts what is lost, whatever the order in which packets come, and across keys and the end of its numbers.
func TestTallyCountsLoss(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var tally Tally
		tally.count = Count{Sent: rapid.Uint32().Draw(t, "sent"), Came: rapid.Uint32().Draw(t, "came")}
		before := tally.Count()
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		loss := rapid.IntRange(0, 30).Draw(t, "loss")
		sent, lost := uint32(0), uint32(0)
		for key := range uint32(rapid.IntRange(1, 3).Draw(t, "keys")) {
			const n = 500
			var arrived []uint64
			for c := range uint64(n) {
				if c > 0 && c < n-1 && rng.IntN(100) < loss {
					lost++
					continue
				}
				arrived = append(arrived, c)
			}
			for i := range arrived {
				if j := i + rng.IntN(3); j < len(arrived) && i > 4 && j < len(arrived)-1 {
					arrived[i], arrived[j] = arrived[j], arrived[i]
				}
			}
			sent += n
			for len(arrived) > 0 {
				var r Run
				k := min(1+rng.IntN(20), len(arrived))
				for _, c := range arrived[:k] {
					if !r.Add(message(key+1, c, minPacket)) {
						t.Fatal("one key is two")
					}
				}
				tally.Note(r.Index, r.Low, r.High, r.N)
				arrived = arrived[k:]
			}
		}
		gotSent, gotLost, ok := tally.Count().Since(before)
		// The first run of a key may say more than is believed, where much is missing in it.
		if !ok || gotSent > sent || gotSent+40 < sent || gotLost > lost || gotLost+40 < lost {
			t.Fatalf("counted %d sent and %d lost, %v; want %d and %d", gotSent, gotLost, ok, sent, lost)
		}
	})
}

// A forged counter costs the count of one packet, not of all that lie between.
func TestTallyDoesNotBelieveLeaps(t *testing.T) {
	var tally Tally
	tally.Note(1, 0, 9, 10)
	for range 100 {
		tally.Note(1, 1<<62, 1<<62, 1)
		tally.Note(1, 10, 10, 1)
		tally.Note(2, 5, 1<<63, 1)
		tally.Note(1, ^uint64(0), 0, 1)
	}
	if c := tally.Count(); c.Sent > 5000 || c.Came != 410 {
		t.Errorf("counted %+v", c)
	}
}

func TestRunIsOfOneKey(t *testing.T) {
	var r Run
	if !r.Add(message(1, 5, 40)) || !r.Add(message(1, 3, 40)) || r.Add(message(2, 4, 40)) || r != (Run{1, 3, 5, 2}) {
		t.Errorf("the run is %+v", r)
	}
}
