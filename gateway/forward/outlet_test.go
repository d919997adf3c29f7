package forward

import (
	"bytes"
	"net"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/culvertnet/culvert/internal/policy"
)

// TestTooBigIsSaid: the job hears what fits by the size of its own packets, whatever family the target is of; what no IPv6 host would
// heed is fragmented instead, and nothing is said that makes no difference.
func TestTooBigIsSaid(t *testing.T) {
	four, six := netip.MustParseAddr("198.19.0.9"), netip.MustParseAddr("fd63:756c:7665:7274::c613:9")
	for name, c := range map[string]struct {
		dst, target string
		mtu, want   int // 0: nothing is said
		narrow      bool
	}{
		"ipv4":                        {four.String(), "10.0.0.1", 1300, 1300, false},
		"ipv4, tiny":                  {four.String(), "10.0.0.1", 576, 576, false},
		"ipv6":                        {six.String(), "fd00::1", 1300, 1300, false},
		"ipv4 to ipv6":                {four.String(), "fd00::1", 1300, 1280, false},
		"ipv6 to ipv4":                {six.String(), "10.0.0.1", 1300, 1320, false},
		"ipv6 to ipv4, too small":     {six.String(), "10.0.0.1", 1200, 0, true},
		"the path takes more than us": {four.String(), "10.0.0.1", 1500, 0, false},
		"unknown":                     {six.String(), "10.0.0.1", 0, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			e, out := rawEnv(t, nothing)
			key := flowKey{policy.UDP, netip.AddrPortFrom(job4, 4000), netip.AddrPortFrom(netip.MustParseAddr(c.dst), 53)}
			quote := icmp4Packet(job4, key.dst.Addr(), header.ICMPv4Echo, 0, 0, nil)
			if key.dst.Addr().Is6() {
				key.src = netip.AddrPortFrom(job6, 4000)
				quote = icmp6Packet(job6, key.dst.Addr(), header.ICMPv6EchoRequest, 0, 0, nil)
			}
			o := newOutlet(&flow{s: e.s, key: key}, new(net.UDPConn), netip.MustParseAddr(c.target), header.UDPMinimumSize)
			o.tooBig(quote, c.mtu)
			if o.narrow.Load() != c.narrow {
				t.Errorf("narrow: %v", o.narrow.Load())
			}
			e.write(echoTo(job4, gateway4)) // answered after whatever was said
			checkTooBig(t, <-out, quote, c.want)
		})
	}
}

// checkTooBig expects word that mtu fits, or with 0 nothing but the gateway's own echo reply.
func checkTooBig(t *testing.T, packet, quote []byte, mtu int) {
	t.Helper()
	four := packet[0]>>4 == 4
	switch {
	case mtu == 0:
		if !four || header.ICMPv4(packet[header.IPv4MinimumSize:]).Type() != header.ICMPv4EchoReply {
			t.Errorf("something was said: % x", packet)
		}
	case four:
		m := header.ICMPv4(packet[header.IPv4MinimumSize:])
		if m.Type() != header.ICMPv4DstUnreachable || m.Code() != header.ICMPv4FragmentationNeeded || int(m.MTU()) != mtu || !bytes.Equal(m.Payload(), quote) {
			t.Errorf("type %d, code %d, MTU %d: % x", m.Type(), m.Code(), m.MTU(), m.Payload())
		}
	default:
		m := header.ICMPv6(packet[header.IPv6MinimumSize:])
		if m.Type() != header.ICMPv6PacketTooBig || m.Code() != 0 || int(m.MTU()) != mtu || !bytes.Equal(m.Payload(), quote) {
			t.Errorf("type %d, code %d, MTU %d: % x", m.Type(), m.Code(), m.MTU(), m.Payload())
		}
	}
}
