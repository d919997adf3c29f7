package relay

import (
	"net"

	"golang.org/x/sys/unix"
)

// maxUnsent is how many unsent bytes the kernel takes for one connection.
const maxUnsent = 256 << 10

// limitUnsent sets TCP_NOTSENT_LOWAT; without it the queue in the kernel is only longer.
func limitUnsent(conn *net.TCPConn) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, maxUnsent)
	})
}

// acknowledger gives a function that has the kernel acknowledge now what it has received (tcp(7), TCP_QUICKACK).
func acknowledger(conn *net.TCPConn) func() {
	raw, err := conn.SyscallConn()
	if err != nil {
		return func() {}
	}
	now := func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1) }
	return func() { _ = raw.Control(now) }
}
