package tunnel

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// A proxy holds back a second small message on a WebSocket until the first is acknowledged, and with it what matters behind it. So until
// the path stands, a side on a WebSocket says what is needed and nothing twice, however often the other side, over UDP, repeats itself: one
// check and one answer, wherever it leads or follows.
func TestASideOnAStreamSaysNothingTwice(t *testing.T) {
	for _, lead := range []bool{true, false} {
		for _, way := range []time.Duration{5 * time.Millisecond, 20 * time.Millisecond, 40 * time.Millisecond, 70 * time.Millisecond} {
			synctest.Test(t, func(t *testing.T) {
				stream := newHalf(lead, spot{header: header(7)}, way)
				datagrams := newHalf(!lead, spot{header: header(7), remote: addr(1)}, way)
				stream.other, datagrams.other = datagrams, stream
				for began := time.Now(); !stream.path.valid || !datagrams.path.valid; time.Sleep(time.Millisecond) {
					if time.Since(began) > time.Second {
						t.Fatal("no path")
					}
					stream.run()
					datagrams.run()
				}
				if stream.checks != 1 || stream.answers != 1 || way > firstRetry && datagrams.checks < 3 {
					t.Errorf("%v away, leading: %t: %d checks and %d answers to %d checks", way, lead, stream.checks, stream.answers, datagrams.checks)
				}
			})
		}
	}
}

// What is no mere repetition is answered all the same: what nominates, is padded, or comes later.
func TestOnAStreamOnlyRepetitionsGoUnanswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stream, datagrams := &path{spot: spot{header: header(7)}}, &path{spot: spot{header: header(7), remote: addr(1)}}
		for _, tc := range []struct {
			what    string
			on      *path
			pause   time.Duration
			asked   nat.Asked
			answers bool
		}{
			{"the first", stream, 0, nat.Asked{Seq: 1}, true},
			{"the same again", stream, 20 * time.Millisecond, nat.Asked{Seq: 2, MTU: 1280, Stream: true}, false},
			{"and again", stream, streamAgain - 21*time.Millisecond, nat.Asked{Seq: 3}, false},
			{"later", stream, time.Millisecond, nat.Asked{Seq: 4}, true},
			{"the path in use", stream, 0, nat.Asked{Seq: 5, Nominate: true}, true},
			{"a large one", stream, 0, nat.Asked{Seq: 6, Size: 1452}, true},
			{"a call", stream, 0, nat.Asked{Seq: 7, Call: true}, true},
			{"a farewell", stream, 0, nat.Asked{Seq: 8, Leave: true}, true},
			{"over UDP", datagrams, 0, nat.Asked{Seq: 1}, true},
			{"over UDP again", datagrams, 0, nat.Asked{Seq: 2}, true},
		} {
			time.Sleep(tc.pause)
			if got := tc.on.owes(tc.asked, time.Now()); got != tc.answers {
				t.Errorf("%s: answered %t", tc.what, got)
			}
		}
	})
}

// A check on a stream is repeated at once where the last one may have found nobody on the other side of the relay.
func TestAnOldCheckOnAStreamIsRepeatedAtOnce(t *testing.T) {
	for _, lead := range []bool{true, false} {
		d := newDrive(lead)
		p := d.relayed(0)
		d.step()
		d.now = d.now.Add(streamRetry / 2)
		d.request(p, false)
		if d.run(0); len(d.orders) != 1 {
			t.Errorf("leading: %t: %d checks within %v", lead, len(d.orders), streamRetry/2)
		}
		d.run(10 * time.Second)
		sent := len(d.orders)
		d.now = d.now.Add(streamRetry)
		d.request(p, false)
		if d.step(); len(d.orders) != sent+1 {
			t.Errorf("leading: %t: %d checks at once, later", lead, len(d.orders)-sent)
		}
	}
}

// A BIND on a stream is answered, or the stream ends: there is no hurry to repeat it.
func TestABindOnAStreamIsRepeatedSlowly(t *testing.T) {
	for tries, want := range map[int][2]time.Duration{
		1: {bindRetry, streamRetry}, 2: {2 * bindRetry, streamRetry}, 3: {4 * bindRetry, 4 * bindRetry},
	} {
		udp, stream := leg{mode: UDP, tries: tries}, leg{mode: WebSocket, tries: tries}
		if got := [2]time.Duration{udp.patience(), stream.patience()}; got != want {
			t.Errorf("after %d: %v, want %v", tries, got, want)
		}
	}
}

// half is one side of a session whose only path leads through a relay, without the rest of a tunnel. One goroutine uses both halves.
type half struct {
	*drive
	path  *path
	other *half
	way   time.Duration // to the other side
	mail  []posted

	checks, answers int // said while the path was not validated
}

// posted is a check or an answer on its way.
type posted struct {
	at     time.Time
	id     nat.TxID
	asked  nat.Asked
	answer bool
}

func newHalf(lead bool, s spot, way time.Duration) *half {
	h := &half{drive: newDrive(lead), way: way}
	h.path = h.add(&path{spot: s, kind: wire.Relayed, relay: "r"}, time.Now())
	return h
}

// run takes what has come and says what is due.
func (h *half) run() {
	h.now = time.Now()
	for len(h.mail) > 0 && !h.mail[0].at.After(h.now) {
		l := h.mail[0]
		h.mail = h.mail[1:]
		switch {
		case l.answer:
			h.answered(h.path, l.id, &route{spot: h.path.spot}, h.now)
			continue
		case h.path.owes(l.asked, h.now):
			h.answers++
			h.send(posted{id: l.id, answer: true})
		}
		h.requested(h.path, l.asked, h.now)
	}
	for _, o := range h.due(h.now) {
		h.ids, h.seq = h.ids+1, h.seq+1
		id := nat.TxID{10: byte(h.ids >> 8), 11: byte(h.ids)}
		o.booked(id, o.mtu, h.now)
		if !o.valid {
			h.checks++
		}
		h.send(posted{id: id, asked: nat.Asked{Seq: h.seq, Stream: o.spot.stream(), Nominate: h.lead && o.path == h.chosen, Size: o.mtu}})
	}
}

func (h *half) send(l posted) {
	l.at = h.now.Add(h.way)
	h.other.mail = append(h.other.mail, l)
}
