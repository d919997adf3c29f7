package netstack

import (
	"net"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Bounds of what one of the stack's own listeners takes: it serves small requests, to callers that may mean harm.
const (
	listenBacklog = 128
	ownBuffer     = 64 << 10 // bytes of each accepted connection, in each direction
)

// ListenTCP listens on one of the stack's own addresses. What it accepts is a [*Conn] with small buffers.
func (d *Device) ListenTCP(addr netip.AddrPort) (net.Listener, error) {
	fail := func(err error) (net.Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: "tcp", Addr: net.TCPAddrFromAddrPort(addr), Err: err}
	}
	if err := d.own(addr.Addr()); err != nil {
		return fail(err)
	}
	wq := new(waiter.Queue)
	ep, terr := d.stack.NewEndpoint(tcp.ProtocolNumber, protocolOf(addr.Addr()), wq)
	if terr != nil {
		return fail(Errno(terr))
	}
	ep.SocketOptions().SetReceiveBufferSize(ownBuffer, false)
	if terr = ep.Bind(fullAddress(addr)); terr == nil {
		terr = ep.Listen(listenBacklog)
	}
	if terr != nil {
		ep.Close()
		return fail(Errno(terr))
	}
	return &listener{wq: wq, ep: ep, addr: net.TCPAddrFromAddrPort(addr)}, nil
}

// listener gives connections that can be reset.
type listener struct {
	wq   *waiter.Queue
	ep   tcpip.Endpoint
	addr net.Addr
}

// Addr is where it listens.
func (l *listener) Addr() net.Addr { return l.addr }

// Close closes the listener and what nobody has accepted.
func (l *listener) Close() error {
	l.ep.Close()
	return nil
}

// Accept waits for the next connection.
func (l *listener) Accept() (net.Conn, error) {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr)
	l.wq.EventRegister(&entry)
	defer l.wq.EventUnregister(&entry)
	for {
		ep, wq, terr := l.ep.Accept(nil)
		if terr == nil {
			ep.SocketOptions().SetSendBufferSize(ownBuffer, true)
			return &Conn{TCPConn: gonet.NewTCPConn(wq, ep), ep: ep}, nil
		}
		if _, empty := terr.(*tcpip.ErrWouldBlock); !empty {
			return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: net.ErrClosed}
		}
		<-ready
	}
}

// Conn is a TCP connection that one of the stack's listeners has accepted.
type Conn struct {
	*gonet.TCPConn
	ep tcpip.Endpoint
}

// Abort resets the connection.
func (c *Conn) Abort() { c.ep.Abort() }
