package forward

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tcpSocket is a TCP socket of the operating system. Package net's takes a dozen system calls and a goroutine to connect, and tells the
// scheduler of each call that it may wait. None does here: the socket does not block.
type tcpSocket struct {
	*os.File // in the runtime's poller
	raw      syscall.RawConn
	to       netip.AddrPort
}

var _ tcpConn = (*tcpSocket)(nil)

// dialTCP opens a connection to an address, before ctx ends.
func dialTCP(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	s, err := connectTCP(ctx, to)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(to), Err: err}
	}
	return s, nil
}

func connectTCP(ctx context.Context, to netip.AddrPort) (*tcpSocket, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // the job's own TCP has decided already
	t := newTry(to)
	t.connect(uintptr(fd)) // before the poller has the socket, for which one that is not connected is worth waking up
	s := &tcpSocket{File: os.NewFile(uintptr(fd), "tcp"), to: to}
	if s.raw, err = s.File.SyscallConn(); err == nil {
		err = s.await(ctx, t)
	}
	if err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// try connects a socket.
type try struct {
	name  unix.RawSockaddrInet6 // or RawSockaddrInet4
	size  uintptr
	errno syscall.Errno // of the last call
}

func newTry(to netip.AddrPort) *try {
	t := &try{size: unix.SizeofSockaddrInet6}
	if to.Addr().Is4() {
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&t.name))
		v4.Family, v4.Addr, t.size = unix.AF_INET, to.Addr().As4(), unix.SizeofSockaddrInet4
	} else {
		t.name.Family, t.name.Addr = unix.AF_INET6, to.Addr().As16()
	}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&t.name.Port))[:], to.Port()) // at the same place in both
	return t
}

// connect begins to connect, or asks how far it has come (connect(2)); false says that it is to wait.
func (t *try) connect(fd uintptr) bool {
	_, _, t.errno = syscall.RawSyscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&t.name)), t.size)
	return t.errno != unix.EINPROGRESS && t.errno != unix.EALREADY && t.errno != unix.EINTR
}

// await returns when the socket is connected, or will not be. It asks first: a target nearby has answered by now.
func (s *tcpSocket) await(ctx context.Context, t *try) error {
	if t.errno != 0 {
		stop := context.AfterFunc(ctx, func() { _ = s.SetWriteDeadline(time.Unix(1, 0)) })
		err := s.raw.Write(t.connect)
		if !stop() {
			return ctx.Err()
		}
		if err != nil {
			return err
		}
	}
	switch {
	case t.errno != 0:
		return os.NewSyscallError("connect", t.errno)
	case s.local() == s.to:
		return os.NewSyscallError("connect", unix.ECONNREFUSED) // to itself, from a port where nobody listens (RFC 9293, section 3.5)
	}
	return nil
}

// local is the socket's own address; the zero one where it has none.
func (s *tcpSocket) local() (own netip.AddrPort) {
	_ = s.raw.Control(func(fd uintptr) {
		switch name, _ := unix.Getsockname(int(fd)); name := name.(type) {
		case *unix.SockaddrInet4:
			own = netip.AddrPortFrom(netip.AddrFrom4(name.Addr), uint16(name.Port))
		case *unix.SockaddrInet6:
			own = netip.AddrPortFrom(netip.AddrFrom16(name.Addr), uint16(name.Port))
		}
	})
	return own
}

// LocalAddr implements [net.Conn].
func (s *tcpSocket) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(s.local()) }

// RemoteAddr implements [net.Conn].
func (s *tcpSocket) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(s.to) }

// SyscallConn implements [syscall.Conn].
func (s *tcpSocket) SyscallConn() (syscall.RawConn, error) { return s.raw, nil }

// CloseWrite ends what is sent to the target.
func (s *tcpSocket) CloseWrite() error {
	var errno syscall.Errno
	if err := s.raw.Control(func(fd uintptr) { _, _, errno = syscall.RawSyscall(unix.SYS_SHUTDOWN, fd, unix.SHUT_WR, 0) }); err != nil {
		return err
	}
	if errno != 0 {
		return os.NewSyscallError("shutdown", errno)
	}
	return nil
}

// SetLinger is [net.TCPConn.SetLinger] for no less than 0 seconds.
func (s *tcpSocket) SetLinger(seconds int) error {
	return s.set(func(fd int) error {
		return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: int32(seconds)})
	})
}

// SetKeepAliveConfig is [net.TCPConn.SetKeepAliveConfig] for a configuration without defaults.
func (s *tcpSocket) SetKeepAliveConfig(c net.KeepAliveConfig) error {
	return s.set(func(fd int) error {
		return errors.Join(
			unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(c.Idle/time.Second)),
			unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(c.Interval/time.Second)),
			unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, c.Count),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1),
		)
	})
}

func (s *tcpSocket) set(do func(fd int) error) (err error) {
	if closed := s.raw.Control(func(fd uintptr) { err = do(int(fd)) }); closed != nil {
		return closed
	}
	return os.NewSyscallError("setsockopt", err)
}

// unicastOnly takes back what package net lets every UDP socket do: without it the kernel refuses to send to a broadcast address, which
// would reach this machine as well.
func unicastOnly(_, _ string, raw syscall.RawConn) (err error) {
	if closed := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 0) }); closed != nil {
		return closed
	}
	return os.NewSyscallError("setsockopt", err)
}
