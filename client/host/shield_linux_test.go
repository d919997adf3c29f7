package host

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvertnet/culvert/internal/lab"
)

// packet is an IPv4 packet (RFC 791) with this transport header and payload.
func packet(proto byte, from, to netip.AddrPort, transport ...byte) []byte {
	b := make([]byte, 20, 20+len(transport))
	b[0], b[8], b[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(transport)))
	copy(b[12:], from.Addr().AsSlice())
	copy(b[16:], to.Addr().AsSlice())
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum))
	binary.BigEndian.PutUint16(transport, from.Port())
	binary.BigEndian.PutUint16(transport[2:], to.Port())
	return append(b, transport...)
}

// datagram is a UDP packet without a checksum (RFC 768).
func datagram(from, to netip.AddrPort, text string) []byte {
	header := make([]byte, 8, 8+len(text))
	binary.BigEndian.PutUint16(header[4:], uint16(8+len(text)))
	return packet(unix.IPPROTO_UDP, from, to, append(header, text...)...)
}

// TestNothingComesInUnasked: whoever holds the other end of the tunnel can answer what the host has asked, and nothing else.
func TestNothingComesInUnasked(t *testing.T) {
	inNamespace(t)
	i := open(t, Options{})
	if i.link.shield == nil {
		lab.Skip(t, "this kernel has no nftables")
	}
	own, far := netip.MustParseAddr("198.18.0.5"), netip.MustParseAddrPort("10.9.0.1:5300")
	check(t, i.SetAddresses([]netip.Addr{own}))
	_, err := i.SetRoutes([]netip.Prefix{netip.MustParsePrefix("10.9.0.0/24")}, nil)
	check(t, err)
	at := netip.AddrPortFrom(own, 7777)
	socket, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	check(t, err)
	defer socket.Close()
	stream, err := net.Listen("tcp", at.String())
	check(t, err)
	defer stream.Close()
	put := func(p []byte) {
		t.Helper()
		const room = 16 // for the header that the device puts before a packet
		_, err := i.Device().Write([][]byte{append(make([]byte, room, room+len(p)), p...)}, room)
		check(t, err)
	}
	syn := make([]byte, 20)
	syn[12], syn[13] = 5<<4, 2 // header length, SYN (RFC 9293, section 3.1)
	put(datagram(far, at, "unasked"))
	put(packet(unix.IPPROTO_TCP, far, at, syn...))
	put(packet(unix.IPPROTO_ICMP, netip.AddrPortFrom(far.Addr(), 0x0800), netip.AddrPortFrom(own, 0xf7ff), 0, 0, 0, 0, 0, 0, 0, 0)) // echo request
	_, err = socket.WriteToUDPAddrPort([]byte("question"), far)
	check(t, err)
	sent := make([][]byte, 128)
	for n := range sent {
		sent[n] = make([]byte, 2048)
	}
	for asked := false; !asked; { // what the host sends; an answer to what came in unasked would come first
		sizes := make([]int, len(sent))
		n, err := i.Device().Read(sent, sizes, 0)
		check(t, err)
		for k := range n {
			p := sent[k][:sizes[k]]
			if len(p) < 20 || p[0]>>4 != 4 {
				continue
			}
			if p[9] != unix.IPPROTO_UDP {
				t.Errorf("the host answers what came in unasked, with protocol %d", p[9])
			}
			asked = asked || slices.Equal(p[16:20], far.Addr().AsSlice())
		}
	}
	put(datagram(far, at, "answer"))
	_ = socket.SetReadDeadline(time.Now().Add(20 * time.Second))
	buf := make([]byte, 100)
	n, _, err := socket.ReadFromUDPAddrPort(buf)
	if err != nil || string(buf[:n]) != "answer" {
		t.Errorf("the host hears %q, %v", buf[:n], err)
	}
}
