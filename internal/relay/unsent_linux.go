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
