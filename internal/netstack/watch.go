package netstack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Watch is told of the first two segments of TCP connections through the device. Its functions are called from many
// goroutines, Answered with a lock of the connection held; they must not block nor call the connection.
type Watch struct {
	// Asked hears of each SYN from the tunnel before the stack sees it.
	Asked func(from, to netip.AddrPort)
	// Answered hears of each SYN-ACK of the stack, with its sequence number.
	Answered func(from, to netip.AddrPort, seq uint32)
}

// SetWatch sets who is told; nil for nobody.
func (d *Device) SetWatch(w *Watch) {
	d.watch.Store(w)
	d.link.watch.Store(w)
}

// asked tells of a segment that is a SYN and no SYN-ACK. The headers have been checked.
func (w *Watch) asked(p []byte, ip int) {
	from, to := tuple(p, p[ip:])
	w.Asked(from, to)
}

// answered tells of a packet of the stack that is a SYN-ACK.
func (w *Watch) answered(pkt *stack.PacketBuffer) {
	const mask = header.TCPFlagSyn | header.TCPFlagAck
	tcp := pkt.TransportHeader().Slice()
	if pkt.TransportProtocolNumber != header.TCPProtocolNumber || len(tcp) < header.TCPMinimumSize ||
		header.TCPFlags(tcp[header.TCPFlagsOffset])&mask != mask {
		return
	}
	from, to := tuple(pkt.NetworkHeader().Slice(), tcp)
	w.Answered(from, to, binary.BigEndian.Uint32(tcp[4:]))
}

// tuple reads the two ends of a segment.
func tuple(ip, tcp []byte) (from, to netip.AddrPort) {
	sport, dport := binary.BigEndian.Uint16(tcp), binary.BigEndian.Uint16(tcp[2:])
	if ip[0]>>4 == 4 {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(ip[12:16])), sport), netip.AddrPortFrom(netip.AddrFrom4([4]byte(ip[16:20])), dport)
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(ip[8:24])), sport), netip.AddrPortFrom(netip.AddrFrom16([16]byte(ip[24:40])), dport)
}
