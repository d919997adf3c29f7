package forward

import (
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/wire"
)

// syn is a job's connection request.
func syn(from, to netip.AddrPort, seq uint32) []byte {
	segment := header.TCP(make([]byte, header.TCPMinimumSize))
	segment.Encode(&header.TCPFields{
		SrcPort: from.Port(), DstPort: to.Port(), SeqNum: seq, DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagSyn, WindowSize: 65535,
	})
	return tcpPacket(from.Addr(), to.Addr(), segment)
}

// segment reads a TCP packet that the gateway sent.
func segment(p []byte) header.TCP {
	if p[0]>>4 == 4 {
		return header.TCP(header.IPv4(p).Payload())
	}
	return header.TCP(header.IPv6(p).Payload())
}

// A session that ends between SYN-ACK and ACK is reset with a sequence number that its job takes for genuine, for the stack
// itself forgets such a connection without a word.
func TestResetDuringTheHandshake(t *testing.T) {
	for network, from := range map[string]netip.Addr{"tcp4": job4, "tcp6": job6} {
		t.Run(network, func(t *testing.T) {
			target := netip.MustParseAddrPort(server(t, network, echo))
			e, out := rawEnv(t, onLoopback)
			e.write(syn(netip.AddrPortFrom(from, 4000), target, 1000))
			answer := segment(<-out)
			if answer.Flags() != header.TCPFlagSyn|header.TCPFlagAck {
				t.Fatalf("flags %v", answer.Flags())
			}
			e.f.Remove(e.s)
			for {
				select {
				case p := <-out:
					got := segment(p)
					if got.Flags()&header.TCPFlagRst == 0 {
						continue // the SYN-ACK once more
					}
					if got.SequenceNumber() != answer.SequenceNumber()+1 || got.AckNumber() != 1001 || got.DestinationPort() != 4000 || got.SourcePort() != target.Port() {
						t.Errorf("a reset with seq %d, ack %d", got.SequenceNumber(), got.AckNumber())
					}
					eventually(t, "the flow ends", func() bool { return e.s.Counts().Open == 0 })
					return
				case <-time.After(20 * time.Second):
					t.Fatal("no reset")
				}
			}
		})
	}
}

// Closing the forwarder does not wait for jobs that never complete their handshakes.
func TestCloseDuringHandshakes(t *testing.T) {
	target := netip.MustParseAddrPort(server(t, "tcp4", echo))
	e, out := rawEnv(t, onLoopback)
	for i := range uint16(8) {
		e.write(syn(netip.AddrPortFrom(job4, 4000+i), target, 1000))
		<-out
	}
	start := time.Now()
	e.f.Close()
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
}

// A job that uses a port again while the gateway still remembers the last connection from there is answered at once.
func TestPortIsUsedAgain(t *testing.T) {
	target := netip.MustParseAddrPort(server(t, "tcp4", func(c *net.TCPConn) { _ = c.Close() })) // closes first: TIME-WAIT is the gateway's
	e, out := rawEnv(t, onLoopback)
	from := netip.AddrPortFrom(job4, 4000)
	next := func(flag header.TCPFlags) header.TCP {
		for {
			select {
			case p := <-out:
				if got := segment(p); got.Flags()&flag != 0 && got.Flags()&header.TCPFlagRst == 0 {
					return got
				}
			case <-time.After(20 * time.Second):
				t.Fatalf("nothing with the flags %v comes", flag)
			}
		}
	}
	send := func(flags header.TCPFlags, seq, ack uint32) {
		s := header.TCP(make([]byte, header.TCPMinimumSize))
		s.Encode(&header.TCPFields{
			SrcPort: from.Port(), DstPort: target.Port(), SeqNum: seq, AckNum: ack, DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 65535,
		})
		e.write(tcpPacket(from.Addr(), target.Addr(), s))
	}
	seq := uint32(1000)
	for range 3 {
		e.write(syn(from, target, seq))
		answer := next(header.TCPFlagSyn)
		if answer.AckNumber() != seq+1 {
			t.Fatalf("the answer acknowledges %d, want %d", answer.AckNumber(), seq+1)
		}
		send(header.TCPFlagAck, seq+1, answer.SequenceNumber()+1)
		fin := next(header.TCPFlagFin)
		send(header.TCPFlagFin|header.TCPFlagAck, seq+1, fin.SequenceNumber()+1)
		eventually(t, "the flow ends", func() bool { return e.s.Counts().Open == 0 })
		ep := e.f.endpoint(endpointID(from, target))
		if ep == nil || tcp.EndpointState(ep.State()) != tcp.StateTimeWait {
			t.Fatalf("the stack does not remember the connection: %v", ep)
		}
		seq += 100_000
	}
	if n := e.s.Counts(); n.Allowed != 3 || n.Failed != 0 {
		t.Errorf("counts %+v", n)
	}
}

// A session that has the address of one that has ended gets nothing of what the stack remembers of it.
func TestAddressIsUsedAgain(t *testing.T) {
	target := netip.MustParseAddrPort(server(t, "tcp4", echo))
	e, out := rawEnv(t, onLoopback)
	from := netip.AddrPortFrom(job4, 4000)
	for i := range uint32(3) {
		answered := false
		for tries := 0; !answered && tries < 1000; tries++ { // as a job would, but faster
			e.write(syn(from, target, 1000*i))
			select {
			case p := <-out:
				got := segment(p)
				answered = got.Flags() == header.TCPFlagSyn|header.TCPFlagAck && got.AckNumber() == 1000*i+1
			case <-time.After(20 * time.Millisecond):
			}
		}
		if !answered {
			t.Fatal("the address's next session is not answered")
		}
		e.f.Remove(e.s)
		e.s = e.add("again", job4, job6)
	}
	if fl := e.s.find(flowKey{policy.TCP, from, target}); fl != nil {
		t.Error("the new session has the old one's flow")
	}
}

func TestServedConnectionsCount(t *testing.T) {
	e := newEnv(t, Limits{SessionServed: 2, SessionFlows: 3})
	at := netip.AddrPortFrom(gateway4, wire.InsidePort)
	l, err := e.gateway.ListenTCP(at)
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan net.Conn, 8)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			served := e.f.Serve(c)
			accepted <- served
			if served != nil {
				serving.Go(func() {
					_, _ = io.Copy(io.Discard, served)
					_ = served.Close()
				})
			}
		}
	})
	t.Cleanup(func() { // after the forwarder has cut them off
		l.Close()
		serving.Wait()
	})
	var conns []net.Conn
	for i := range 3 {
		c, err := e.dial(at.String())
		if err == nil {
			conns = append(conns, c)
		} else if i < 2 { // the reset of the last one may come before the dial returns
			t.Fatal(err)
		}
		if served := <-accepted; (served != nil) != (i < 2) {
			t.Fatalf("connection %d: %v", i, served)
		}
	}
	if len(conns) > 2 {
		reset(t, conns[2])
	}
	target := server(t, "tcp4", echo)
	first, err := e.dial(target)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := e.dial(target); err == nil {
		c.Close()
		t.Error("connections to the gateway do not count against the session's flows")
	}
	if n := e.s.Counts(); n.Open != 3 || n.Allowed != 1 || n.Limited != 2 || n.BytesUp != 0 {
		t.Errorf("counts %+v", n)
	}
	roundTrip(t, first, "x")
	e.f.Remove(e.s)
	reset(t, conns[0])
	reset(t, first)
	eventually(t, "the flows end", func() bool { return e.s.Counts().Open == 0 })
	e.s = e.add("next", job4, job6)
	c, err := e.dial(at.String())
	if err != nil {
		t.Fatal(err)
	}
	if served := <-accepted; served == nil {
		t.Error("the next session is held to account for the last one")
	}
	c.Close()
}
