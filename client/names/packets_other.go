//go:build !linux

package names

import "net"

// packetConn is a UDP socket. Nothing is redirected to it on this system.
type packetConn struct{ conn net.PacketConn }

type origin struct{ from net.Addr }

func listenPackets(address string) (*packetConn, error) {
	conn, err := net.ListenPacket("udp", address)
	return &packetConn{conn}, err
}

func (p *packetConn) read(buf []byte) (int, origin, error) {
	n, from, err := p.conn.ReadFrom(buf)
	return n, origin{from}, err
}

func (p *packetConn) reply(answer []byte, o origin) { _, _ = p.conn.WriteTo(answer, o.from) }
