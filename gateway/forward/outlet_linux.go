package forward

import (
	"errors"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// setFragment says whether datagrams of a socket may be fragmented, here and on their way (ip(7), IP_MTU_DISCOVER).
func setFragment(fd int, six, cut bool) error {
	level, name, how := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO
	if six {
		level, name = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	if cut {
		how = unix.IP_PMTUDISC_DONT // the same numbers in both families
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, level, name, how))
}

// pathMTU is the path MTU of a socket that is connected to target (ip(7), IP_MTU); 0 where there is none. A ping socket of IPv6 knows
// the route that it was connected by, or none any more: where it has nothing to say, it is connected again.
func pathMTU(fd int, target netip.Addr) int {
	if target.Is4() {
		mtu, _ := unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU)
		return max(mtu, 0)
	}
	mtu, err := unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU)
	if _, port := unix.Getpeername(fd); err != nil && port != nil && unix.Connect(fd, &unix.SockaddrInet6{Addr: target.As16()}) == nil {
		mtu, _ = unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU)
	}
	return max(mtu, 0)
}

// attempt is one attempt to send.
type attempt struct {
	try func(uintptr) bool // made once
	b   []byte             // what it sends
	err error              // what came of it
}

// now sends if the socket takes it at once.
func (o *outlet) now(b []byte) error {
	if o.raw == nil {
		return o.wait(b)
	}
	a := &o.attempt
	if a.try == nil {
		a.try = a.write
	}
	a.b = b
	err := o.raw.Write(a.try)
	if a.b = nil; err != nil {
		return err
	}
	return a.err
}

// write runs under the poller, and never has it wait.
func (a *attempt) write(fd uintptr) bool {
	for {
		_, err := unix.Write(int(fd), a.b)
		if !errors.Is(err, unix.EINTR) {
			a.err = os.NewSyscallError("write", err)
			return true
		}
	}
}
