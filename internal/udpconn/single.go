package udpconn

import (
	"net/netip"
)

// ReadFrom waits for one datagram, of which it gives as much as fits into buf: for a socket on which little comes, and that costs no
// [Batch]. Its error is [net.ErrClosed] once the socket is closed; after any other a later read may succeed.
func (c *Conn) ReadFrom(buf []byte) (int, netip.AddrPort, error) {
	n, from, err := c.udp.ReadFromUDPAddrPort(buf)
	return n, unmap(from), err
}
