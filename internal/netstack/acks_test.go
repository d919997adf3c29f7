package netstack_test

import (
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/netstack"
)

// segment is a packet of the stack as far as acknowledgements care.
type segment struct {
	to    uint16 // port
	flags header.TCPFlags
	ack   uint32
	data  int
	sack  bool
	plain bool // without timestamps
	v6    bool
}

// build gives the packet; the caller has its only reference.
func (s segment) build() *stack.PacketBuffer {
	from, to := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("198.18.0.2")
	if s.v6 {
		from, to = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")
	}
	var options []byte
	if !s.plain {
		options = append(options, header.TCPOptionNOP, header.TCPOptionNOP, header.TCPOptionTS, header.TCPOptionTSLength, 0, 0, 0, 0, 0, 0, 0, 0)
	}
	if s.sack {
		options = append(options, header.TCPOptionNOP, header.TCPOptionNOP, header.TCPOptionSACK, 10, 0, 0, 0, 0, 0, 0, 0, 0)
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: header.IPv6MinimumSize + header.TCPHeaderMaximumSize, Payload: buffer.MakeWithData(make([]byte, s.data)),
	})
	pkt.TransportProtocolNumber = header.TCPProtocolNumber
	tcp := header.TCP(pkt.TransportHeader().Push(header.TCPMinimumSize + len(options)))
	tcp.Encode(&header.TCPFields{
		SrcPort: 443, DstPort: s.to, AckNum: s.ack, DataOffset: uint8(header.TCPMinimumSize + len(options)), Flags: s.flags,
	})
	copy(tcp[header.TCPMinimumSize:], options)
	src, dst := tcpip.AddrFromSlice(from.AsSlice()), tcpip.AddrFromSlice(to.AsSlice())
	if s.v6 {
		header.IPv6(pkt.NetworkHeader().Push(header.IPv6MinimumSize)).Encode(&header.IPv6Fields{SrcAddr: src, DstAddr: dst})
	} else {
		header.IPv4(pkt.NetworkHeader().Push(header.IPv4MinimumSize)).Encode(&header.IPv4Fields{SrcAddr: src, DstAddr: dst})
	}
	return pkt
}

const (
	synAck = header.TCPFlagSyn | header.TCPFlagAck
	pshAck = header.TCPFlagPsh | header.TCPFlagAck
	finAck = header.TCPFlagFin | header.TCPFlagAck
	ack    = header.TCPFlagAck
)

// offer hands a segment over and reports whether it went out at once.
func offer(a *netstack.Acks, s segment) bool {
	pkt := s.build()
	defer pkt.DecRef()
	return a.Pass(pkt)
}

// TestAcknowledgementsWait: one connection with a request and an answer sends three packets to the job instead of five.
func TestAcknowledgementsWait(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			late := 0
			a := netstack.NewAcks(func(pkt *stack.PacketBuffer) { late++; pkt.DecRef() })
			defer a.Close()
			for i, step := range []struct {
				segment
				goes bool
			}{
				{segment{flags: synAck, ack: 1}, true},
				{segment{flags: ack, ack: 201}, false}, // of the request
				{segment{flags: pshAck, ack: 201, data: 200}, true},
				{segment{flags: ack, ack: 202}, false}, // of its FIN
				{segment{flags: finAck, ack: 202}, true},
			} {
				step.v6, step.to = v6, 4000
				if goes := offer(a, step.segment); goes != step.goes {
					t.Errorf("step %d goes out at once: %v", i, goes)
				}
			}
			time.Sleep(10 * netstack.AckDelay)
			synctest.Wait()
			if late != 0 || a.Spared() != 2 {
				t.Errorf("%d went out late, %d were spared", late, a.Spared())
			}
		})
	}
}

// TestAcknowledgementsGo: what a sender might wait for goes out at once.
func TestAcknowledgementsGo(t *testing.T) {
	for name, s := range map[string]segment{
		"nothing new":       {flags: ack, ack: 1000},
		"older":             {flags: ack, ack: 900},
		"a full segment":    {flags: ack, ack: 1000 + netstack.AckSmall},
		"something is lost": {flags: ack, ack: 1100, sack: true},
		"lost, no clock":    {flags: ack, ack: 1100, sack: true, plain: true},
		"reset":             {flags: header.TCPFlagRst | ack, ack: 1100},
		"end":               {flags: finAck, ack: 1100},
		"data":              {flags: ack, ack: 1100, data: 1},
		"a new connection":  {flags: ack, ack: 1100, to: 7},
	} {
		a := netstack.NewAcks(func(pkt *stack.PacketBuffer) { pkt.DecRef() })
		if !offer(a, segment{flags: synAck, ack: 1000}) || !offer(a, s) {
			t.Errorf("%s is held back", name)
		}
		a.Close()
	}
}

// TestAcknowledgementAlone goes out when its time has come, and the second in a row at once.
func TestAcknowledgementAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var late []uint16
		began := time.Now()
		a := netstack.NewAcks(func(pkt *stack.PacketBuffer) {
			mu.Lock()
			defer mu.Unlock()
			late = append(late, header.TCP(pkt.TransportHeader().Slice()).DestinationPort())
			if d := time.Since(began); d > 3*netstack.AckDelay {
				t.Errorf("one waited until %v", d)
			}
			pkt.DecRef()
		})
		for port := uint16(1); port <= 3; port++ {
			offer(a, segment{to: port, flags: synAck, ack: 1})
			if offer(a, segment{to: port, flags: ack, ack: 101}) {
				t.Errorf("the first of connection %d goes out at once", port)
			}
			time.Sleep(netstack.AckDelay / 4)
		}
		if !offer(a, segment{to: 2, flags: ack, ack: 201}) {
			t.Error("the second in a row is held back")
		}
		time.Sleep(10 * netstack.AckDelay)
		synctest.Wait()
		if len(late) != 2 || late[0] != 1 || late[1] != 3 || a.Spared() != 1 {
			t.Errorf("connections %v were answered late, %d spared", late, a.Spared())
		}
		offer(a, segment{to: 1, flags: ack, ack: 201})
		a.Close()
		time.Sleep(10 * netstack.AckDelay)
		synctest.Wait()
		if len(late) != 2 {
			t.Error("something went out after the end")
		}
	})
}

// TestAcknowledgementsProperty: whatever goes through, the other end hears of all that was acknowledged, and soon.
func TestAcknowledgementsProperty(t *testing.T) {
	type step struct {
		segment
		pause time.Duration
	}
	rapid.Check(t, func(r *rapid.T) {
		next, said := map[uint16]uint32{}, map[uint16]uint32{}
		steps := make([]step, rapid.IntRange(1, 60).Draw(r, "steps"))
		for i := range steps {
			to := rapid.Uint16Range(1, 5).Draw(r, "port")
			next[to] += rapid.Uint32Range(0, 2000).Draw(r, "news")
			late := rapid.SampledFrom([]uint32{0, 0, 0, 1, 500}).Draw(r, "late") // made before the one ahead of it
			this := next[to] - min(late, next[to])
			said[to] = max(said[to], this)
			steps[i] = step{
				segment{
					to: to, flags: ack, ack: this, data: rapid.IntRange(0, 1).Draw(r, "data"), sack: rapid.Bool().Draw(r, "sack"),
					plain: rapid.Bool().Draw(r, "plain"),
				},
				time.Duration(rapid.IntRange(0, 5000).Draw(r, "pause")) * time.Microsecond,
			}
		}
		heard := map[uint16]uint32{}
		synctest.Test(t, func(*testing.T) {
			var mu sync.Mutex
			hear := func(port uint16, n uint32) {
				mu.Lock()
				defer mu.Unlock()
				heard[port] = max(heard[port], n)
			}
			a := netstack.NewAcks(func(pkt *stack.PacketBuffer) {
				tcp := header.TCP(pkt.TransportHeader().Slice())
				hear(tcp.DestinationPort(), tcp.AckNumber())
				pkt.DecRef()
			})
			defer a.Close()
			for _, s := range steps {
				if offer(a, s.segment) {
					hear(s.to, s.ack)
				}
				time.Sleep(s.pause)
			}
			time.Sleep(2 * netstack.AckDelay)
			synctest.Wait()
		})
		for port, n := range said {
			if heard[port] != n {
				r.Fatalf("connection %d: %d was acknowledged, %d heard", port, n, heard[port])
			}
		}
	})
}
