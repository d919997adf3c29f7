package netstack

import (
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// upper is the protocol of what an IP header stands before.
func upper(p []byte) uint8 {
	if p[0]>>4 == 4 {
		return p[9]
	}
	return p[6]
}

// carried reports whether a gateway has to do with a packet of a session. Options of IPv4 and extension headers of IPv6 are none of its
// business: hardly anybody sends them (RFC 7126, RFC 7872), routers drop them, and behind them the stack would believe what is not looked
// at here. Of ICMP it takes questions for an echo, and errors: no redirects, and nothing of who is whose neighbour or router.
func carried(p []byte, ip int) bool {
	switch proto := upper(p); {
	case hasOptions(p, ip):
		return false
	case proto == uint8(header.ICMPv4ProtocolNumber) && p[0]>>4 == 4:
		return len(p) < ip+header.ICMPv4MinimumSize || carried4(header.ICMPv4Type(p[ip]))
	case proto == uint8(header.ICMPv6ProtocolNumber) && p[0]>>4 == 6:
		return len(p) < ip+header.ICMPv6MinimumSize || p[ip] <= uint8(header.ICMPv6EchoRequest)
	case p[0]>>4 == 6:
		return !isExtension(proto)
	}
	return true
}

// hasOptions reports options of IPv4.
func hasOptions(p []byte, ip int) bool { return p[0]>>4 == 4 && ip > ipv4Len }

func carried4(t header.ICMPv4Type) bool {
	switch t {
	case header.ICMPv4Echo, header.ICMPv4DstUnreachable, header.ICMPv4TimeExceeded, header.ICMPv4ParamProblem:
		return true
	}
	return false
}

// isExtension tells the extension headers of IPv6 (IANA, IPv6 Extension Header Types), fragments included: those that there were are gone
// when it is asked.
func isExtension(next uint8) bool {
	switch next {
	case 0, 43, 44, 50, 51, 60, 135, 139, 140, 253, 254:
		return true
	}
	return false
}

// forgedError reports an ICMP error about a packet that was not sent to the error's own source. The stack would apply it
// to whoever the quoted packet names: one session could end or throttle another's connections.
func forgedError(p []byte) bool {
	switch {
	case p[0]>>4 == 4 && len(p) >= ipv4Len && p[9] == uint8(header.ICMPv4ProtocolNumber):
		body := p[min(int(p[0]&0xf)*4, len(p)):]
		if len(body) < header.ICMPv4MinimumSize+ipv4Len || !isError4(header.ICMPv4Type(body[0])) {
			return false
		}
		quote := body[header.ICMPv4MinimumSize:]
		return [4]byte(quote[16:20]) != [4]byte(p[12:16])
	case p[0]>>4 == 6 && len(p) >= ipv6Len && p[6] == uint8(header.ICMPv6ProtocolNumber):
		body := p[ipv6Len:]
		if len(body) < header.ICMPv6MinimumSize+ipv6Len || body[0] >= uint8(header.ICMPv6EchoRequest) {
			return false // below 128 are errors (RFC 4443, section 2.1)
		}
		quote := body[header.ICMPv6MinimumSize:]
		return [16]byte(quote[24:40]) != [16]byte(p[8:24])
	}
	return false
}

func isError4(t header.ICMPv4Type) bool {
	switch t {
	case header.ICMPv4DstUnreachable, header.ICMPv4SrcQuench, header.ICMPv4Redirect, header.ICMPv4TimeExceeded, header.ICMPv4ParamProblem:
		return true
	}
	return false
}
