package forward

import (
	"bytes"
	"errors"
	"net"
	"sync"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/policy"
)

const (
	udpBuffer = 512 << 10 // of one flow in the stack, towards the target, where its session can pay for it
	udpTurn   = 32        // datagrams that a flow carries before another one of its session does
)

// handleUDP sees every datagram that belongs to no flow yet, on the goroutine that delivers packets. False leaves it to
// the stack, which answers that the port is unreachable.
func (f *Forwarder) handleUDP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	src, dst := endpoints(id)
	if f.isLocal(dst.Addr()) {
		return false
	}
	s := f.session(src.Addr())
	if s == nil {
		return true
	}
	key := flowKey{policy.UDP, src, dst}
	fl, why, known := s.admit(key, f.limits.UDPIdle)
	if known {
		return true // between two goroutines of WireGuard: the flow's endpoint is just being made
	}
	if fl == nil && why.Reason == reasonHeld {
		return true
	}
	if fl == nil {
		s.deny(key, why)
		if dst.Addr().IsGlobalUnicast() || dst.Addr().IsLoopback() {
			s.reject(quoteOf(pkt), prohibited)
		}
		return true
	}
	fl.quote = quoteOf(pkt)
	first := pkt.Clone()
	defer first.DecRef()
	wq := new(waiter.Queue)
	ep, terr := udp.NewForwarderRequest(f.stack, id, first).CreateEndpoint(wq)
	if terr != nil {
		fl.close()
		return true
	}
	netstack.TellFragmentable(ep)
	loan := fl.udpBuffer(ep)
	go func() {
		defer fl.s.purse.give(loan)
		f.serveUDP(fl, ep, wq)
	}()
	return true
}

// udpBuffer sizes a flow's buffer in the stack; it says how much of it is lent.
func (fl *flow) udpBuffer(ep tcpip.Endpoint) (loan int64) {
	size := fl.floors.send
	if fl.s.purse.take(udpBuffer-size, 0) {
		loan, size = udpBuffer-size, udpBuffer
	}
	ep.SocketOptions().SetReceiveBufferSize(size, false)
	return loan
}

// serveUDP carries one flow over a connected socket, so that only the target it was dialled to can answer.
func (f *Forwarder) serveUDP(fl *flow, ep tcpip.Endpoint, wq *waiter.Queue) {
	defer fl.close()
	defer ep.Close()
	conn, err := f.connect(fl, "udp")
	if err != nil {
		if why := fl.turnAway(err); why != none && fl.ctx.Err() == nil {
			fl.s.reject(fl.quote, why)
		}
		return
	}
	// Closing the endpoint wakes the goroutine that waits for the job, closing the socket the other.
	stop := sync.OnceFunc(func() { ep.Close(); _ = conn.Close() })
	defer stop()
	if !fl.onReset(stop) {
		return
	}
	out := newOutlet(fl, conn.(socket), fl.target.Load().Addr(), header.UDPMinimumSize)
	var up sync.WaitGroup
	up.Go(func() {
		fl.udpUp(ep, wq, out)
		stop()
	})
	fl.udpDown(ep, out)
	stop()
	up.Wait()
}

// udpUp copies datagrams from the job to the target until the endpoint is closed.
func (fl *flow) udpUp(ep tcpip.Endpoint, wq *waiter.Queue, out *outlet) {
	entry, readable := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	for fl.udpDrain(ep, out) {
		select {
		case <-readable:
		case <-fl.ctx.Done():
			return
		}
	}
}

// udpDrain copies what waits, in turns with the session's other flows; false says that the endpoint is closed.
func (fl *flow) udpDrain(ep tcpip.Endpoint, out *outlet) bool {
	for {
		more, open, late := fl.udpSome(ep, out)
		if late != nil {
			if err := out.send(late.b, fl.quote, late.cut); err == nil {
				fl.carry(len(late.b), 0)
			} else if !fl.udpError(err) {
				return false
			}
		}
		if !more {
			return open
		}
	}
}

// lateDatagram is one that the socket had no room for; cut says that it may be fragmented.
type lateDatagram struct {
	b   []byte
	cut bool
}

// udpSome copies some of what waits. more says that there may be more, open that the endpoint is not closed. A datagram that the socket has
// no room for is late: whoever waits for a slow link holds up no other flow.
func (fl *flow) udpSome(ep tcpip.Endpoint, out *outlet) (more, open bool, late *lateDatagram) {
	fl.s.carrying.Lock()
	defer fl.s.carrying.Unlock()
	buf := datagrams.Get().(*buffer)
	defer datagrams.Put(buf)
	for range udpTurn {
		w := tcpip.SliceWriter(buf.b)
		res, terr := ep.Read(&w, tcpip.ReadOptions{})
		if _, empty := terr.(*tcpip.ErrWouldBlock); empty {
			return false, true, nil
		}
		if terr != nil {
			return false, false, nil
		}
		cut := netstack.DatagramMayBeFragmented(&res.ControlMessages)
		err := out.sendNow(buf.b[:res.Count], fl.quote, cut)
		switch {
		case err == nil:
			fl.carry(res.Count, 0)
		case errors.Is(err, syscall.EAGAIN):
			return true, true, &lateDatagram{bytes.Clone(buf.b[:res.Count]), cut}
		case !fl.udpError(err):
			return false, false, nil
		}
	}
	return true, true, nil
}

// udpDown copies datagrams from the target to the job until the socket is closed.
func (fl *flow) udpDown(ep tcpip.Endpoint, out *outlet) {
	var reader bytes.Reader
	src, err := newSource(out.conn, &datagrams, false, func(b []byte) error {
		fl.carry(0, len(b))
		fl.s.carrying.Lock()
		defer fl.s.carrying.Unlock()
		reader.Reset(b)
		_, _ = ep.Write(&reader, tcpip.WriteOptions{}) // what does not fit is lost, as datagrams are
		return nil
	})
	for err == nil || fl.udpError(err) {
		if err = src.next(); errors.Is(err, syscall.EMSGSIZE) {
			out.heard(fl.quote)
		}
	}
}

// udpError tells the job what the network said about its datagrams; false says that the socket is of no more use.
func (fl *flow) udpError(err error) bool {
	if errors.Is(err, net.ErrClosed) {
		return false
	}
	if errors.Is(err, syscall.EMSGSIZE) { // the outlet has told what there is to tell
		return true
	}
	why := rejectFor(err)
	if errors.Is(err, syscall.ECONNREFUSED) {
		why = portUnreachable
	}
	if why == none {
		return false
	}
	fl.s.counts.failed.Add(1)
	fl.s.reject(fl.quote, why)
	return fl.ctx.Err() == nil
}
