package names

import (
	"encoding/binary"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// packetConn answers each datagram from the very address that it came to: a redirected query has to be answered by whom it was
// redirected to, or the kernel does not recognise the answer as one.
type packetConn struct{ conn *net.UDPConn }

// origin is where a datagram came from, and as a control message the address of ours that it came to.
type origin struct {
	from netip.AddrPort
	to   []byte
}

func listenPackets(address string) (*packetConn, error) {
	conn, err := net.ListenPacket("udp", address)
	if err != nil {
		return nil, err
	}
	p := &packetConn{conn.(*net.UDPConn)}
	raw, err := p.conn.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			// Of an IPv4 socket only loopback's in tests: it has one address.
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
		})
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return p, nil
}

func (p *packetConn) read(buf []byte) (int, origin, error) {
	control := make([]byte, unix.CmsgSpace(unix.SizeofInet6Pktinfo))
	n, size, _, from, err := p.conn.ReadMsgUDPAddrPort(buf, control)
	if size < len(control) {
		return n, origin{from: from}, err
	}
	// struct in6_pktinfo ends with the interface; the answer finds its own (RFC 3542, section 6.2).
	binary.NativeEndian.PutUint32(control[unix.CmsgLen(16):], 0)
	return n, origin{from, control}, err
}

// reply sends an answer; whoever does not get it asks again.
func (p *packetConn) reply(answer []byte, o origin) {
	_, _, _ = p.conn.WriteMsgUDPAddrPort(answer, o.to, o.from)
}
