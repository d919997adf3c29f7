package repair

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

// message makes a transport message whose content can be told from every other one's.
func message(idx uint32, c uint64, size int) []byte {
	pkt := make([]byte, size)
	rng := rand.New(rand.NewPCG(uint64(idx), c))
	for i := range pkt {
		pkt[i] = byte(rng.Uint32())
	}
	putTransport(pkt, idx, c)
	return pkt
}

// encode gives what a sender puts on the wire for messages, with the last group flushed.
func encode(e *Encoder, messages [][]byte) (wire [][]byte) {
	for _, m := range messages {
		wire = append(wire, m)
		if parity := e.Add(nil, m); parity != nil {
			wire = append(wire, parity)
		}
	}
	if parity := e.Flush(nil); parity != nil {
		wire = append(wire, parity)
	}
	return wire
}

// sink is a receiver: what it gives the device, in order.
type sink struct {
	*Decoder
	got []uint64
	bad error
	all map[uint64][]byte // what was sent
}

func newSink(messages [][]byte) *sink {
	s := &sink{Decoder: NewDecoder(), all: map[uint64][]byte{}}
	for _, m := range messages {
		s.all[counter(m)] = m
	}
	return s
}

func (s *sink) give(pkt []byte) {
	if want := s.all[counter(pkt)]; !bytes.Equal(pkt, want) {
		s.bad = fmt.Errorf("packet %d is not what was sent", counter(pkt))
	}
	s.got = append(s.got, counter(pkt))
}

func (s *sink) take(pkt []byte) {
	now, more := true, false
	if IsParity(pkt) {
		now, more = false, s.Parity(pkt)
	} else {
		now, more = s.Packet(pkt)
	}
	if now {
		s.give(pkt)
	}
	if more {
		s.drain()
	}
}

func (s *sink) drain() {
	buf := make([]byte, MaxPacket)
	for n := s.Pop(buf); n > 0; n = s.Pop(buf) {
		s.give(buf[:n])
	}
}

// begin has the decoder begin, as the first group of a session does, and gives what follows counters' first.
func begin(e *Encoder, s *sink, idx uint32) {
	for c := range uint64(GroupSize) {
		m := message(idx, c, 100)
		s.all[c] = m
		s.give(m)
		if parity := e.Add(nil, m); parity != nil {
			s.take(parity)
		}
	}
	s.got = nil
}

func drawMessages(t *rapid.T, idx uint32) [][]byte {
	var messages [][]byte
	n := rapid.IntRange(1, 200).Draw(t, "messages")
	small := rapid.IntRange(0, 3).Draw(t, "one in four is small")
	for i := range n {
		size := rapid.IntRange(minPacket, MaxPacket).Draw(t, "size")
		if i%4 < small {
			size = 96
		}
		messages = append(messages, message(idx, uint64(GroupSize+i), size))
	}
	return messages
}

// Of each group one packet may be missing, in whatever place: all come out, once, in order, and nothing waits.
func TestOneOfEachGroupIsRebuilt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const idx = 7
		n := GroupSize * rapid.IntRange(1, 40).Draw(t, "groups")
		size := rapid.IntRange(minPacket, MaxPacket).Draw(t, "size")
		var messages [][]byte
		for i := range n {
			messages = append(messages, message(idx, uint64(GroupSize+i), size))
		}
		e, s := NewEncoder(), newSink(messages)
		begin(e, s, idx)
		wire := encode(e, messages)
		lost := uint64(0)
		for i, pkt := range wire {
			if i%(GroupSize+1) == 0 {
				lost = uint64(rapid.IntRange(0, GroupSize+1).Draw(t, "lost")) // the last is the parity, or none
			}
			if uint64(i%(GroupSize+1)) != lost {
				s.take(pkt)
			}
		}
		s.GiveUp()
		s.drain()
		if s.bad != nil {
			t.Fatal(s.bad)
		}
		if len(s.got) != n {
			t.Fatalf("%d of %d packets came out", len(s.got), n)
		}
		for i, c := range s.got {
			if c != uint64(GroupSize+i) {
				t.Fatalf("packet %d is number %d: %v", c, i, s.got)
			}
		}
	})
}

// Whatever a path does to packets, what comes out was sent, and all that came in comes out.
func TestNothingIsLostOrChanged(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const idx = 9
		messages := drawMessages(t, idx)
		e, s := NewEncoder(), newSink(messages)
		begin(e, s, idx)
		wire := encode(e, messages)
		loss := rapid.IntRange(0, 40).Draw(t, "loss")
		shuffle := rapid.IntRange(0, 12).Draw(t, "shuffle")
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		for i := range wire {
			if shuffle > 0 && rng.IntN(10) == 0 {
				j := min(i+rng.IntN(shuffle), len(wire)-1)
				wire[i], wire[j] = wire[j], wire[i]
			}
		}
		came := map[uint64]bool{}
		for _, pkt := range wire {
			if rng.IntN(100) < loss {
				continue
			}
			times := 1
			if rng.IntN(20) == 0 {
				times = 2
			}
			for range times {
				s.take(pkt)
			}
			if !IsParity(pkt) {
				came[counter(pkt)] = true
			}
			if gap, waiting := s.Waiting(); waiting && came[gap] {
				t.Fatalf("waits for %d, which came", gap)
			}
			if rng.IntN(50) == 0 {
				s.GiveUp()
				s.drain()
			}
		}
		s.GiveUp()
		s.drain()
		if s.bad != nil {
			t.Fatal(s.bad)
		}
		for _, c := range s.got {
			delete(came, c)
		}
		if len(came) > 0 {
			t.Fatalf("%d packets came in and not out: %v", len(came), came)
		}
		if _, waiting := s.Waiting(); waiting {
			t.Fatal("still waits")
		}
	})
}

// What is added stays within its budget, whatever is sent, and a parity is never longer than the longest packet it covers.
func TestParitiesStayWithinTheirBudget(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := NewEncoder()
		sent, added, longest := 0, 0, 0
		count := func(parity []byte) {
			if len(parity) > longest {
				t.Fatalf("a parity of %d bytes, packets of %d at most", len(parity), longest)
			}
			if added += len(parity); added > sent/budgetShare+budgetMost {
				t.Fatalf("%d bytes added to %d", added, sent)
			}
		}
		for i, m := range drawMessages(t, 1) {
			sent, longest = sent+len(m), max(longest, len(m))
			count(e.Add(nil, m))
			if i%rapid.IntRange(1, 5).Draw(t, "flush") == 0 {
				count(e.Flush(nil))
			}
		}
	})
}

// A full group always has its parity where packets are of one size.
func TestBulkIsAlwaysCovered(t *testing.T) {
	e := NewEncoder()
	parities := 0
	const groups = 1000
	for c := range uint64(groups * GroupSize) {
		if e.Add(nil, message(1, c, 1452)) != nil {
			parities++
		}
	}
	if parities != groups {
		t.Errorf("%d parities for %d groups", parities, groups)
	}
}

// Another key, a packet that was never sent, packets that belong to no group: groups never span them.
func TestGroupsAreOfOneKeyAndWithoutGaps(t *testing.T) {
	e := NewEncoder()
	for _, m := range [][]byte{message(1, 0, 100), message(1, 1, 100), message(2, 2, 100), message(2, 4, 100), message(2, 5, 100)} {
		if e.Add(nil, m) != nil {
			t.Fatal("a parity of less than a group")
		}
	}
	long := make([]byte, MaxPacket+1)
	putTransport(long, 2, 6)
	for _, m := range [][]byte{long, message(2, 6, 100)[:31], {1, 0, 0, 0}} {
		if e.Add(nil, m) != nil {
			t.Fatal("a parity for what belongs to no group")
		}
	}
	parity := e.Flush(nil)
	c, ok := read(parity)
	if !ok || c.base != 4 || c.end != 6 || index(parity) != 2 {
		t.Errorf("the parity covers %+v of key %d", c, index(parity))
	}
	if _, open := e.Open(); open || e.Flush(nil) != nil {
		t.Error("an empty group has a parity")
	}
}

// A burst that no parity can repair delays nobody: as soon as that is clear, what waited comes out.
func TestWhatCannotBeRebuiltIsNotWaitedFor(t *testing.T) {
	const idx = 3
	var messages [][]byte
	for i := range 4 * GroupSize {
		messages = append(messages, message(idx, uint64(GroupSize+i), 500))
	}
	for name, lost := range map[string]func(i int) bool{
		"two of one group":                func(i int) bool { return i == 0 || i == 1 },
		"one and its parity":              func(i int) bool { return i == 0 || i == GroupSize },
		"a whole group":                   func(i int) bool { return i <= GroupSize },
		"two, and one of the next group":  func(i int) bool { return i == 0 || i == 1 || i == GroupSize+2 },
		"one and its parity, twice":       func(i int) bool { return i%(GroupSize+1) == 0 || i%(GroupSize+1) == GroupSize },
		"all parities but the last group": func(i int) bool { return i == 0 || i%(GroupSize+1) == GroupSize && i < 3*GroupSize },
	} {
		t.Run(name, func(t *testing.T) {
			e, s := NewEncoder(), newSink(messages)
			begin(e, s, idx)
			came := 0
			for i, pkt := range encode(e, messages) {
				if lost(i) {
					continue
				}
				if s.take(pkt); !IsParity(pkt) {
					came++
				}
			}
			if len(s.got) < came && name != "one and its parity, twice" || s.bad != nil {
				t.Errorf("%d of %d came out: %v, %v", len(s.got), came, s.got, s.bad)
			}
			if s.GiveUp() {
				s.drain()
			}
			if len(s.got) < came {
				t.Errorf("%d of %d came out at the end: %v", len(s.got), came, s.got)
			}
		})
	}
}

// However much is lost at once, soon afterwards nothing waits: neither for what was lost nor in a slot of it.
func TestBurstsLeaveNothingBehind(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e, s := NewEncoder(), newSink(nil)
		begin(e, s, 3)
		next := uint64(GroupSize)
		run := func(n int, through func() bool) {
			for range n {
				m := message(3, next, 40)
				s.all[next] = m
				next++
				for _, pkt := range [][]byte{m, e.Add(nil, m)} {
					if len(pkt) > 0 && through() {
						s.take(pkt)
					}
				}
			}
		}
		always := func() bool { return true }
		for range rapid.IntRange(1, 5).Draw(t, "bursts") {
			run(rapid.IntRange(0, 50).Draw(t, "before"), func() bool { return rapid.IntRange(0, 9).Draw(t, "lost") > 0 })
			run(rapid.IntRange(1, 3000).Draw(t, "burst"), func() bool { return false })
			run(2*ring, always)
			s.got = nil
			run(3*ring, func() bool {
				_, waiting := s.Waiting()
				return !waiting || t.Failed()
			})
			if s.bad != nil || len(s.got) != 3*ring {
				t.Fatalf("%d of %d packets came out, %v", len(s.got), 3*ring, s.bad)
			}
		}
	})
}

// A sender that has stopped adding parities is not waited for.
func TestWithoutParitiesNothingWaits(t *testing.T) {
	const idx = 3
	s := newSink(nil)
	begin(NewEncoder(), s, idx)
	for c := uint64(GroupSize); c < 1000; c++ {
		m := message(idx, c, 100)
		s.all[c] = m
		if c%20 == 0 {
			continue
		}
		s.take(m)
		if _, waiting := s.Waiting(); waiting && c > GroupSize+2*quiet {
			t.Fatalf("waits at %d", c)
		}
	}
}

// Keys change, and whoever can forge a packet may have the decoder believe in any counter: it finds back to the true ones.
func TestStraysDoNotLast(t *testing.T) {
	for name, stray := range map[string]func(c uint64) []byte{
		"another key":    func(c uint64) []byte { return message(4, c, 100) },
		"far ahead":      func(c uint64) []byte { return message(3, c+1<<60, 100) },
		"at the end":     func(uint64) []byte { return message(3, ^uint64(0), 100) },
		"forged parties": func(c uint64) []byte { p := make([]byte, 100); putHeader(p, 5, c, 3, 100); return p },
	} {
		t.Run(name, func(t *testing.T) {
			e, s := NewEncoder(), newSink(nil)
			begin(e, s, 3)
			for c := range uint64(3 * astray) {
				if m := stray(c); IsParity(m) {
					s.Parity(m)
				} else if now, _ := s.Packet(m); !now && c < astray {
					t.Fatal("a stray is held back")
				}
			}
			repaired := s.Rebuilt
			for c := uint64(GroupSize); c < 40*GroupSize; c++ {
				m := message(3, c, 100)
				s.all[c] = m
				if c%GroupSize != 2 {
					s.take(m)
				}
				if parity := e.Add(nil, m); parity != nil {
					s.take(parity)
				}
			}
			if s.bad != nil || s.Rebuilt < repaired+20 {
				t.Errorf("%d packets were rebuilt, %v", s.Rebuilt-repaired, s.bad)
			}
		})
	}
}

// A forged parity costs one packet that the device refuses, and not the one that it poses as.
func TestForgedParityDisplacesNothing(t *testing.T) {
	s := newSink(nil)
	e := NewEncoder()
	begin(e, s, 3)
	forged := make([]byte, 200)
	putHeader(forged, 3, GroupSize, 1, 200)
	if !s.Parity(forged) {
		t.Fatal("the forged parity gives nothing")
	}
	buf := make([]byte, MaxPacket)
	for s.Pop(buf) > 0 {
	}
	m := message(3, GroupSize, 300)
	s.all[GroupSize] = m
	if s.take(m); len(s.got) != 1 || s.bad != nil {
		t.Errorf("the true packet does not come out: %v, %v", s.got, s.bad)
	}
}

func TestNothingAllocates(t *testing.T) {
	e, d := NewEncoder(), NewDecoder()
	buf, parity, pkt := make([]byte, MaxPacket), make([]byte, 0, MaxPacket), message(1, 0, 1452)
	c := uint64(0)
	if n := testing.AllocsPerRun(1000, func() {
		binary.LittleEndian.PutUint64(pkt[8:], c)
		c++
		if p := e.Add(parity, pkt); len(p) > 0 {
			d.Parity(p)
		}
		if c%7 != 0 {
			d.Packet(pkt)
		}
		for d.Pop(buf) > 0 {
		}
	}); n != 0 {
		t.Errorf("%v allocations a packet", n)
	}
}

func FuzzDecoder(f *testing.F) {
	e := NewEncoder()
	var seed []byte
	for c := range uint64(2 * GroupSize) {
		m := message(1, c, 40)
		for _, pkt := range [][]byte{m, e.Add(nil, m)} {
			if len(pkt) > 0 && c != 7 {
				seed = append(append(seed, byte(len(pkt))), pkt...)
			}
		}
	}
	f.Add(seed)
	forged := make([]byte, 40)
	putHeader(forged, 1, ^uint64(0)-2, MaxGroup, 40)
	f.Add(append([]byte{40}, forged...))
	putHeader(forged, 1, 3, 1, 0xFFFF)
	f.Add(append(append([]byte{40}, forged...), append([]byte{40}, forged...)...))
	f.Fuzz(func(t *testing.T, stream []byte) {
		d := NewDecoder()
		buf := make([]byte, MaxPacket)
		for len(stream) > 0 {
			n := min(int(stream[0]), len(stream)-1)
			pkt := bytes.Clone(stream[1 : 1+n])
			stream = stream[1+n:]
			in, out := 1, 0
			switch {
			case IsParity(pkt):
				d.Parity(pkt)
			case IsTransport(pkt):
				if now, _ := d.Packet(pkt); now {
					out++
				}
			case n == 0:
				d.GiveUp()
			}
			for got := d.Pop(buf); got > 0; got = d.Pop(buf) {
				if out++; got < minPacket || !IsTransport(buf[:got]) {
					t.Fatalf("gives %x", buf[:got])
				}
			}
			if out > in+ring {
				t.Fatalf("%d packets out for one in", out)
			}
		}
	})
}

func BenchmarkEncoder(b *testing.B) {
	e, pkt, parity := NewEncoder(), message(1, 0, 1452), make([]byte, 0, MaxPacket)
	b.SetBytes(int64(len(pkt)))
	for i := range b.N {
		binary.LittleEndian.PutUint64(pkt[8:], uint64(i))
		e.Add(parity, pkt)
	}
}

func BenchmarkDecoder(b *testing.B) {
	d, pkt := NewDecoder(), message(1, 0, 1452)
	parity := make([]byte, 100)
	b.SetBytes(int64(len(pkt)))
	for i := range b.N {
		if i%GroupSize == 0 {
			putHeader(parity, 1, uint64(max(i, GroupSize)-GroupSize), GroupSize, 0)
			d.Parity(parity)
		}
		binary.LittleEndian.PutUint64(pkt[8:], uint64(i))
		d.Packet(pkt)
	}
}
