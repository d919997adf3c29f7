package cork

import (
	"net"
	"syscall"
)

// Acknowledger gives a function that has the kernel acknowledge now what it has received (tcp(7), TCP_QUICKACK), instead of waiting 40 ms
// for something to send with it. Elsewhere than on Linux the function does nothing.
func Acknowledger(conn *net.TCPConn) func() {
	raw, err := conn.SyscallConn()
	if err != nil {
		return func() {}
	}
	now := func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_QUICKACK, 1) }
	return func() { _ = raw.Control(now) }
}
