package forward

import (
	"net"
	"net/netip"
	"testing"
	"time"

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
	asked := netip.AddrPortFrom(other4, 4000)
	heard := make(chan struct{})
	reading := make(chan struct{})
	defer func() { <-reading }()
	defer socket.Close()
	go func() { // the service answers nobody, but reads as services do
		defer close(reading)
		for buf := make([]byte, 2048); ; {
			_, from, err := socket.ReadFrom(buf)
			if err != nil {
				return
			}
			if from.(*net.UDPAddr).AddrPort() == asked {
				close(heard)
				return
			}
		}
	}()
	e.deaf.Store(true) // the first job does not answer
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
	if _, err := e.gateway.Write([][]byte{udpPacket(asked, netip.AddrPortFrom(gateway4, wire.EchoPort), []byte("is anybody there"))}, 0); err != nil {
		t.Fatal(err)
	}
	select {
	case <-heard:
	case <-time.After(30 * time.Second):
		t.Fatal("the other session's question is lost")
	}
	for range 10 {
		c, err := e.dialFrom(other4, netip.AddrPortFrom(gateway4, wire.InsidePort), 30*time.Second)
		if err != nil {
			t.Fatalf("the other session's connection: %v", err)
		}
		_ = c.Close()
	}
}
