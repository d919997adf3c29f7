package proxy

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"

	"github.com/vishvananda/netlink"
)

var errOwner = errors.New("the connection's owner is not known")

// permitted refuses a connection unless one of users owns its other end.
func permitted(conn net.Conn, users []int) error {
	peer := conn.RemoteAddr().(*net.TCPAddr)
	uid, err := owner(peer, conn.LocalAddr().(*net.TCPAddr))
	if err != nil {
		return err
	}
	if !slices.Contains(users, uid) {
		return fmt.Errorf("it belongs to user %d", uid)
	}
	return nil
}

// owner looks up who holds the socket bound to peer and connected to us: by sock_diag(7), or in /proc where that is
// missing. A socket that no process holds any more reads as root's, so it counts as nobody's.
func owner(peer, us *net.TCPAddr) (int, error) {
	socket, err := netlink.SocketGet(peer, us)
	if err != nil {
		return ownerFromProc(peer.AddrPort(), us.AddrPort())
	}
	if socket.INode == 0 {
		return -1, errOwner
	}
	return int(socket.UID), nil
}

func ownerFromProc(peer, us netip.AddrPort) (int, error) {
	name := "/proc/net/tcp"
	if !peer.Addr().Unmap().Is4() {
		name = "/proc/net/tcp6"
	}
	file, err := os.Open(name)
	if err != nil {
		return -1, fmt.Errorf("%w: %w", errOwner, err)
	}
	defer file.Close()
	return findOwner(file, procAddr(peer), procAddr(us))
}

// findOwner reads the table of proc_pid_net(5): sl, local, remote, state, queues, timer, retransmissions, uid, timeout, inode.
func findOwner(table io.Reader, local, remote []byte) (int, error) {
	lines := bufio.NewScanner(table)
	for lines.Scan() {
		fields := bytes.Fields(lines.Bytes())
		if len(fields) < 10 || !bytes.Equal(fields[1], local) || !bytes.Equal(fields[2], remote) {
			continue
		}
		uid, err := strconv.Atoi(string(fields[7]))
		if err != nil || string(fields[9]) == "0" {
			return -1, errOwner
		}
		return uid, nil
	}
	return -1, errOwner
}

// procAddr writes an address as /proc/net/tcp does: each 32-bit word in the machine's own order, then the port.
func procAddr(a netip.AddrPort) []byte {
	var out []byte
	raw := a.Addr().Unmap().AsSlice()
	for word := range slices.Chunk(raw, 4) {
		host := binary.BigEndian.AppendUint32(nil, binary.NativeEndian.Uint32(word))
		out = append(out, bytes.ToUpper([]byte(hex.EncodeToString(host)))...)
	}
	return fmt.Appendf(out, ":%04X", a.Port())
}
