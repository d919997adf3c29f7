package forward

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// pinger is a ping socket (icmp(7)) that is connected to its target, so that it hears what routers say of its requests.
type pinger struct {
	*net.UDPConn
	raw syscall.RawConn
}

// newPinger opens a ping socket. Linux gives it to processes whose group lies in net.ipv4.ping_group_range.
func newPinger(target netip.Addr) (*pinger, error) {
	family, proto, to := unix.AF_INET6, unix.IPPROTO_ICMPV6, unix.Sockaddr(&unix.SockaddrInet6{Addr: target.As16()})
	if target.Is4() {
		family, proto, to = unix.AF_INET, unix.IPPROTO_ICMP, &unix.SockaddrInet4{Addr: target.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, fmt.Errorf("open a ping socket: %w", os.NewSyscallError("socket", err))
	}
	file := os.NewFile(uintptr(fd), "ping")
	defer file.Close()
	if err := unix.Connect(fd, to); err != nil {
		return nil, fmt.Errorf("connect a ping socket: %w", os.NewSyscallError("connect", err))
	}
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("open a ping socket: %w", err)
	}
	p := &pinger{UDPConn: conn.(*net.UDPConn)}
	p.raw, err = p.UDPConn.SyscallConn()
	return p, err
}

// next waits for a message, and hands it on with who sent it: the kernel gives a ping socket what has its identifier, whoever it is from.
// A buffer is taken only when there is something to read.
func (p *pinger) next(use func(b []byte, from netip.Addr)) error {
	var buf *buffer
	var n int
	var from unix.Sockaddr
	var failed error
	err := p.raw.Read(func(fd uintptr) bool {
		buf = datagrams.Get().(*buffer)
		n, from, failed = unix.Recvfrom(int(fd), buf.b, 0)
		if failed == nil {
			return true
		}
		datagrams.Put(buf)
		buf = nil
		return !errors.Is(failed, unix.EAGAIN) && !errors.Is(failed, unix.EINTR)
	})
	if err != nil || failed != nil {
		return errors.Join(err, os.NewSyscallError("recvfrom", failed))
	}
	defer datagrams.Put(buf)
	switch from := from.(type) {
	case *unix.SockaddrInet4:
		use(buf.b[:n], netip.AddrFrom4(from.Addr))
	case *unix.SockaddrInet6:
		use(buf.b[:n], netip.AddrFrom16(from.Addr))
	}
	return nil
}
