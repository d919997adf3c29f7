package netstack

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// fragmentable is the TTL, or hop limit, that a forwarding device gives to a packet whose sender lets routers fragment it. Nothing
// else of a packet's IP header gets through the stack to who reads its payload, and no packet comes with it: a router would have
// dropped that (RFC 1812, section 5.3.1).
const fragmentable = 0

// markFragmentable marks a packet that may be fragmented on its way: in IPv4 one without "don't fragment", and in both families a
// fragment, which its sender has cut to the size that the way to here takes. ip is the length of the IP header.
func markFragmentable(p []byte, ip int) {
	if p[0]>>4 == 6 {
		if p[6] == uint8(header.IPv6FragmentExtHdrIdentifier) {
			p[7] = fragmentable
		}
		return
	}
	const dont, position = header.IPv4FlagDontFragment << 13, 0x3fff // more fragments, and the offset
	if field := binary.BigEndian.Uint16(p[6:]); field&dont != 0 && field&position == 0 {
		return
	}
	p[8] = fragmentable
	binary.BigEndian.PutUint16(p[10:], 0)
	binary.BigEndian.PutUint16(p[10:], ^checksum.Checksum(p[:ip], 0))
}

// MayBeFragmented tells whether the packet with this IP header, out of the stack of a forwarding device, may be fragmented.
func MayBeFragmented(ip []byte) bool {
	switch {
	case len(ip) >= ipv4Len && ip[0]>>4 == 4:
		return ip[8] == fragmentable
	case len(ip) >= ipv6Len && ip[0]>>4 == 6:
		return ip[7] == fragmentable
	}
	return false
}

// DatagramMayBeFragmented is [MayBeFragmented] for a datagram that was read from an endpoint of which [TellFragmentable] was asked.
func DatagramMayBeFragmented(c *tcpip.ReceivableControlMessages) bool {
	return c.HasTTL && c.TTL == fragmentable || c.HasHopLimit && c.HopLimit == fragmentable
}

// TellFragmentable has an endpoint tell what [DatagramMayBeFragmented] wants to know.
func TellFragmentable(ep tcpip.Endpoint) {
	ep.SocketOptions().SetReceiveTTL(true)
	ep.SocketOptions().SetReceiveHopLimit(true)
}
