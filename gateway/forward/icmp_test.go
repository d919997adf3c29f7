package forward

import (
	"context"
	"net/netip"
	"os"
	"sync"
	"testing"

	"golang.org/x/net/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/policy"
)

// rawEnv is a gateway whose packets the test writes and reads itself.
func rawEnv(t *testing.T, allow func(policy.Flow) bool) (*env, chan []byte) {
	t.Helper()
	e := &env{t: t, grants: &grants{by: map[*policy.Scope]func(policy.Flow) bool{}}}
	e.gateway = e.device(netstack.Options{Addresses: []netip.Addr{gateway4, gateway6}, Forward: true})
	f, err := New(Options{Device: e.gateway, Local: []netip.Addr{gateway4, gateway6}})
	if err != nil {
		t.Fatal(err)
	}
	f.decide = e.grants.decide
	e.f = f
	e.scope = e.grants.scope(allow)
	e.s = e.add("session-1", job4, job6)
	out := make(chan []byte, 16)
	done := make(chan struct{})
	go func() {
		defer close(done)
		bufs, sizes := [][]byte{make([]byte, 65535)}, make([]int, 1)
		for {
			if _, err := e.gateway.Read(bufs, sizes, 0); err != nil {
				return
			}
			out <- append([]byte(nil), bufs[0][:sizes[0]]...)
		}
	}()
	t.Cleanup(func() {
		f.Close()
		e.gateway.Close()
		<-done
	})
	return e, out
}

func (e *env) write(packet []byte) {
	if _, err := e.gateway.Write([][]byte{packet}, 0); err != nil {
		e.t.Fatal(err)
	}
}

const ident, seq = 0xbeef, 7

func echoTo(from, to netip.Addr) []byte {
	if to.Is4() {
		return icmp4Packet(from, to, header.ICMPv4Echo, 0, ident<<16|seq, []byte("ping"))
	}
	return icmp6Packet(from, to, header.ICMPv6EchoRequest, 0, ident<<16|seq, []byte("ping"))
}

// TestEchoDenied: outside the grant a ping is prohibited, in IPv4 and IPv6, and nobody answers it.
func TestEchoDenied(t *testing.T) {
	e, out := rawEnv(t, nothing)
	e.write(echoTo(job4, netip.MustParseAddr("10.0.0.1")))
	if p := header.ICMPv4((<-out)[header.IPv4MinimumSize:]); p.Type() != header.ICMPv4DstUnreachable || p.Code() != header.ICMPv4AdminProhibited {
		t.Errorf("ipv4: type %d code %d", p.Type(), p.Code())
	}
	e.write(echoTo(job6, netip.MustParseAddr("fd00::1")))
	if p := header.ICMPv6((<-out)[header.IPv6MinimumSize:]); p.Type() != header.ICMPv6DstUnreachable || p.Code() != header.ICMPv6Prohibited {
		t.Errorf("ipv6: type %d code %d", p.Type(), p.Code())
	}
	if n := e.s.Counts(); n.Denied != 2 {
		t.Errorf("counts: %+v", n)
	}
}

// TestEchoGateway: the gateway answers pings to its own addresses itself.
func TestEchoGateway(t *testing.T) {
	e, out := rawEnv(t, nothing)
	e.write(echoTo(job4, gateway4))
	p := header.ICMPv4((<-out)[header.IPv4MinimumSize:])
	if p.Type() != header.ICMPv4EchoReply || p.Ident() != ident || p.Sequence() != seq {
		t.Errorf("type %d, id %x, seq %d", p.Type(), p.Ident(), p.Sequence())
	}
	e.write(echoTo(job6, gateway6))
	if p := header.ICMPv6((<-out)[header.IPv6MinimumSize:]); p.Type() != header.ICMPv6EchoReply {
		t.Errorf("ipv6: type %d", p.Type())
	}
}

// TestEchoForwarded needs a ping socket, which the kernel gives to the groups in net.ipv4.ping_group_range.
func TestEchoForwarded(t *testing.T) {
	c, err := icmp.ListenPacket("udp4", "0.0.0.0")
	if err != nil {
		t.Skipf("no ping sockets for group %d here: %v", os.Getgid(), err)
	}
	c.Close()
	e, out := rawEnv(t, onLoopback)
	e.write(echoTo(job4, loopback))
	packet := header.IPv4(<-out)
	p := header.ICMPv4(packet.Payload())
	if p.Type() != header.ICMPv4EchoReply || p.Ident() != ident || p.Sequence() != seq || string(p.Payload()) != "ping" {
		t.Errorf("type %d, id %x, seq %d, %q", p.Type(), p.Ident(), p.Sequence(), p.Payload())
	}
	if got := packet.SourceAddress().String(); got != loopback.String() {
		t.Errorf("the reply comes from %s", got)
	}
	if n := e.s.Counts(); n.Open != 1 || n.Allowed != 1 {
		t.Errorf("counts: %+v", n)
	}
}

// TestEchoWithoutSocket: where the kernel gives no ping socket, requests are counted as failed and nobody answers.
func TestEchoWithoutSocket(t *testing.T) {
	if c, err := icmp.ListenPacket("udp4", "0.0.0.0"); err == nil {
		c.Close()
		t.Skip("there are ping sockets here")
	}
	e, out := rawEnv(t, onLoopback)
	e.write(echoTo(job4, loopback))
	eventually(t, "the request is counted", func() bool { return e.s.Counts().Failed == 1 })
	e.write(echoTo(job4, gateway4)) // answered after whatever the first would have brought
	if p := header.ICMPv4((<-out)[header.IPv4MinimumSize:]); p.Type() != header.ICMPv4EchoReply || header.IPv4(p) == nil {
		t.Errorf("type %d", p.Type())
	}
}

// TestLargeEchoesDoNotPileUp: what a job sends to where nothing answers is held neither by the dozen where it is large, nor at all once it
// is known that nothing will come of it.
func TestLargeEchoesDoNotPileUp(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	fl := &flow{ctx: ctx, echo: make(chan ping, echoQueue)}
	for range 2 * echoQueue {
		fl.ask(ping{message: make([]byte, 60_000)})
	}
	if n := len(fl.echo); n != 1 {
		t.Errorf("%d large requests wait", n)
	}
	for range 2 * echoQueue {
		fl.ask(ping{message: make([]byte, 64)})
	}
	if n := len(fl.echo); n != echoQueue {
		t.Errorf("%d requests wait", n)
	}
	var refusing sync.WaitGroup
	refusing.Go(fl.refuse)
	eventually(t, "none waits", func() bool { return len(fl.echo) == 0 })
	cancel()
	refusing.Wait()
}
