package netstack_test

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/netstack"
)

// segmentSpec is one TCP segment as the stack hands it down.
type segmentSpec struct {
	src, dst netip.AddrPort
	seq, ack uint32
	flags    header.TCPFlags
	options  []byte
	payload  []byte
	mss      int // 0: complete, no offload
}

var timestamps = []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2}

// build makes the packet with its headers, pushed in front of the payload as the stack does.
func (s segmentSpec) build() *stack.PacketBuffer {
	v4 := s.src.Addr().Is4()
	ipLen := header.IPv6MinimumSize
	if v4 {
		ipLen = header.IPv4MinimumSize
	}
	tcpLen := header.TCPMinimumSize + len(s.options)
	opts := stack.PacketBufferOptions{ReserveHeaderBytes: ipLen + tcpLen}
	for part := s.payload; len(part) > 0; { // several views
		n := min(len(part), 1000)
		v := buffer.MakeWithData(part[:n])
		opts.Payload.Merge(&v)
		part = part[n:]
	}
	pkt := stack.NewPacketBuffer(opts)
	tcp := header.TCP(pkt.TransportHeader().Push(tcpLen))
	tcp.Encode(&header.TCPFields{
		SrcPort: s.src.Port(), DstPort: s.dst.Port(), SeqNum: s.seq, AckNum: s.ack,
		DataOffset: uint8(tcpLen), Flags: s.flags, WindowSize: 512,
	})
	copy(tcp[header.TCPMinimumSize:], s.options)
	src, dst := tcpip.AddrFromSlice(s.src.Addr().AsSlice()), tcpip.AddrFromSlice(s.dst.Addr().AsSlice())
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, uint16(pkt.Size()))
	if s.mss == 0 {
		tcp.SetChecksum(^tcp.CalculateChecksum(checksum.Combine(sum, pkt.Data().Checksum())))
	} else {
		tcp.SetChecksum(sum)
		pkt.GSOOptions = stack.GSO{Type: stack.GSOTCPv6, NeedsCsum: true, MSS: uint16(s.mss)}
	}
	if v4 {
		ip := header.IPv4(pkt.NetworkHeader().Push(ipLen))
		ip.Encode(&header.IPv4Fields{TotalLength: uint16(pkt.Size()), TTL: 64, Protocol: 6, SrcAddr: src, DstAddr: dst, ID: 100})
		ip.SetChecksum(^ip.CalculateChecksum())
		pkt.NetworkProtocolNumber = header.IPv4ProtocolNumber
		if s.mss != 0 {
			pkt.GSOOptions.Type = stack.GSOTCPv4
		}
		return pkt
	}
	header.IPv6(pkt.NetworkHeader().Push(ipLen)).Encode(&header.IPv6Fields{
		PayloadLength: uint16(pkt.Size() - ipLen), TransportProtocol: 6, HopLimit: 64, SrcAddr: src, DstAddr: dst,
	})
	pkt.NetworkProtocolNumber = header.IPv6ProtocolNumber
	return pkt
}

// wirePacket is a packet as Read gave it, checked.
type wirePacket struct {
	seq, ack uint32
	flags    header.TCPFlags
	payload  []byte
	size     int
}

// parse checks every length and checksum of a packet.
func parse(t rapid.TB, p []byte) wirePacket {
	t.Helper()
	var tcp header.TCP
	var src, dst tcpip.Address
	if p[0]>>4 == 4 {
		ip := header.IPv4(p)
		if !ip.IsValid(len(p)) || int(ip.TotalLength()) != len(p) || !ip.IsChecksumValid() {
			t.Fatalf("bad IPv4 header: %x", p[:20])
		}
		tcp, src, dst = header.TCP(ip.Payload()), ip.SourceAddress(), ip.DestinationAddress()
	} else {
		ip := header.IPv6(p)
		if int(ip.PayloadLength())+header.IPv6MinimumSize != len(p) {
			t.Fatalf("bad IPv6 length: %d of %d", ip.PayloadLength(), len(p))
		}
		tcp, src, dst = header.TCP(p[header.IPv6MinimumSize:]), ip.SourceAddress(), ip.DestinationAddress()
	}
	data := tcp.Payload()
	if !tcp.IsChecksumValid(src, dst, checksum.Checksum(data, 0), uint16(len(data))) {
		t.Fatal("bad TCP checksum")
	}
	return wirePacket{tcp.SequenceNumber(), tcp.AckNumber(), tcp.Flags(), bytes.Clone(data), len(p)}
}

// device makes one that is not wired to anything.
func device(t testing.TB, opts netstack.Options) *netstack.Device {
	t.Helper()
	d, err := netstack.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// readAll reads packets, batch by batch, until a last one marked with a RST.
func readAll(t rapid.TB, d *netstack.Device, batch int) []wirePacket {
	t.Helper()
	const offset = 16
	bufs, sizes := make([][]byte, batch), make([]int, batch)
	for i := range bufs {
		bufs[i] = make([]byte, offset+2048)
	}
	var got []wirePacket
	for {
		n, err := d.Read(bufs, sizes, offset)
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			p := parse(t, bufs[i][offset:offset+sizes[i]])
			if p.flags.Contains(header.TCPFlagRst) {
				return got
			}
			got = append(got, p)
		}
	}
}

// TestSplitProperty: whatever segments the stack sends, Read gives exactly their bytes in order, in packets that fit the
// MTU and are filled wherever more follows contiguously, with FIN and PSH on the last packet alone.
func TestSplitProperty(t *testing.T) {
	for name, to := range map[string][2]netip.Addr{"ipv4": {addrA, addrB}, "ipv6": {addrA6, addrB6}} {
		t.Run(name, func(t *testing.T) {
			d := device(t, netstack.Options{})
			rapid.Check(t, func(t *rapid.T) {
				checkSplit(t, d, netip.AddrPortFrom(to[0], 443), netip.AddrPortFrom(to[1], 40000))
			})
		})
	}
}

func checkSplit(t *rapid.T, d *netstack.Device, src, dst netip.AddrPort) {
	first := rapid.Uint32().Draw(t, "seq")
	seq := first
	var sent []byte
	for i := range rapid.IntRange(1, 6).Draw(t, "segments") {
		payload := rapid.SliceOfN(rapid.Byte(), 1, 64).Draw(t, "pattern")
		payload = bytes.Repeat(payload, rapid.IntRange(1, 64000/len(payload)).Draw(t, "repeat"))
		spec := segmentSpec{
			src: src, dst: dst, seq: seq, ack: uint32(i), flags: header.TCPFlagAck | header.TCPFlagPsh,
			options: timestamps, payload: payload, mss: 1420 - 40 - (header.IPv6MinimumSize - header.IPv4MinimumSize) - 40,
		}
		if src.Addr().Is4() {
			spec.mss = 1420 - 40 - 40
		}
		send(d, spec)
		sent = append(sent, payload...)
		seq += uint32(len(payload))
	}
	send(d, segmentSpec{src: src, dst: dst, seq: seq, flags: header.TCPFlagRst})
	var got []byte
	packets := readAll(t, d, rapid.SampledFrom([]int{1, 2, 7, 128}).Draw(t, "batch"))
	for i, p := range packets {
		if p.seq != first+uint32(len(got)) {
			t.Fatalf("packet %d: sequence number %d, want %d", i, p.seq, first+uint32(len(got)))
		}
		last := i == len(packets)-1
		if !last && p.size != 1420 {
			t.Fatalf("packet %d of %d has %d bytes", i, len(packets), p.size)
		}
		if p.flags.Contains(header.TCPFlagPsh) != last {
			t.Fatalf("packet %d of %d has flags %v", i, len(packets), p.flags)
		}
		got = append(got, p.payload...)
	}
	if !bytes.Equal(got, sent) {
		t.Fatalf("%d bytes came out of %d, or others", len(got), len(sent))
	}
}

func send(d *netstack.Device, s segmentSpec) {
	pkt := s.build()
	d.Send(pkt)
	pkt.DecRef()
}

// TestSplitKeepsApart: segments that do not belong together are not joined.
func TestSplitKeepsApart(t *testing.T) {
	a, b := netip.AddrPortFrom(addrA, 443), netip.AddrPortFrom(addrB, 40000)
	base := segmentSpec{src: a, dst: b, seq: 1000, flags: header.TCPFlagAck, options: timestamps, payload: make([]byte, 100), mss: 1340}
	for name, change := range map[string]func(*segmentSpec){
		"gap":           func(s *segmentSpec) { s.seq++ },
		"other port":    func(s *segmentSpec) { s.dst = netip.AddrPortFrom(addrB, 40001) },
		"other address": func(s *segmentSpec) { s.src = netip.AddrPortFrom(addrB, 443) },
		"options":       func(s *segmentSpec) { s.options = nil },
		"urgent":        func(s *segmentSpec) { s.flags |= header.TCPFlagUrg },
		"mss":           func(s *segmentSpec) { s.mss = 1000 },
		"complete":      func(s *segmentSpec) { s.mss = 0 },
	} {
		t.Run(name, func(t *testing.T) {
			d := device(t, netstack.Options{})
			second := base
			second.seq += 100
			change(&second)
			send(d, base)
			send(d, second)
			send(d, segmentSpec{src: a, dst: b, flags: header.TCPFlagRst})
			if got := readAll(t, d, 8); len(got) != 2 || len(got[0].payload) != 100 {
				t.Errorf("%d packets", len(got))
			}
			if n := d.Stats().Joined; n != 0 {
				t.Errorf("%d joined", n)
			}
		})
	}
}

// TestSplitFin: a FIN ends the run, and the newest acknowledgement goes out with all of it.
func TestSplitFin(t *testing.T) {
	d := device(t, netstack.Options{})
	a, b := netip.AddrPortFrom(addrA, 443), netip.AddrPortFrom(addrB, 40000)
	s := segmentSpec{src: a, dst: b, seq: 1, ack: 5, flags: header.TCPFlagAck, options: timestamps, payload: make([]byte, 3000), mss: 1340}
	send(d, s)
	s.seq, s.ack, s.flags = 3001, 6, header.TCPFlagAck|header.TCPFlagFin
	send(d, s)
	send(d, segmentSpec{src: a, dst: b, flags: header.TCPFlagRst})
	got := readAll(t, d, 128)
	if len(got) != 5 { // 6,000 bytes at 1,368
		t.Fatalf("%d packets", len(got))
	}
	for i, p := range got {
		if p.ack != 6 || p.flags.Contains(header.TCPFlagFin) != (i == 4) {
			t.Errorf("packet %d: ack %d, flags %v", i, p.ack, p.flags)
		}
	}
}

// TestSegmentSize: packets are filled up to the MTU only where it was the MTU that made the MSS.
func TestSegmentSize(t *testing.T) {
	for _, c := range []struct{ mtu, mss, ip, tcp, want int }{
		{1420, 1340, 20, 32, 1368}, // timestamps, and room for SACK blocks that nobody sends
		{1420, 1340, 20, 20, 1340}, // without timestamps it is the peer that asked for 1,340 (or 1,376)
		{1420, 1344, 20, 20, 1380}, // SACK alone
		{1420, 1320, 40, 32, 1348},
		{1420, 1000, 20, 32, 1000}, // a smaller MSS or path
		{1420, 1368, 20, 32, 1368}, // timestamps alone
		{1420, 1340, 20, 60, 1340}, // SACK blocks in full
		{1280, 1340, 20, 32, 1228}, // never over the MTU
	} {
		if got := netstack.SegmentSize(c.mtu, c.mss, c.ip, c.tcp); got != c.want {
			t.Errorf("segmentSize(%d, %d, %d, %d) = %d, want %d", c.mtu, c.mss, c.ip, c.tcp, got, c.want)
		}
	}
}

// TestIdentification: packets of one segment that may be fragmented have identifications of their own (RFC 6864).
func TestIdentification(t *testing.T) {
	d := device(t, netstack.Options{})
	a, b := netip.AddrPortFrom(addrA, 443), netip.AddrPortFrom(addrB, 40000)
	send(d, segmentSpec{src: a, dst: b, seq: 1, flags: header.TCPFlagAck, options: timestamps, payload: make([]byte, 4000), mss: 1340})
	bufs, sizes := [][]byte{make([]byte, 2048), make([]byte, 2048), make([]byte, 2048)}, make([]int, 3)
	if n, err := d.Read(bufs, sizes, 0); n != 3 || err != nil {
		t.Fatal(n, err)
	}
	for i, p := range bufs {
		if id := binary.BigEndian.Uint16(p[4:]); id != uint16(100+i) {
			t.Errorf("packet %d: identification %d", i, id)
		}
	}
}
