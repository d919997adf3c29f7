package forward

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/culvertnet/culvert/gateway/names"
	"github.com/culvertnet/culvert/internal/wire"
)

// rejection is a kind of ICMP destination-unreachable error.
type rejection uint8

const (
	none rejection = iota
	netUnreachable
	hostUnreachable
	portUnreachable
	prohibited
)

// codes gives the codes of a rejection for ICMPv4 (RFC 792, RFC 1812) and ICMPv6 (RFC 4443). An IPv6 host that does not
// answer would be code 3, but gVisor's stack, which is the client's in proxy mode, takes notice of 0 and 4 alone.
var codes = map[rejection]struct{ v4, v6 uint8 }{
	netUnreachable:  {0, 0},
	hostUnreachable: {1, 0},
	portUnreachable: {3, 4},
	prohibited:      {13, 1},
}

// rejectFor says what a router in front of the target would have said for a failed dial; none stands for a reset.
func rejectFor(err error) rejection {
	var timeout net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET):
		return none
	case errors.Is(err, syscall.ENETUNREACH):
		return netUnreachable
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.EHOSTDOWN), errors.Is(err, syscall.ETIMEDOUT):
		return hostUnreachable
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return prohibited // a firewall of the gateway's own host
	case errors.As(err, &timeout) && timeout.Timeout():
		return hostUnreachable
	case causeOf(err) == wire.CauseNoName:
		return hostUnreachable
	}
	return none
}

// dialReason says in words why a target could not be reached, without addresses: they are known.
func dialReason(err error) string {
	var timeout net.Error
	switch {
	case errors.Is(err, context.Canceled):
		return reasonOver
	case errors.Is(err, names.ErrNoName):
		return names.ErrNoName.Error()
	case errors.Is(err, names.ErrNoData):
		return names.ErrNoData.Error()
	case errors.Is(err, names.ErrSilent), errors.Is(err, names.ErrBusy):
		return "the name cannot be resolved at present"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection refused"
	case errors.Is(err, syscall.ENETUNREACH):
		return "no route to the network"
	case errors.Is(err, syscall.EHOSTUNREACH):
		return "no route to the host"
	case errors.As(err, &timeout) && timeout.Timeout():
		return "no answer in time"
	}
	return "the connection failed"
}

// reject sends the job an ICMP error about the packet that begins with quote, from the gateway's own address, as a router
// would. It reports whether it did: errors are limited in rate, and there may be no address to send from.
func (s *Session) reject(quote []byte, why rejection) bool {
	if len(quote) == 0 || !s.errors.Allow() {
		return false
	}
	packet := s.f.unreachable(quote, why)
	return packet != nil && s.f.device.Inject(packet) == nil
}

// unreachable builds the error. A port is unreachable in the word of the target itself.
func (f *Forwarder) unreachable(quote []byte, why rejection) []byte {
	switch {
	case len(quote) >= header.IPv4MinimumSize && quote[0]>>4 == 4:
		to, about := netip.AddrFrom4([4]byte(quote[12:16])), netip.AddrFrom4([4]byte(quote[16:20]))
		return icmp4Packet(f.rejecter(about, why), to, header.ICMPv4DstUnreachable, codes[why].v4, 0, quote)
	case len(quote) >= header.IPv6MinimumSize && quote[0]>>4 == 6:
		to, about := netip.AddrFrom16([16]byte(quote[8:24])), netip.AddrFrom16([16]byte(quote[24:40]))
		return icmp6Packet(f.rejecter(about, why), to, header.ICMPv6DstUnreachable, codes[why].v6, 0, quote)
	}
	return nil
}

// rejecter is the address that an error about a destination comes from.
func (f *Forwarder) rejecter(about netip.Addr, why rejection) netip.Addr {
	if why != portUnreachable {
		for a := range f.local {
			if a.Is4() == about.Is4() {
				return a
			}
		}
	}
	return about
}

const ttl = 64

// icmp4Packet builds an ICMPv4 message with its IP header; rest is the header's second word.
func icmp4Packet(from, to netip.Addr, typ header.ICMPv4Type, code uint8, rest uint32, body []byte) []byte {
	p := make([]byte, header.IPv4MinimumSize+header.ICMPv4MinimumSize+len(body))
	ip := header.IPv4(p)
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(p)), TTL: ttl, Protocol: uint8(header.ICMPv4ProtocolNumber), Flags: header.IPv4FlagDontFragment,
		SrcAddr: tcpip.AddrFromSlice(from.AsSlice()), DstAddr: tcpip.AddrFromSlice(to.AsSlice()),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	icmp := header.ICMPv4(p[header.IPv4MinimumSize:])
	icmp.SetType(typ)
	icmp.SetCode(header.ICMPv4Code(code))
	binary.BigEndian.PutUint32(icmp[4:], rest)
	copy(icmp[header.ICMPv4MinimumSize:], body)
	icmp.SetChecksum(^checksum.Checksum(icmp, 0))
	return p
}

// icmp6Packet does the same for ICMPv6.
func icmp6Packet(from, to netip.Addr, typ header.ICMPv6Type, code uint8, rest uint32, body []byte) []byte {
	src, dst := tcpip.AddrFromSlice(from.AsSlice()), tcpip.AddrFromSlice(to.AsSlice())
	p := make([]byte, header.IPv6MinimumSize+header.ICMPv6MinimumSize+len(body))
	header.IPv6(p).Encode(&header.IPv6Fields{
		PayloadLength: uint16(len(p) - header.IPv6MinimumSize), TransportProtocol: header.ICMPv6ProtocolNumber,
		HopLimit: ttl, SrcAddr: src, DstAddr: dst,
	})
	icmp := header.ICMPv6(p[header.IPv6MinimumSize:])
	icmp.SetType(typ)
	icmp.SetCode(header.ICMPv6Code(code))
	binary.BigEndian.PutUint32(icmp[4:], rest)
	copy(icmp[header.ICMPv6MinimumSize:], body)
	icmp.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: icmp, Src: src, Dst: dst}))
	return p
}
