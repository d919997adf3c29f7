package tunnel

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"pgregory.net/rapid"
)

// crossing is what packets pass on their way from the socket to the TUN, with a device that takes what the test says.
type crossing struct {
	in    *inbox
	turns *turns
	peers []*Peer
	paths []*path

	bufs  [][]byte
	sizes []int
	eps   []conn.Endpoint
}

func newCrossing(peers int) *crossing {
	c := &crossing{sizes: make([]int, conn.IdealBatchSize), eps: make([]conn.Endpoint, conn.IdealBatchSize)}
	c.turns = newTurns(func(a netip.Addr) *Peer {
		if i := int(a.As4()[3]); i < len(c.peers) {
			return c.peers[i]
		}
		return nil
	})
	b := &bind{turns: c.turns, in: newWindow(0)}
	for i := range peers {
		p := &Peer{}
		p.turn.peer = p
		route := &path{peer: p, spot: spot{remote: loopback(uint16(1000 + i))}}
		route.open.Store(true)
		b.table.put(route)
		c.peers, c.paths = append(c.peers, p), append(c.paths, route)
	}
	c.in = &inbox{bind: b, turns: c.turns}
	for range conn.IdealBatchSize {
		c.bufs = append(c.bufs, make([]byte, 2048))
	}
	return c
}

// sealed is the seq-th packet of a peer: what WireGuard sends, with room for so much inside.
func sealed(seq uint64, inside int) []byte {
	pkt := make([]byte, device.MessageKeepaliveSize+inside)
	binary.LittleEndian.PutUint32(pkt, device.MessageTransportType)
	binary.LittleEndian.PutUint64(pkt[8:], seq)
	return pkt
}

// mail is arrivals from one spot.
type mail struct {
	from    route
	packets [][]byte
}

func (m *mail) next() ([]byte, *route, bool) {
	if len(m.packets) == 0 {
		return nil, nil, false
	}
	pkt := m.packets[0]
	m.packets = m.packets[1:]
	return pkt, &m.from, true
}

// arrive has n packets of a peer come in, numbered from seq on, and gives the numbers of those that the device got at once.
func (c *crossing) arrive(peer int, seq uint64, n, inside int) (direct []uint64) {
	m := &mail{from: route{spot: c.paths[peer].spot}}
	for i := range n {
		m.packets = append(m.packets, sealed(seq+uint64(i), inside))
	}
	for more := true; more; {
		var got int
		got, more = c.in.fill(m, c.bufs, c.sizes, c.eps)
		for i := range got {
			direct = append(direct, binary.LittleEndian.Uint64(c.bufs[i][8:]))
		}
	}
	return direct
}

// takeTurn gives what the device gets of those that wait, by peer.
func (c *crossing) takeTurn() map[int][]uint64 {
	got := map[int][]uint64{}
	for i := range c.turns.take(c.bufs, c.sizes, c.eps) {
		peer := slices.Index(c.peers, c.eps[i].(*Peer))
		got[peer] = append(got[peer], binary.LittleEndian.Uint64(c.bufs[i][8:c.sizes[i]]))
	}
	return got
}

// comeOut has n packets of a peer come out at the TUN: those that have been in the device for the longest.
func (c *crossing) comeOut(peer, n int) {
	if f := c.peers[peer].turn.flight; n > 0 && f != nil {
		c.turns.left(netip.AddrFrom4([4]byte{0, 0, 0, byte(peer)}), f.keys[(f.head+min(n, f.n)-1)%flightMost])
	}
}

// TestFloodInTheTunnel: one job sends ten times what the device takes, another a third of that. The second one loses nothing and waits
// for no more than a turn; what the flood has too much is dropped and counted.
func TestFloodInTheTunnel(t *testing.T) { synctest.Test(t, testFloodInTheTunnel) } // time stands still: nothing is written off

func testFloodInTheTunnel(t *testing.T) {
	const (
		rounds  = 300
		takes   = 30 // packets that the device is done with in a round
		victims = takes / 3
		flood   = 10 * takes
		inside  = 1400
	)
	c := newCrossing(2)
	var got, inDevice [2]int
	var seqs [2]uint64
	note := func(peer int, n int) { got[peer] += n; inDevice[peer] += n }
	for round := range rounds {
		for peer, n := range []int{flood, victims} {
			note(peer, len(c.arrive(peer, seqs[peer], n, inside)))
			seqs[peer] += uint64(n)
		}
		for out := takes; out > 0 && inDevice[0]+inDevice[1] > 0; { // in the order in which it got them, more or less
			peer := 0
			if inDevice[1] > inDevice[0] {
				peer = 1
			}
			n := min(out, inDevice[peer], 10)
			c.comeOut(peer, n)
			inDevice[peer] -= n
			out -= n
		}
		for taken := c.takeTurn(); len(taken) > 0; taken = c.takeTurn() {
			for peer, seqs := range taken {
				note(peer, len(seqs))
			}
		}
		if behind := int(seqs[1]) - got[1]; behind > 40*victims {
			t.Fatalf("in round %d the device has not got %d packets of the quiet job", round, behind)
		}
	}
	if dropped, want := c.turns.dropped.Load(), rounds*(flood-takes); int(dropped) < want/2 {
		t.Errorf("%d packets were dropped, want about %d", dropped, want)
	}
	if sent := rounds * victims; got[1] < sent-40*victims {
		t.Errorf("the device got %d of %d packets of the quiet job", got[1], sent)
	}
	if most := rounds * takes; got[0] < most/2 || got[0]+got[1] > most+2*insideLimit {
		t.Errorf("the device got %d packets of the flood and %d of the other, and is done with %d", got[0], got[1], most)
	}
	if n := c.turns.waits(); n > turnTotal {
		t.Errorf("%d bytes wait", n)
	}
}

// TestWhoSendsRubbishHoldsUpNobody: eight jobs send what cannot be decrypted, and so never comes out. Another one's packets go through
// as soon as that has been noticed, however long the eight go on.
func TestWhoSendsRubbishHoldsUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrossing(9)
		timer := time.NewTimer(time.Hour)
		defer timer.Stop()
		var seq uint64
		good := 0
		for round := range 400 {
			for peer := range 8 {
				c.arrive(peer, uint64(round), 20, 100)
			}
			n := len(c.arrive(8, seq, 5, 100))
			seq += 5
			for taken := c.takeTurn(); len(taken) > 0; taken = c.takeTurn() {
				n += len(taken[8])
			}
			good += n
			c.comeOut(8, n)
			c.turns.await(timer)
		}
		if behind := int(seq) - good; behind > 10*5 {
			t.Errorf("%d packets of the honest job have not gone through", behind)
		}
		if c.turns.inside > insideLimit+9*insideLeast {
			t.Errorf("%d packets are thought to be in the device", c.turns.inside)
		}
	})
}

// TestHandshakesHoldUpNobody: a job sends one handshake message after the other while packets wait. These have their turns all the same.
func TestHandshakesHoldUpNobody(t *testing.T) { synctest.Test(t, testHandshakesHoldUpNobody) } // time stands still: nothing is written off

func testHandshakesHoldUpNobody(t *testing.T) {
	c := newCrossing(2)
	c.arrive(1, 0, 2*insideLimit, 100) // as many as the device takes, and as many that wait
	c.comeOut(1, insideLimit)
	waiting := c.turns.waits()
	greeting := make([]byte, device.MessageInitiationSize)
	greeting[0] = device.MessageInitiationType
	for round := range 10 {
		m := &mail{from: route{spot: c.paths[0].spot}}
		for i := range 2 * len(c.bufs) {
			binary.LittleEndian.PutUint64(greeting[8:], uint64(round*1000+i))
			m.packets = append(m.packets, bytes.Clone(greeting))
		}
		if n, more := c.in.deliver(m, c.bufs, c.sizes, c.eps); n == 0 || !more && len(m.packets) > 0 {
			t.Fatalf("%d packets, more: %v", n, more)
		}
	}
	if now := c.turns.waits(); now != 0 {
		t.Errorf("%d of %d bytes wait still", now, waiting)
	}
}

// TestLostPacketsHoldUpNobodyForLong: the packets that the device has of one job never come out, while those of another do all the time.
// What the first one sends next has its turn after a moment.
func TestLostPacketsHoldUpNobodyForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrossing(2)
		c.in.timer = stoppedTimer()
		var seq uint64
		inside, got := 0, 0
		c.arrive(0, 0, 1, 100)
		c.arrive(1, 0, insideLimit/2, 100)
		lost := c.peers[1].turn.inside
		for range 1000 {
			m := &mail{from: route{spot: c.paths[0].spot}}
			for range 100 {
				m.packets = append(m.packets, sealed(seq, 100))
				seq++
			}
			for more := true; more; {
				var n int
				n, more = c.in.deliver(m, c.bufs, c.sizes, c.eps)
				for _, ep := range c.eps[:n] {
					if ep == c.peers[0] {
						inside++
					} else {
						got++
					}
				}
			}
			c.arrive(1, insideLimit+seq, 1, 100) // what the job says next
			out := min(40, inside)
			c.comeOut(0, out)
			inside -= out
			time.Sleep(time.Millisecond / 2)
		}
		if got == 0 {
			t.Errorf("after %d packets that were lost the device gets no other one of the job", lost)
		}
	})
}

// TestTurnsProperty: whatever happens, a peer's packets stay in order and whole, none is lost uncounted, and the sums are right.
func TestTurnsProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := newCrossing(3)
		var sent, got, inside, last [3]uint64
		gone := [3]bool{}
		hand := func(peer int, seqs []uint64) {
			for _, seq := range seqs {
				if seq < last[peer] {
					t.Fatalf("packet %d of peer %d comes after %d", seq, peer, last[peer])
				}
				last[peer] = seq
			}
			got[peer] += uint64(len(seqs))
			inside[peer] += uint64(len(seqs))
		}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			peer := rapid.IntRange(0, 2).Draw(t, "peer")
			switch rapid.IntRange(0, 6).Draw(t, "step") {
			case 0, 1:
				n := rapid.IntRange(1, 150).Draw(t, "packets")
				direct := c.arrive(peer, sent[peer], n, rapid.SampledFrom([]int{0, 20, 1420}).Draw(t, "size"))
				sent[peer] += uint64(n)
				hand(peer, direct)
			case 2, 3:
				for from, seqs := range c.takeTurn() {
					hand(from, seqs)
				}
			case 4, 5:
				n := min(inside[peer], uint64(rapid.IntRange(0, 200).Draw(t, "out")))
				c.comeOut(peer, int(n))
				inside[peer] -= n
			case 6:
				if rapid.IntRange(0, 5).Draw(t, "leaves") == 0 {
					c.turns.forget(c.peers[peer])
					gone[peer] = true
				}
			}
		}
		waiting, flying, bytes := 0, 0, 0
		for i, p := range c.peers {
			for _, k := range p.turn.chunks {
				for at := k.from; at < k.to; at += 2 + int(binary.BigEndian.Uint16(k.data[at:])) {
					waiting++
				}
			}
			bytes += p.turn.bytes
			flying += p.turn.inside
			if gone[i] && p.turn.isBusy() {
				t.Errorf("a peer that has gone has %+v", p.turn)
			}
		}
		total, arrived := uint64(0), uint64(0)
		for i := range sent {
			total, arrived = total+sent[i], arrived+got[i]
		}
		if lost := total - arrived - uint64(waiting); lost != c.turns.dropped.Load() && gone == [3]bool{} {
			t.Errorf("of %d packets %d went on, %d wait and %d were dropped", total, arrived, waiting, c.turns.dropped.Load())
		}
		for _, p := range c.peers {
			if f := p.turn.flight; (f == nil) != (p.turn.inside == 0) || f != nil && f.n != p.turn.inside {
				t.Errorf("%d packets are inside, and they are %+v", p.turn.inside, f)
			}
		}
		if bytes != c.turns.bytes || flying != c.turns.inside || c.turns.crowded.Load() != (bytes > 0) {
			t.Errorf("%d bytes and %d packets inside, want %d and %d", c.turns.bytes, c.turns.inside, bytes, flying)
		}
	})
}

// TestTurnOfOneAlone: the packets of a job that is alone wait only where the device has as many as it may.
func TestTurnOfOneAlone(t *testing.T) { synctest.Test(t, testTurnOfOneAlone) } // time stands still: nothing is written off

func testTurnOfOneAlone(t *testing.T) {
	c := newCrossing(1)
	if n := len(c.arrive(0, 0, 2*insideLimit, 1000)); n < insideLimit || n > insideLimit+grantMost {
		t.Errorf("%d packets go to the device at once", n)
	}
	if c.turns.take(c.bufs, c.sizes, c.eps) != 0 {
		t.Error("a full device gets more")
	}
	c.comeOut(0, insideLimit)
	if n := c.turns.take(c.bufs, c.sizes, c.eps); n != takeMost || !bytes.Equal(c.bufs[0][:4], []byte{device.MessageTransportType, 0, 0, 0}) {
		t.Errorf("a device with room gets %d", n)
	}
}
