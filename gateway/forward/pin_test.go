package forward

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// TestPin: while a window is pinned, reading lets the job send no more; each turn lets it send what the turn is for, nothing is sent twice, and
// nothing is owed in the end.
func TestPin(t *testing.T) {
	e := newEnv(t, Limits{})
	var wq waiter.Queue
	ls, terr := e.f.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &wq)
	if terr != nil {
		t.Fatal(terr)
	}
	defer ls.Close()
	if terr := ls.Bind(tcpip.FullAddress{Addr: tcpip.AddrFrom4(gateway4.As4()), Port: 7}); terr != nil {
		t.Fatal(terr)
	}
	if terr := ls.Listen(1); terr != nil {
		t.Fatal(terr)
	}
	c, err := e.dialFrom(job4, netip.AddrPortFrom(gateway4, 7), 20*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var ep tcpip.Endpoint
	eventually(t, "the connection is accepted", func() bool {
		ep, _, terr = ls.Accept(nil)
		return terr == nil
	})
	defer ep.Abort()
	p := &purse{limit: 64 << 20}
	w := newWindow(ep, p, floors{sendFloor, receiveFloor})
	r := &relay{ep: ep, window: w}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _ = c.Write(make([]byte, 8<<20)) // more than all turns are for; ends with the connection
	}()
	share := func() (int64, bool) { return receiveFloor, true }
	read := func() {
		for r.unread() > 0 {
			if r.unread() > w.promised() {
				t.Fatalf("%d bytes are there, and %d were promised", r.unread(), w.promised())
			}
			res, terr := ep.Read(io.Discard, tcpip.ReadOptions{})
			if terr != nil {
				t.Fatal(terr)
			}
			w.took(res.Count, share)
		}
	}
	eventually(t, "what was promised at first is used up", func() bool {
		read()
		return w.promised() <= receiveFloor/windowPart
	})
	begun := w.read
	for turn := range 20 {
		if turn > 0 {
			w.settle()
			w.open(turnBytes, r.unread())
			if lent := p.lent.Load(); lent != windowPart*turnBytes-receiveFloor {
				t.Fatalf("turn %d: %d are lent", turn, lent)
			}
		}
		eventually(t, "all has come that the window was open for", func() bool { return w.promised() <= r.unread() })
		w.pin()
		read()
	}
	if want := int64(20 * turnBytes); w.read-begun > want || w.read-begun < want-turnBytes {
		t.Errorf("%d bytes came in 20 turns of %d, the first of them a floor's", w.read, turnBytes)
	}
	if n := e.job.Stack().Stats().TCP.Retransmits.Value(); n != 0 {
		t.Errorf("the job sent %d segments again", n)
	}
	w.unpin()
	if size, lent := ep.SocketOptions().GetReceiveBufferSize(), p.lent.Load(); size-receiveFloor != lent {
		t.Errorf("%d are lent for a buffer of %d", lent, size)
	}
	w.close()
	if lent := p.lent.Load(); lent != 0 {
		t.Errorf("%d are still lent", lent)
	}
	ep.Abort()
	<-gone
}

// TestPinWaits: a window that was open for more than its buffer holds by now is not pinned before that has been used up.
func TestPinWaits(t *testing.T) {
	w, ep, _ := testWindow(t)
	const grown, piece = 1 << 20, 64 << 10
	w.readLoan = grown - receiveFloor
	ep.SocketOptions().SetReceiveBufferSize(grown, false)
	if !w.holds() {
		t.Error("a buffer that has not shrunk does not hold what it promised")
	}
	share := func() (int64, bool) { return receiveFloor, true }
	w.took(piece, share)
	size := ep.SocketOptions().GetReceiveBufferSize()
	if size >= grown {
		t.Fatalf("the buffer is still %d", size)
	}
	for left := int64(grown / windowPart); left > size/windowPart; left -= piece {
		if w.holds() {
			t.Fatalf("a buffer of %d holds %d", size, left)
		}
		w.took(piece, share)
	}
	if !w.holds() {
		t.Errorf("a buffer of %d does not hold %d", size, w.promised())
	}
}

// TestUploadByTurns: an upload that takes turns alone comes through whole, and nothing of it is sent twice.
func TestUploadByTurns(t *testing.T) {
	e := newEnv(t, Limits{})
	e.f.turns = newTurns(batchBytes-1, turnBytes)
	const size = 16 << 20
	count := make(chan int64, 1)
	target := netip.MustParseAddrPort(server(t, "tcp4", func(c *net.TCPConn) {
		n, _ := io.Copy(io.Discard, c)
		count <- n
	}))
	c, err := e.dialFrom(job4, target, 20*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if n := <-count; n != size {
		t.Errorf("%d of %d bytes came through", n, size)
	}
	eventually(t, "all is paid back", func() bool { return e.f.purse.lent.Load() == 0 })
}
