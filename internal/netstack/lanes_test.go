package netstack_test

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/culvertnet/culvert/internal/netstack"
)

// laneAddr is the i-th session's address.
func laneAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}) }

// bulk is a segment of TCP data to a session.
func bulk(to netip.Addr, size int) segmentSpec {
	return segmentSpec{
		src: netip.AddrPortFrom(addrA, 1), dst: netip.AddrPortFrom(to, 2), flags: header.TCPFlagAck, options: timestamps,
		payload: make([]byte, size), mss: 1340,
	}
}

func packetRoom() [][]byte {
	bufs := make([][]byte, 128)
	for i := range bufs {
		bufs[i] = make([]byte, 2048)
	}
	return bufs
}

// TestLanesTakeTurns: whoever has little waiting gets as much as whoever has much, to the byte of a batch, and small packets do not wait
// behind others' large ones.
func TestLanesTakeTurns(t *testing.T) {
	l := netstack.NewLanes()
	defer l.Close()
	var lanes []*netstack.Lane
	for i, segments := range []int{100, 20, 20} {
		lanes = append(lanes, l.Open(laneAddr(i)))
		for n := range segments {
			s := bulk(laneAddr(i), 60000)
			s.seq = uint32(n * 60000)
			if !l.Push(s.build()) {
				t.Fatal("a segment was dropped")
			}
		}
	}
	ack := l.Open(laneAddr(9))
	l.Push(bulk(laneAddr(9), 0).build())
	got, bufs := map[netip.Addr]int{}, packetRoom()
	for turn := 0; got[laneAddr(1)] < 1<<20; turn++ {
		to, sizes := l.Read(bufs)
		if len(to) == 0 {
			t.Fatal("nothing to read")
		}
		sent := map[netip.Addr]int{}
		for i, a := range to {
			got[a] += sizes[i]
			sent[a]++
		}
		for i, lane := range append(lanes, ack) {
			lane.Sent(sent[laneAddr([]int{0, 1, 2, 9}[i])])
		}
		if turn == 4 && got[laneAddr(9)] == 0 {
			t.Error("a small packet waits for others' turns")
		}
	}
	for i := range 3 {
		if n, want := got[laneAddr(i)], got[laneAddr(1)]; n < want-130<<10 || n > want+130<<10 {
			t.Errorf("lane %d got %d bytes, lane 1 %d", i, n, want)
		}
	}
}

// TestLaneThatIsNotSent: packets that the tunnel keeps hold others up for a moment at most, and no more of them are let in but one now and
// then.
func TestLaneThatIsNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, bufs := netstack.NewLanes(), packetRoom()
		defer l.Close()
		l.Open(laneAddr(0))
		good := l.Open(laneAddr(1))
		for range 100 {
			l.Push(bulk(laneAddr(0), 60000).build())
		}
		stuck := 0
		read := func() int {
			to, _ := l.Read(bufs)
			n := 0
			for _, a := range to {
				if a == laneAddr(1) {
					n++
				} else {
					stuck++
				}
			}
			good.Sent(n)
			return len(to)
		}
		for read() > 0 {
		}
		if stuck > 512+44 {
			t.Errorf("%d packets are inside", stuck)
		}
		for range 10 {
			l.Push(bulk(laneAddr(1), 60000).build())
		}
		for range 10 { // the timer of a full tunnel
			if read() == 0 && l.Depth() > 40*60000 {
				l.Block()
			}
		}
		for read() > 0 {
		}
		if n := l.Inside(); n != 0 {
			t.Errorf("%d packets count as inside", n)
		}
		before := stuck
		for range 60 {
			time.Sleep(time.Second)
			l.Push(bulk(laneAddr(0), 100).build())
			read()
		}
		if n := stuck - before; n < 2 || n > 5 {
			t.Errorf("%d more went in within a minute", n)
		}
	})
}

// TestDeadLanes: sessions without keys get a packet each into the tunnel, so that it asks for keys, whatever waits for them. With
// keys all of it goes.
func TestDeadLanes(t *testing.T) {
	const dead, packets = 200, 100
	l, bufs := netstack.NewLanes(), packetRoom()
	defer l.Close()
	live := false
	var lanes []*netstack.Lane
	for i := range dead {
		lane := l.Open(laneAddr(i))
		lane.SetLive(func() bool { return live }, func() bool { return true })
		lanes = append(lanes, lane)
		s := bulk(laneAddr(i), 1000)
		s.mss = 0
		for range packets {
			l.Push(s.build())
		}
	}
	if n := l.Depth(); n > dead*packets*1052 {
		t.Errorf("%d bytes wait for sessions without keys", n)
	}
	all := func() (n int) {
		for {
			to, _ := l.Read(bufs)
			if len(to) == 0 {
				return n
			}
			n += len(to)
			if live {
				for _, a := range to {
					b := a.As4()
					lanes[int(b[2])<<8|int(b[3])].Sent(1)
				}
			}
		}
	}
	if n := all(); n != dead {
		t.Errorf("%d packets went to sessions without keys, want one each", n)
	}
	waiting := l.Depth() / 1052
	live = true
	for _, lane := range lanes {
		lane.Sent(0)
	}
	if n := all(); n != waiting || l.Depth() != 0 {
		t.Errorf("%d of %d packets went out with keys, %d bytes are left", n, waiting, l.Depth())
	}
}

// TestLanesClose: a lane that is closed leaves nothing, whatever it was about to send, and a new one has its addresses.
func TestLanesClose(t *testing.T) {
	l, bufs := netstack.NewLanes(), packetRoom()
	defer l.Close()
	old := l.Open(laneAddr(0))
	for range 10 {
		l.Push(bulk(laneAddr(0), 60000).build())
	}
	l.Read(bufs)
	next := l.Open(laneAddr(0))
	old.Close()
	old.Close()
	l.Push(bulk(laneAddr(0), 100).build())
	to, sizes := l.Read(bufs)
	if len(to) != 1 || sizes[0] != 152 || l.Depth() != 0 || l.Inside() != 1 {
		t.Errorf("%v, %v; %d bytes and %d packets are left", to, sizes, l.Depth(), l.Inside())
	}
	next.Sent(1)
	next.Close()
	old.Sent(5)
	if l.Inside() != 0 {
		t.Errorf("%d packets are inside closed lanes", l.Inside())
	}
}
