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
		w.took(piece, func() int64 { asked++; return share })
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
	if w.took(1000, func() int64 { return share }); size() < share {
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
		w.took(16<<10, func() int64 { return leastShare })
	}
	if n := ep.SocketOptions().GetReceiveBufferSize(); n != leastShare || p.lent.Load() != 0 {
		t.Errorf("the buffer is %d, lent are %d", n, p.lent.Load())
	}
	w.close()
}
