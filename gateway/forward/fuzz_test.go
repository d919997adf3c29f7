package forward

import (
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/policy"
)

// mend makes a packet of a session of what may be anything: source, lengths and checksums are right, so that it gets as far as it can.
func mend(p []byte) []byte {
	p = append([]byte(nil), p[:min(len(p), netstack.DefaultMTU)]...)
	switch {
	case len(p) >= header.IPv4MinimumSize && p[0]>>4 == 4:
		ip := header.IPv4(p)
		ip.SetTotalLength(uint16(len(p)))
		ip.SetSourceAddress(tcpip.AddrFromSlice(job4.AsSlice()))
		if n := int(ip.HeaderLength()); n >= header.IPv4MinimumSize && n <= len(p) {
			ip.SetChecksum(0)
			ip.SetChecksum(^ip.CalculateChecksum())
			sumUp(ip.TransportProtocol(), p[n:], ip.SourceAddress(), ip.DestinationAddress())
		}
	case len(p) >= header.IPv6MinimumSize && p[0]>>4 == 6:
		ip := header.IPv6(p)
		ip.SetPayloadLength(uint16(len(p) - header.IPv6MinimumSize))
		ip.SetSourceAddress(tcpip.AddrFromSlice(job6.AsSlice()))
		sumUp(tcpip.TransportProtocolNumber(ip.NextHeader()), p[header.IPv6MinimumSize:], ip.SourceAddress(), ip.DestinationAddress())
	}
	return p
}

func sumUp(proto tcpip.TransportProtocolNumber, b []byte, src, dst tcpip.Address) {
	pseudo := header.PseudoHeaderChecksum(proto, src, dst, uint16(len(b)))
	switch {
	case proto == header.TCPProtocolNumber && len(b) >= header.TCPMinimumSize:
		header.TCP(b).SetChecksum(0)
		header.TCP(b).SetChecksum(^checksum.Checksum(b, pseudo))
	case proto == header.UDPProtocolNumber && len(b) >= header.UDPMinimumSize:
		header.UDP(b).SetLength(uint16(len(b)))
		header.UDP(b).SetChecksum(0)
		header.UDP(b).SetChecksum(^checksum.Checksum(b, pseudo))
	case proto == header.ICMPv4ProtocolNumber && len(b) >= header.ICMPv4MinimumSize:
		header.ICMPv4(b).SetChecksum(0)
		header.ICMPv4(b).SetChecksum(^checksum.Checksum(b, 0))
	case proto == header.ICMPv6ProtocolNumber && len(b) >= header.ICMPv6MinimumSize:
		header.ICMPv6(b).SetChecksum(0)
		header.ICMPv6(b).SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: header.ICMPv6(b), Src: src, Dst: dst}))
	}
}

func opening(to netip.AddrPort, flags header.TCPFlags) []byte {
	s := header.TCP(make([]byte, header.TCPMinimumSize, header.TCPMinimumSize+8))
	s.Encode(&header.TCPFields{SrcPort: 4000, DstPort: to.Port(), SeqNum: 1, AckNum: 1, DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 1000})
	from := job4
	if to.Addr().Is6() {
		from = job6
	}
	return tcpPacket(from, to.Addr(), s)
}

func datagram(to netip.AddrPort, data string) []byte {
	p := make([]byte, header.IPv4MinimumSize+header.UDPMinimumSize, 100)
	header.IPv4(p).Encode(&header.IPv4Fields{TTL: 64, Protocol: uint8(header.UDPProtocolNumber), DstAddr: full(to).Addr, SrcAddr: full(netip.AddrPortFrom(job4, 0)).Addr})
	header.UDP(p[header.IPv4MinimumSize:]).Encode(&header.UDPFields{SrcPort: 5000, DstPort: to.Port()})
	return append(p, data...)
}

// FuzzIngress feeds a gateway what a session could send, through the stack and the forwarder to real targets. Nothing may crash it or
// stop it, no more flows may be open than the session may have, and nothing may come out for anybody but the session.
func FuzzIngress(f *testing.F) {
	target := netip.MustParseAddrPort(server(f, "tcp4", echo))
	limits := Limits{SessionFlows: 16, SessionRate: 1 << 20, DialTimeout: 1e9}
	gateway, err := netstack.New(netstack.Options{Addresses: []netip.Addr{gateway4, gateway6}, Forward: true})
	if err != nil {
		f.Fatal(err)
	}
	fwd, err := New(Options{Device: gateway, Local: []netip.Addr{gateway4, gateway6}, Limits: limits})
	if err != nil {
		f.Fatal(err)
	}
	fwd.decide = func(_ *policy.Scope, fl policy.Flow) policy.Verdict {
		return policy.Verdict{Allowed: fl.Dst == target || fl.Proto == policy.ICMP && fl.Dst.Addr() == loopback, Reason: "not granted"}
	}
	s, err := fwd.Add("session-1", []netip.Addr{job4, job6}, new(policy.Scope))
	if err != nil {
		f.Fatal(err)
	}
	out := make(chan struct{})
	go func() {
		defer close(out)
		onlyFor(f, gateway, job4, job6)
	}()
	f.Cleanup(func() { _ = fwd.Close(); gateway.Close(); <-out })

	denied := netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), 80)
	for _, p := range [][]byte{
		opening(target, header.TCPFlagSyn), opening(target, header.TCPFlagAck|header.TCPFlagPsh), opening(target, header.TCPFlagRst), opening(denied, header.TCPFlagSyn),
		opening(netip.AddrPortFrom(gateway6, 80), header.TCPFlagSyn), opening(netip.MustParseAddrPort("[::1]:1"), header.TCPFlagSyn),
		datagram(target, "hello"), datagram(denied, ""), datagram(netip.AddrPortFrom(gateway4, 53), "not DNS"), datagram(netip.MustParseAddrPort("224.0.0.1:9"), "x"),
		icmp4Packet(job4, loopback, header.ICMPv4Echo, 0, 7<<16|1, []byte("echo")), icmp6Packet(job6, gateway6, header.ICMPv6EchoRequest, 0, 1, nil),
		icmp4Packet(job4, gateway4, header.ICMPv4DstUnreachable, 4, 576, opening(target, header.TCPFlagSyn)),
	} {
		f.Add(p, opening(target, header.TCPFlagAck), true)
		f.Add(p, p[:len(p)-3], false)
	}
	f.Fuzz(func(t *testing.T, one, two []byte, mended bool) {
		if mended {
			one, two = mend(one), mend(two)
		}
		if n, err := gateway.Write([][]byte{one, two}, 0); n != 2 || err != nil {
			t.Fatal(n, err)
		}
		if open := s.Counts().Open; int(open) > limits.SessionFlows {
			t.Fatalf("%d flows are open", open)
		}
	})
}

// onlyFor reads what leaves a gateway until it is closed: all of it is for these addresses.
func onlyFor(tb testing.TB, d *netstack.Device, addrs ...netip.Addr) {
	bufs, sizes := make([][]byte, d.BatchSize()), make([]int, d.BatchSize())
	for i := range bufs {
		bufs[i] = make([]byte, 65535)
	}
	for {
		n, err := d.Read(bufs, sizes, 0)
		if err != nil {
			return
		}
		for i := range n {
			var to netip.Addr
			switch p := bufs[i][:sizes[i]]; {
			case p[0]>>4 == 4:
				to = netip.AddrFrom4([4]byte(p[16:20]))
			default:
				to = netip.AddrFrom16([16]byte(p[24:40]))
			}
			known := false
			for _, a := range addrs {
				known = known || a == to
			}
			if !known {
				tb.Errorf("a packet leaves for %v", to)
			}
		}
	}
}
