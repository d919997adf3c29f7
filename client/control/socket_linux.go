package control

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// address is an abstract socket's name (unix(7)): it vanishes with the process, and belongs to a network namespace.
func address(name string, uid int) string { return fmt.Sprintf("@culvert/%d/%s", uid, name) }

// sockets lists the names of tunnels whose sockets are users', from /proc/net/unix: the last column is the name.
func sockets(users []int) []string {
	file, err := os.Open("/proc/net/unix")
	if err != nil {
		return nil
	}
	defer file.Close()
	var names []string
	for lines := bufio.NewScanner(file); lines.Scan(); {
		_, rest, ok := strings.Cut(lines.Text(), " @culvert/")
		if !ok {
			continue
		}
		user, name, _ := strings.Cut(rest, "/")
		for _, uid := range users {
			if user == strconv.Itoa(uid) {
				names = append(names, name)
			}
		}
	}
	return names
}

func listen(name string) (net.Listener, error) {
	return net.Listen("unix", address(name, os.Geteuid()))
}

// peerUID is the effective user of the process at the other end, as the kernel noted it at connect or listen (SO_PEERCRED).
func peerUID(conn net.Conn) (int, error) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return -1, err
	}
	var cred *unix.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return -1, err
	}
	if failed != nil {
		return -1, fmt.Errorf("read the peer's credentials: %w", failed)
	}
	return int(cred.Uid), nil
}
