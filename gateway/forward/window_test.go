package forward

import (
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// testWindow gives the window of an endpoint of its own, which pays from a purse of 64 MiB.
func testWindow(t *testing.T) (*window, tcpip.Endpoint, *purse) {
	t.Helper()
	e := newEnv(t, Limits{})
	var wq waiter.Queue
	ep, terr := e.f.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &wq)
	if terr != nil {
		t.Fatal(terr)
	}
	t.Cleanup(ep.Close)
	p := &purse{limit: 64 << 20}
	return newWindow(ep, p, floors{sendFloor, receiveFloor}), ep, p
}

// TestReceiveBufferGivesBack: a flow that came first gives back what is beyond its share when others come, and pays for it until the job
// cannot use it any more.
func TestReceiveBufferGivesBack(t *testing.T) {
	w, ep, p := testWindow(t)
	const grown, share, piece = mostRead, 1 << 20, 64 << 10
	p.take(grown-receiveFloor, 0)
	w.readLoan = grown - receiveFloor
	size := ep.SocketOptions().GetReceiveBufferSize
	ep.SocketOptions().SetReceiveBufferSize(grown, false)

	asked, promised := 0, int64(grown)
	for read := int64(0); read < 4*grown; read += piece {
		before := size()
		w.took(piece, func() (int64, bool) { asked++; return share, true })
		switch after := size(); {
		case after != before && after < before/4:
			t.Fatalf("the buffer went from %d to %d", before, after)
		case after != before:
			promised = before
		}
		if lent := p.lent.Load(); lent < size()-receiveFloor || lent > promised-receiveFloor || size() < share {
			t.Fatalf("%d are lent for a buffer of %d and a promise of %d", lent, size(), promised)
		}
	}
	if size() != share || p.lent.Load() != share-receiveFloor {
		t.Errorf("the buffer is %d, lent are %d, want %d", size(), p.lent.Load(), share)
	}
	if asked == 0 {
		t.Error("nobody asked for the share")
	}
	if w.took(1000, func() (int64, bool) { return share, true }); size() < share {
		t.Errorf("a small piece makes the buffer %d", size())
	}
	w.close()
	if lent := p.lent.Load(); lent != 0 {
		t.Errorf("%d are not paid back", lent)
	}
}

// TestReceiveBufferBelowItsFloor: where many want more, a flow has less than its floor, which costs nobody anything.
func TestReceiveBufferBelowItsFloor(t *testing.T) {
	w, ep, p := testWindow(t)
	for range 100 {
		w.took(16<<10, func() (int64, bool) { return leastShare, true })
	}
	if n := ep.SocketOptions().GetReceiveBufferSize(); n != leastShare || p.lent.Load() != 0 {
		t.Errorf("the buffer is %d, lent are %d", n, p.lent.Load())
	}
	w.close()
}

// TestReceiveBufferGrowsToItsShare: beside others a flow's buffer doubles up to its share and no further, and what it pays for that is paid back.
func TestReceiveBufferGrowsToItsShare(t *testing.T) {
	w, ep, p := testWindow(t)
	const share = 5 * receiveFloor
	before := int64(receiveFloor)
	for range 10 {
		if bulk := w.took(bulkRead, func() (int64, bool) { return share, true }); !bulk {
			t.Error("a large piece is not much")
		}
		now := ep.SocketOptions().GetReceiveBufferSize()
		if now > 2*before || now > share || p.lent.Load() != now-receiveFloor {
			t.Fatalf("from %d to %d, lent are %d", before, now, p.lent.Load())
		}
		before = now
	}
	if before != share {
		t.Errorf("the buffer is %d, want %d", before, share)
	}
	if w.took(100, func() (int64, bool) { t.Error("a small piece asks"); return 0, true }) {
		t.Error("a small piece is much")
	}
	w.close()
	if lent := p.lent.Load(); lent != 0 {
		t.Errorf("%d are not paid back", lent)
	}
}
