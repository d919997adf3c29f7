package forward

import (
	"bytes"
	"net"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/wire"
)

// udpEcho is a UDP server on loopback. It sends every datagram back.
func udpEcho(t *testing.T) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 65535)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
	return c
}

func (e *env) udp(to string) net.Conn {
	c, err := e.job.DialContext(e.t.Context(), "udp", to)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { c.Close() })
	return c
}

func exchange(t *testing.T, c net.Conn, text []byte) {
	t.Helper()
	if _, err := c.Write(text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 65535)
	_ = c.SetReadDeadline(time.Now().Add(40 * time.Second))
	n, err := c.Read(got)
	if err != nil || !bytes.Equal(got[:n], text) {
		t.Fatalf("got %d bytes, %v; want %d", n, err, len(text))
	}
}

// TestUDPEcho exchanges datagrams of sizes up to the largest there is: those over the MTU travel as fragments.
func TestUDPEcho(t *testing.T) {
	target := udpEcho(t)
	e := newEnv(t, Limits{})
	c := e.udp(target.LocalAddr().String())
	total := uint64(0)
	for _, size := range []int{1, 512, 1392, 1393, 4096, 20000} {
		exchange(t, c, bytes.Repeat([]byte{byte(size)}, size))
		total += uint64(size)
	}
	eventually(t, "the flow is counted", func() bool {
		return e.s.Counts() == wire.FlowCounts{Open: 1, Allowed: 1, BytesUp: total, BytesDn: total}
	})
}

func TestUDPIdle(t *testing.T) {
	target := udpEcho(t)
	e := newEnv(t, Limits{})
	c := e.udp(target.LocalAddr().String())
	exchange(t, c, []byte("one"))
	e.f.sweep(time.Now().Add(59 * time.Second))
	if n := e.s.Counts().Open; n != 1 {
		t.Fatalf("%d flows open before the limit", n)
	}
	e.f.sweep(time.Now().Add(61 * time.Second))
	eventually(t, "the idle flow ends", func() bool { return e.s.Counts().Open == 0 })
	exchange(t, c, []byte("two"))
	if n := e.s.Counts(); n.Allowed != 2 {
		t.Errorf("counts: %+v", n)
	}
}

// TestUDPOthersCannotAnswer: only the target that was dialled can answer a flow.
func TestUDPOthersCannotAnswer(t *testing.T) {
	from := make(chan netip.AddrPort, 1)
	target, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	go func() {
		_, addr, _ := target.ReadFromUDPAddrPort(make([]byte, 64))
		from <- addr
	}()
	e := newEnv(t, Limits{})
	c := e.udp(target.LocalAddr().String())
	if _, err := c.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	to := <-from
	liar := udpEcho(t)
	if _, err := liar.WriteToUDPAddrPort([]byte("lie"), to); err != nil {
		t.Fatal(err)
	}
	if _, err := target.WriteToUDPAddrPort([]byte("truth"), to); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 64)
	_ = c.SetReadDeadline(time.Now().Add(40 * time.Second))
	if n, err := c.Read(got); err != nil || string(got[:n]) != "truth" {
		t.Errorf("got %q, %v", got[:n], err)
	}
}

// TestUDPRefusals: a denied flow and a closed port come back as ICMP errors that quote the datagram.
func TestUDPRefusals(t *testing.T) {
	l := udpEcho(t)
	closed := l.LocalAddr().String()
	l.Close()
	for name, c := range map[string]struct {
		to             string
		code           header.ICMPv4Code
		denied, failed uint64
	}{
		"denied":                {"10.1.2.3:53", header.ICMPv4AdminProhibited, 1, 0},
		"closed port":           {closed, header.ICMPv4PortUnreachable, 0, 1},
		"gateway's own address": {"198.18.0.1:9", header.ICMPv4PortUnreachable, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, Limits{})
			if _, err := e.udp(c.to).Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			got := <-e.errors
			if got.Type() != header.ICMPv4DstUnreachable || got.Code() != c.code {
				t.Errorf("type %d code %d, want code %d", got.Type(), got.Code(), c.code)
			}
			quote := header.IPv4(got.Payload())
			to := netip.MustParseAddrPort(c.to)
			if quote.DestinationAddress() != full(to).Addr || header.UDP(quote[header.IPv4MinimumSize:]).DestinationPort() != to.Port() {
				t.Errorf("it quotes %v", quote)
			}
			if n := e.s.Counts(); n.Denied != c.denied || n.Failed != c.failed {
				t.Errorf("counts: %+v", n)
			}
		})
	}
}

func TestUDPResets(t *testing.T) {
	target := udpEcho(t)
	e := newEnv(t, Limits{})
	c := e.udp(target.LocalAddr().String())
	exchange(t, c, []byte("x"))
	e.s.SetScope(e.grants.scope(nothing))
	eventually(t, "the flow ends", func() bool { return e.s.Counts().Open == 0 })
	e.s.SetScope(e.grants.scope(func(f policy.Flow) bool { return f.Proto == policy.UDP && onLoopback(f) }))
	exchange(t, c, []byte("y"))
	e.f.Remove(e.s)
	if n := e.s.Counts().Open; n != 0 {
		eventually(t, "the flow ends", func() bool { return e.s.Counts().Open == 0 })
	}
}

// TestGatewayEcho: the gateway's own UDP service is reached, and no flow is counted.
func TestGatewayEcho(t *testing.T) {
	e := newEnv(t, Limits{})
	at := netip.AddrPortFrom(gateway4, wire.EchoPort)
	l, err := e.gateway.ListenUDP(at)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		buf := make([]byte, wire.MaxEcho)
		for {
			n, from, err := l.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = l.WriteTo(buf[:n], from)
		}
	}()
	exchange(t, e.udp(at.String()), []byte("anybody there"))
	if n := e.s.Counts(); n.Allowed != 0 {
		t.Errorf("counts: %+v", n)
	}
}

// TestForgedError: a session cannot disturb another's connection with an ICMP error about it.
func TestForgedError(t *testing.T) {
	target := netip.MustParseAddrPort(server(t, "tcp4", echo))
	e := newEnv(t, Limits{})
	e.add("session-2", other4)
	c, err := e.dialFrom(other4, target, 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	quote := make([]byte, header.IPv4MinimumSize+8)
	header.IPv4(quote).Encode(&header.IPv4Fields{
		TotalLength: 1420, TTL: 64, Protocol: uint8(header.TCPProtocolNumber),
		SrcAddr: full(target).Addr, DstAddr: full(netip.AddrPortFrom(other4, 0)).Addr,
	})
	header.TCP(quote[header.IPv4MinimumSize:]).SetSourcePort(target.Port())
	header.TCP(quote[header.IPv4MinimumSize:]).SetDestinationPort(uint16(c.LocalAddr().(*net.TCPAddr).Port))
	forged := icmp4Packet(job4, gateway4, header.ICMPv4DstUnreachable, 4, 576, quote)
	before := e.gateway.Stats().Filtered
	if _, err := e.gateway.Write([][]byte{forged}, 0); err != nil {
		t.Fatal(err)
	}
	if e.gateway.Stats().Filtered != before+1 {
		t.Error("the forged error was let in")
	}
	for _, cut := range []int{8, 24, 32} { // in fragments, so that no one of them says it all
		first, rest := bytes.Clone(forged[:header.IPv4MinimumSize+cut]), append(bytes.Clone(forged[:header.IPv4MinimumSize]), forged[header.IPv4MinimumSize+cut:]...)
		before++
		for i, p := range [][]byte{first, rest} {
			ip := header.IPv4(p)
			ip.SetTotalLength(uint16(len(p)))
			ip.SetFlagsFragmentOffset(header.IPv4FlagMoreFragments*uint8(1-i), uint16(i*cut))
			ip.SetID(uint16(cut))
			ip.SetChecksum(0)
			ip.SetChecksum(^ip.CalculateChecksum())
			if _, err := e.gateway.Write([][]byte{p}, 0); err != nil {
				t.Fatal(err)
			}
		}
		if e.gateway.Stats().Filtered != before+1 {
			t.Errorf("the forged error was let in, in fragments of %d bytes and the rest", cut)
		}
	}
	genuine := icmp4Packet(other4, gateway4, header.ICMPv4DstUnreachable, 4, 576, quote)
	if _, err := e.gateway.Write([][]byte{genuine}, 0); err != nil {
		t.Fatal(err)
	}
	if e.gateway.Stats().Filtered != before+1 {
		t.Error("the session's own error was dropped")
	}
	roundTrip(t, c, "still there")
}
