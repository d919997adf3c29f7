package forward

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// attempts is how many connections a greedy job tries to open, and a tenth as many flows of datagrams.
const attempts = 50_000

// TestGreedyJobHurtsItselfAlone: a job opens 50,000 connections, and 5,000 flows of datagrams. It gets as many as it may, is told so at
// a bounded rate, what it costs is bounded, and a neighbour's connections go on being made while it does.
func TestGreedyJobHurtsItselfAlone(t *testing.T) {
	const most = 256
	target := netip.MustParseAddrPort(server(t, "tcp4", echo))
	listener := udpEcho(t).LocalAddr().String()
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })                                                         // after the wire has ended
	e := newEnv(t, Limits{SessionFlows: most, SessionRate: 4 * attempts, UDPIdle: time.Hour}) // nothing ends by itself, however slow the machine
	e.deaf.Store(true)                                                                        // or its stack would end what the test begins
	var told atomic.Int64                                                                     // ICMP errors
	go func() {
		for {
			select {
			case <-e.errors:
				told.Add(1)
			case <-over:
				return
			}
		}
	}()
	neighbour := e.add("session-2", other4)
	before := heap()

	const every = attempts / 20 // a connection of the neighbour's
	progress := make(chan struct{}, 20)
	go func() {
		defer close(progress)
		var batch [][]byte
		for i := range attempts {
			from := netip.AddrPortFrom(job4, uint16(10_000+i))
			batch = append(batch, syn(from, target, 1))
			if i%10 == 0 {
				batch = append(batch, udpPacket(from, netip.MustParseAddrPort(listener), make([]byte, 4)))
			}
			if len(batch) >= 100 {
				_, _ = e.gateway.Write(batch, 0)
				batch = batch[:0]
			}
			if i%every == 0 {
				progress <- struct{}{}
			}
		}
		_, _ = e.gateway.Write(batch, 0)
	}()
	made, slowest := 0, time.Duration(0)
	for range progress {
		made++
		began := time.Now()
		c, err := e.dialFrom(other4, target, 30*time.Second)
		if err != nil {
			t.Fatalf("the neighbour's connection %d: %v", made, err)
		}
		roundTrip(t, c, "still here")
		_ = c.Close()
		slowest = max(slowest, time.Since(began))
	}
	t.Logf("%d connections of the neighbour, the slowest took %v", made, slowest.Round(time.Millisecond))

	n := e.s.Counts()
	if n.Open != most || n.Allowed != most || n.Limited != attempts+attempts/10-most || n.Denied+n.Failed != 0 {
		t.Errorf("the greedy job: %+v", n)
	}
	if n := told.Load(); n > 60*errorRate { // a minute's, on the slowest machine
		t.Errorf("%d ICMP errors", n)
	}
	if n := neighbour.Counts(); n.Limited+n.Denied+n.Failed != 0 || n.Allowed != uint64(made) {
		t.Errorf("its neighbour: %+v, for %d connections", n, made)
	}
	e.f.Remove(e.s)
	e.f.Remove(neighbour)
	eventually(t, "all flows end", func() bool { return e.f.flows.Load() == 0 })
	if now := heap(); now > before+128<<20 {
		t.Errorf("%d MB are held", (now-before)>>20)
	}
}

// heap is what is in use.
func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// udpPacket is a datagram.
func udpPacket(from, to netip.AddrPort, data []byte) []byte {
	size := header.IPv4MinimumSize + header.UDPMinimumSize + len(data)
	p := make([]byte, size)
	ip := header.IPv4(p)
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(size), TTL: ttl, Protocol: uint8(header.UDPProtocolNumber), Flags: header.IPv4FlagDontFragment, SrcAddr: full(from).Addr, DstAddr: full(to).Addr,
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	udp := p[header.IPv4MinimumSize:]
	copy(udp[header.UDPMinimumSize:], data)
	header.UDP(udp).Encode(&header.UDPFields{SrcPort: from.Port(), DstPort: to.Port(), Length: uint16(len(udp))})
	sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), uint16(len(udp)))
	binary.BigEndian.PutUint16(udp[6:], ^checksum.Checksum(udp, sum))
	return p
}
