package forward

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/internal/wire"
)

// TestNobodyStarvesTheGatewaysOwnServices: a session floods the gateway's own address with datagrams and with connection requests that it
// never completes. Another one's question waits behind what the first may have there, and its connections are taken.
func TestNobodyStarvesTheGatewaysOwnServices(t *testing.T) {
	const flood = 20_000
	e := newEnv(t, Limits{})
	e.add("session-2", other4)
	socket, err := e.gateway.ListenUDP(netip.AddrPortFrom(gateway4, wire.EchoPort))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	listener, err := e.gateway.ListenTCP(netip.AddrPortFrom(gateway4, wire.InsidePort))
	if err != nil {
		t.Fatal(err)
	}
	serving := make(chan struct{})
	defer func() { <-serving }()
	defer listener.Close()
	go func() {
		defer close(serving)
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	e.deaf.Store(true)                  // the first job does not answer
	e.s.asks.SetLimit(rate.Limit(1e-6)) // nobody reads from the socket yet, however long a busy machine takes for the flood
	for i := range flood {
		from := netip.AddrPortFrom(job4, uint16(1024+i%60_000))
		batch := [][]byte{udpPacket(from, netip.AddrPortFrom(gateway4, wire.EchoPort), make([]byte, 1200)), syn(from, netip.AddrPortFrom(gateway4, wire.InsidePort), uint32(i))}
		if _, err := e.gateway.Write(batch, 0); err != nil {
			t.Fatal(err)
		}
	}
	if n := e.gateway.Stats().Gated; n < flood {
		t.Errorf("%d packets of the flood were stopped before they wait anywhere", n)
	}
	asked := netip.AddrPortFrom(other4, 4000)
	if _, err := e.gateway.Write([][]byte{udpPacket(asked, netip.AddrPortFrom(gateway4, wire.EchoPort), []byte("is anybody there"))}, 0); err != nil {
		t.Fatal(err)
	}
	_ = socket.SetReadDeadline(time.Now().Add(30 * time.Second))
	for buf := make([]byte, 2048); ; {
		_, from, err := socket.ReadFrom(buf)
		if err != nil {
			t.Fatalf("the other session's question is lost: %v", err)
		}
		if from.(*net.UDPAddr).AddrPort() == asked {
			break
		}
	}
	for range 10 {
		c, err := e.dialFrom(other4, netip.AddrPortFrom(gateway4, wire.InsidePort), 30*time.Second)
		if err != nil {
			t.Fatalf("the other session's connection: %v", err)
		}
		_ = c.Close()
	}
}
