package netstack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// SetPathMTU bounds what is sent to a destination where less than the MTU fits on the way there: f gives that in bytes, and 0
// for no other bound. TCP is split smaller at once, also on connections that are open already; everything else is sent in
// fragments where it is too long. f is called for each run of packets: it has to be quick and must not block.
func (d *Device) SetPathMTU(f func(dst netip.Addr) int) { d.path.Store(&f) }

// limit is how long a packet with this IP header may be.
func (s *splitter) limit(ip []byte) int {
	f := s.path.Load()
	if f == nil {
		return s.mtu
	}
	var dst netip.Addr
	if ip[0]>>4 == 4 {
		dst = netip.AddrFrom4([4]byte(ip[16:20]))
	} else {
		dst = netip.AddrFrom16([16]byte(ip[24:40]))
	}
	if most := (*f)(dst); most > 0 {
		return min(most, s.mtu)
	}
	return s.mtu
}

// fragments cuts a packet that is longer than its path takes. It gives nothing where that cannot be done: for a packet with
// options or extension headers, which the stack sends none of. The stack sets "don't fragment" on datagrams whose sender never
// asked for that; it is not heeded here, where nobody would be told.
func (s *splitter) fragments(packet []byte, limit int) [][]byte {
	*s.ident++
	if packet[0]>>4 == 4 {
		return fragments4(packet, limit, uint16(*s.ident))
	}
	return fragments6(packet, limit, *s.ident)
}

// fragments4 is RFC 791, section 3.2.
func fragments4(packet []byte, limit int, ident uint16) (out [][]byte) {
	const dont, more = header.IPv4FlagDontFragment << 13, header.IPv4FlagMoreFragments << 13
	field := binary.BigEndian.Uint16(packet[6:])
	if packet[0]&0xF != ipv4Len/4 || limit < ipv4Len+8 {
		return nil
	}
	if field != dont { // an atomic datagram has no identification (RFC 6864, section 4.1)
		ident = binary.BigEndian.Uint16(packet[4:])
	}
	field &^= dont
	data, step := packet[ipv4Len:], (limit-ipv4Len)&^7
	for at := 0; at < len(data); at += step {
		end := min(at+step, len(data))
		f := append(append(make([]byte, 0, ipv4Len+end-at), packet[:ipv4Len]...), data[at:end]...)
		offset := field + uint16(at/8)
		if end < len(data) {
			offset |= more
		}
		binary.BigEndian.PutUint16(f[2:], uint16(len(f)))
		binary.BigEndian.PutUint16(f[4:], ident)
		binary.BigEndian.PutUint16(f[6:], offset)
		binary.BigEndian.PutUint16(f[10:], 0)
		binary.BigEndian.PutUint16(f[10:], ^checksum.Checksum(f[:ipv4Len], 0))
		out = append(out, f)
	}
	return out
}

// fragments6 is RFC 8200, section 4.5. What is a fragment already is cut further.
func fragments6(packet []byte, limit int, ident uint32) (out [][]byte) {
	const fragmentLen = 8
	next, data, base := packet[6], packet[ipv6Len:], uint16(0) // base: offset and M flag
	switch {
	case limit < ipv6Len+fragmentLen+8:
		return nil
	case next == uint8(header.IPv6FragmentExtHdrIdentifier) && len(data) > fragmentLen:
		next, base, ident = data[0], binary.BigEndian.Uint16(data[2:]), binary.BigEndian.Uint32(data[4:])
		data = data[fragmentLen:]
	case next == uint8(header.IPv6HopByHopOptionsExtHdrIdentifier) || next == uint8(header.IPv6RoutingExtHdrIdentifier):
		return nil
	}
	step := (limit - ipv6Len - fragmentLen) &^ 7
	for at := 0; at < len(data); at += step {
		end := min(at+step, len(data))
		offset := base + uint16(at)
		if end < len(data) {
			offset |= 1
		}
		f := append(make([]byte, 0, ipv6Len+fragmentLen+end-at), packet[:ipv6Len]...)
		f = binary.BigEndian.AppendUint16(append(f, next, 0), offset)
		f = append(binary.BigEndian.AppendUint32(f, ident), data[at:end]...)
		f[6] = uint8(header.IPv6FragmentExtHdrIdentifier)
		binary.BigEndian.PutUint16(f[4:], uint16(len(f)-ipv6Len))
		out = append(out, f)
	}
	return out
}

// fragment gives the next fragment of a packet that was cut.
func (s *splitter) fragment(out []byte) int {
	n := copy(out, s.cut[0])
	if s.cut = s.cut[1:]; len(s.cut) == 0 {
		s.cut = nil
	}
	return n
}
