package netstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// DialContext opens a TCP or UDP connection from the stack; address is "IP:port". What the far side says comes back as
// the errno that the kernel would give: ECONNREFUSED, EHOSTUNREACH, ENETUNREACH, ETIMEDOUT.
func (d *Device) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: fmt.Errorf("the address must be IP:port: %w", err)}
	}
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if d.closed.Load() {
		return nil, &net.OpError{Op: "dial", Net: network, Addr: net.TCPAddrFromAddrPort(to), Err: errNoStack}
	}
	switch network {
	case "tcp", "tcp4", "tcp6":
		return d.dialTCP(ctx, network, to)
	case "udp", "udp4", "udp6":
		full := fullAddress(to)
		return gonet.DialUDP(d.stack, nil, &full, protocolOf(to.Addr()))
	}
	return nil, &net.OpError{Op: "dial", Net: network, Err: net.UnknownNetworkError(network)}
}

// dialTCP is gonet.DialContextTCP with errors that a caller can match.
func (d *Device) dialTCP(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: network, Addr: net.TCPAddrFromAddrPort(to), Err: err}
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	var wq waiter.Queue
	ep, terr := d.stack.NewEndpoint(tcp.ProtocolNumber, protocolOf(to.Addr()), &wq)
	if terr != nil {
		return fail(Errno(terr))
	}
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventErr | waiter.EventHUp)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	terr = ep.Connect(fullAddress(to))
	if _, started := terr.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ctx.Done():
			ep.Close()
			return fail(ctx.Err())
		case <-ready:
		}
		terr = ep.LastError()
	}
	if terr != nil {
		ep.Close()
		return fail(Errno(terr))
	}
	return gonet.NewTCPConn(&wq, ep), nil
}

// listenBuffer is how many bytes of datagrams wait at one of the stack's own addresses.
const listenBuffer = 1 << 20

// ListenUDP listens on one of the stack's own addresses.
func (d *Device) ListenUDP(addr netip.AddrPort) (net.PacketConn, error) {
	fail := func(err error) (net.PacketConn, error) {
		return nil, &net.OpError{Op: "listen", Net: "udp", Addr: net.UDPAddrFromAddrPort(addr), Err: err}
	}
	if err := d.own(addr.Addr()); err != nil {
		return fail(err)
	}
	wq := new(waiter.Queue)
	ep, terr := d.stack.NewEndpoint(udp.ProtocolNumber, protocolOf(addr.Addr()), wq)
	if terr != nil {
		return fail(Errno(terr))
	}
	ep.SocketOptions().SetReceiveBufferSize(listenBuffer, false)
	if terr = ep.Bind(fullAddress(addr)); terr != nil {
		ep.Close()
		return fail(Errno(terr))
	}
	return gonet.NewUDPConn(wq, ep), nil
}

// own refuses addresses that are not the stack's: one that takes packets for any destination would listen on all.
func (d *Device) own(a netip.Addr) error {
	d.addrMu.Lock()
	defer d.addrMu.Unlock()
	if _, ok := d.addresses[a]; !ok {
		return syscall.EADDRNOTAVAIL
	}
	return nil
}

func fullAddress(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFromSlice(a.Addr().AsSlice()), Port: a.Port()}
}

// Errno gives a stack's error as the error of the operating system that means the same; others keep their text.
func Errno(err tcpip.Error) error {
	switch err.(type) {
	case nil:
		return nil
	case *tcpip.ErrConnectionRefused:
		return syscall.ECONNREFUSED
	case *tcpip.ErrConnectionReset, *tcpip.ErrConnectionAborted, *tcpip.ErrAborted:
		return syscall.ECONNRESET
	case *tcpip.ErrHostUnreachable, *tcpip.ErrHostDown:
		return syscall.EHOSTUNREACH
	case *tcpip.ErrNetworkUnreachable, *tcpip.ErrNoNet:
		return syscall.ENETUNREACH
	case *tcpip.ErrTimeout:
		return os.NewSyscallError("connect", syscall.ETIMEDOUT)
	}
	return tcpipError{err}
}

// tcpipError makes an error of a stack's error.
type tcpipError struct{ err tcpip.Error }

// Error gives the failure as package net words it.
func (e tcpipError) Error() string { return e.err.String() }

// tooLongError says that a packet is longer than the MTU.
type tooLongError struct{ size, mtu int }

// Error gives the failure as package net words it.
func (e *tooLongError) Error() string {
	return fmt.Sprintf("a packet of %d bytes does not fit an MTU of %d", e.size, e.mtu)
}

var errNoStack = errors.New("the network stack is closed")
