package control

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// peerUID is the effective user of the process at the other end (LOCAL_PEERCRED).
func peerUID(conn net.Conn) (int, error) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return -1, err
	}
	var cred *unix.Xucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		cred, failed = unix.GetsockoptXucred(int(fd), unix.SOL_LOCAL, unix.LOCAL_PEERCRED)
	}); err != nil {
		return -1, err
	}
	if failed != nil {
		return -1, fmt.Errorf("read the peer's credentials: %w", failed)
	}
	return int(cred.Uid), nil
}
