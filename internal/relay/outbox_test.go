package relay

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// drainAll takes all that waits and gives each channel's packets in order, and the channels in the order of messages.
func drainAll(t rapid.TB, o *outbox) (packets map[Channel][]string, order []Channel) {
	t.Helper()
	packets = map[Channel][]string{}
	buf := make([]byte, headroom, maxControl+fullWrite+largeChunk)
	for {
		msg, whole := o.take(buf)
		if msg == nil {
			return packets, order
		}
		if len(msg) > headroom+MaxMessage {
			t.Fatalf("a message of %d bytes", len(msg))
		}
		b := WalkBlocks(msg[headroom:])
		for b.Next() {
			for f := b.Frames(); f.Next(); {
				packets[f.Channel] = append(packets[f.Channel], string(f.Packet))
				if len(order) == 0 || order[len(order)-1] != f.Channel {
					order = append(order, f.Channel)
				}
			}
		}
		if b.Err != nil {
			t.Fatal(b.Err)
		}
		if whole != nil {
			whole.free()
		}
	}
}

// What is taken comes out, whole, once and in order; what is not is counted; nothing is over its bound.
func TestOutboxKeepsWhatItTakes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const perFlow, total = 1 << 17, 1 << 18
		o := newOutbox(perFlow, total)
		want, serial, dropped := map[Channel][]string{}, uint32(0), 0
		packet := func(size int) []byte {
			serial++
			return binary.BigEndian.AppendUint32(make([]byte, size-4, size), serial)
		}
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			c := Channel(rapid.Uint32Range(1, 4).Draw(t, "channel"))
			size := rapid.SampledFrom([]int{4, 60, 100, 1000, 1452, 9000}).Draw(t, "size")
			n := rapid.IntRange(1, 64).Draw(t, "packets")
			var list [][]byte
			for i := range n {
				if i == n-1 && rapid.Bool().Draw(t, "short") {
					size = max(4, size/2)
				}
				list = append(list, packet(size))
			}
			taken := 0
			if run, segment := frames(c, list); rapid.Bool().Draw(t, "run") && len(run) <= maxRun {
				if o.putRun(c, run, segment) {
					taken = n
				}
			} else {
				taken = o.putPackets(c, list)
			}
			for _, p := range list[:taken] {
				want[c] = append(want[c], string(p))
			}
			dropped += n - taken
			if f := o.flows[c]; f != nil && f.waiting > perFlow || o.waiting > total {
				t.Fatalf("%d bytes wait", o.waiting)
			}
			if rapid.IntRange(0, 9).Draw(t, "drain") == 0 {
				got, _ := drainAll(t, o)
				compare(t, got, want)
				want = map[Channel][]string{}
			}
		}
		got, _ := drainAll(t, o)
		compare(t, got, want)
		if int(o.dropped.Load()) != dropped {
			t.Fatalf("counts %d drops, %d happened", o.dropped.Load(), dropped)
		}
		if o.waiting != 0 || len(o.flows) != 0 || o.first != nil || o.last != nil {
			t.Fatalf("an empty outbox holds %d bytes, %d flows", o.waiting, len(o.flows))
		}
	})
}

// frames makes a run of packets, whose segment is the first one's.
func frames(c Channel, packets [][]byte) (run []byte, segment int) {
	for _, p := range packets {
		at := len(run)
		run = append(append(run, make([]byte, FrameHeader)...), p...)
		PutHeader(run[at:], c)
	}
	return run, FrameHeader + len(packets[0])
}

func compare(t rapid.TB, got, want map[Channel][]string) {
	t.Helper()
	for c := Channel(1); c <= 4; c++ {
		if !slices.Equal(got[c], want[c]) {
			t.Fatalf("channel %d: %d packets came out, %d were taken", c, len(got[c]), len(want[c]))
		}
	}
}

// A channel that floods takes no turn from one that sends little.
func TestOutboxIsFair(t *testing.T) {
	o := newOutbox(DefaultFlowQueue, DefaultQueue)
	big := slices.Repeat([][]byte{make([]byte, 1452)}, 350)
	o.putPackets(1, big)
	o.putPackets(2, [][]byte{[]byte("hello")})
	o.putPackets(3, big)
	msg, _ := o.take(make([]byte, headroom, maxControl+fullWrite+largeChunk))
	if !bytes.Contains(msg, []byte("hello")) {
		msg, _ = o.take(make([]byte, headroom, maxControl+fullWrite+largeChunk))
		if !bytes.Contains(msg, []byte("hello")) {
			t.Fatal("the small channel waits behind the large ones")
		}
	}
	if _, order := drainAll(t, o); len(order) < 10 {
		t.Fatalf("the large channels do not take turns: %v", order)
	}
}

func TestOutboxControlGoesFirstAndIsBounded(t *testing.T) {
	o := newOutbox(DefaultFlowQueue, DefaultQueue)
	o.putPackets(1, slices.Repeat([][]byte{make([]byte, 1452)}, 100))
	stun := WantRequest([12]byte{1})
	if !o.putControl(stun) {
		t.Fatal("no room for one message")
	}
	msg, _ := o.take(make([]byte, headroom, maxControl+fullWrite+largeChunk))
	if b := WalkBlocks(msg[headroom:]); !b.Next() || !bytes.Equal(b.Data, stun) {
		t.Fatal("the STUN message is not first")
	}
	n := 0
	for o.putControl(stun) {
		n++
	}
	if n*(BlockHeader+len(stun)) > maxControl || n < 50 {
		t.Fatalf("%d messages wait", n)
	}
	o.close()
	if o.putControl(stun) || o.putPackets(1, [][]byte{{1}}) != 0 || o.waiting != 0 {
		t.Fatal("a closed outbox takes something")
	}
}

func BenchmarkOutbox(b *testing.B) {
	o := newOutbox(DefaultFlowQueue, DefaultQueue)
	packets := slices.Repeat([][]byte{make([]byte, 1452)}, 44)
	run, segment := frames(1, packets)
	buf := make([]byte, headroom, maxControl+fullWrite+largeChunk)
	for name, put := range map[string]func(){
		"run":     func() { o.putRun(1, run, segment) },
		"packets": func() { o.putPackets(1, packets) },
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(run)))
			b.ReportAllocs()
			for b.Loop() {
				put()
				if _, whole := o.take(buf); whole != nil {
					whole.free()
				}
			}
		})
	}
}

// fullOutbox is an outbox in which channel 1 has no room for another run.
func fullOutbox(t *testing.T) *outbox {
	t.Helper()
	o := newOutbox(2*maxRun, 4*maxRun)
	for o.room(1) == nil {
		if o.putPackets(1, [][]byte{make([]byte, 1452)}) != 1 {
			t.Fatal("a queue with room takes nothing")
		}
	}
	return o
}

// Whoever waits for room goes on when there is some, the outbox is closed, or time is up, and waits for nobody else's.
func TestOutboxWait(t *testing.T) {
	const limit = time.Second
	for _, c := range []struct {
		name    string
		channel Channel
		after   func(*outbox) // what happens after a tenth of the limit
		want    time.Duration
	}{
		{"room", 1, func(o *outbox) { _, _ = o.take(make([]byte, headroom)) }, limit / 10},
		{"closed", 1, (*outbox).close, limit / 10},
		{"nothing", 1, func(*outbox) {}, limit},
		{"another queue", 2, func(*outbox) {}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := fullOutbox(t)
				defer o.close()
				begun := time.Now()
				defer time.AfterFunc(limit/10, func() { c.after(o) }).Stop()
				o.wait(c.channel, time.After(limit))
				if took := time.Since(begun); took != c.want {
					t.Errorf("it took %v, want %v", took, c.want)
				}
			})
		})
	}
}

// The reader of a WebSocket with one session waits for room on the other side's, for a bounded time; any other does not wait.
func TestPatience(t *testing.T) {
	run := make([]byte, 1000)
	for _, c := range []struct {
		name    string
		patient time.Duration
		frees   time.Duration // when there is room
		want    time.Duration
		dropped uint64
	}{
		{"a lone session", patience, patience / 2, patience / 2, 0},
		{"a lone session's other side is stuck", patience, 2 * patience, patience, 1},
		{"one of many", 0, patience / 2, 0, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := fullOutbox(t)
				defer o.close()
				for o.putPackets(1, [][]byte{run[FrameHeader:]}) == 1 { // to the last byte
				}
				l := &lane{patience: c.patient, counts: &counts{}}
				begun := time.Now()
				defer time.AfterFunc(c.frees, func() { _, _ = o.take(make([]byte, headroom)) }).Stop()
				l.enqueue(o, 1, run, len(run))
				if took, n := time.Since(begun), l.counts.overQueue.Load(); took != c.want || n != c.dropped {
					t.Errorf("it took %v and dropped %d, want %v and %d", took, n, c.want, c.dropped)
				}
			})
		})
	}
}

// However many runs a message has, its reader waits for them once, and where a gateway's has waited in vain it does not wait again at once: a BIND of
// another session may be behind it. The other side, which takes nothing, chooses neither the number of runs nor that of messages.
func TestPatienceIsBounded(t *testing.T) {
	for _, side := range []Side{Client, Gateway} {
		t.Run(side.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &Server{}
				to, from := &link{server: s, out: fullOutbox(t)}, &link{server: s}
				defer to.out.close()
				for to.out.putPackets(1, [][]byte{{1}}) == 1 { // to the last byte
				}
				id := [SessionSize]byte{3: 0x10} // channel 1
				sess := &session{id: id, channel: 1}
				for one, l := range map[Side]*link{side: from, side.Other(): to} {
					cred := &credential{expires: time.Now().Add(time.Hour).UnixNano(), rate: DefaultRate}
					cred.ticket[1] = byte(one)
					b := &binding{origin: origin{link: l}, credential: cred}
					sess.sides[one].binding.Store(b)
					l.patient.Store(int64(patienceOf(map[*binding]struct{}{b: {}})))
				}
				s.table.change(1, func(m map[Channel]*session) { m[1] = sess })
				one := make([]byte, FrameHeader+1)
				PutHeader(one, 1)
				msg := bytes.Repeat(append(AppendBlockHeader(nil, len(one), len(one)), one...), 1000)
				begun := time.Now()
				for range 100 {
					if err := from.message(msg); err != nil {
						t.Fatal(err)
					}
				}
				most := 100 * patience
				if side == Gateway {
					most = gatewayPatience
				}
				if took := time.Since(begun); took > most || took < most/2 {
					t.Errorf("100 messages kept it from being read for %v, at most %v are allowed", took, most)
				}
				if n := s.counts.overQueue.Load(); n != 100_000 {
					t.Errorf("%d packets were dropped", n)
				}
			})
		})
	}
}
