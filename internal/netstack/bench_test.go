package netstack_test

import (
	"context"
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/netstack/netstacktest"
)

var (
	addrA  = netip.MustParseAddr("198.18.0.1")
	addrB  = netip.MustParseAddr("198.18.0.2")
	addrA6 = netip.MustParseAddr("fd63:756c:7665:7274::c612:1")
	addrB6 = netip.MustParseAddr("fd63:756c:7665:7274::c612:2")
)

// pair makes two devices with a wire between them.
func pair(tb testing.TB) (a, b *netstack.Device) {
	tb.Helper()
	return wiredPair(tb, new(netstacktest.Wire), 0)
}

func wiredPair(tb testing.TB, wire *netstacktest.Wire, mtu int) (a, b *netstack.Device) {
	tb.Helper()
	devices := [2]*netstack.Device{}
	for i, addrs := range [][]netip.Addr{{addrA, addrA6}, {addrB, addrB6}} {
		d, err := netstack.New(netstack.Options{Addresses: addrs, MTU: mtu})
		if err != nil {
			tb.Fatal(err)
		}
		devices[i] = d
	}
	wire.Connect(devices[0], devices[1])
	tb.Cleanup(func() {
		devices[0].Close()
		devices[1].Close()
		wire.Wait()
	})
	return devices[0], devices[1]
}

// connect opens a TCP connection from a to b.
func connect(tb testing.TB, a, b *netstack.Device, to netip.Addr) (from, at net.Conn) {
	tb.Helper()
	addr := netip.AddrPortFrom(to, 5001)
	l, err := b.ListenTCP(addr)
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, _ := l.Accept()
		accepted <- c
	}()
	from, err = a.DialContext(context.Background(), "tcp", addr.String())
	if err != nil {
		tb.Fatal(err)
	}
	at = <-accepted
	tb.Cleanup(func() { from.Close(); at.Close() })
	return from, at
}

// BenchmarkThroughput sends one TCP stream between two devices back to back, without WireGuard: both ends' stacks, the
// queue, Read and Write. One operation is a megabyte.
func BenchmarkThroughput(b *testing.B) {
	for _, family := range []struct {
		name string
		to   netip.Addr
	}{{"ipv4", addrB}, {"ipv6", addrB6}} {
		b.Run(family.name, func(b *testing.B) {
			x, y := pair(b)
			from, at := connect(b, x, y, family.to)
			benchmarkStream(b, from, at)
		})
	}
}

func benchmarkStream(b *testing.B, from io.Writer, at io.Reader) {
	const op = 1 << 20
	chunk := make([]byte, 256<<10)
	b.SetBytes(op)
	b.ReportAllocs()
	total := int64(b.N) * op
	b.ResetTimer()
	go func() {
		for left := total; left > 0; left -= int64(len(chunk)) {
			if _, err := from.Write(chunk); err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 256<<10)
	for got := int64(0); got < total; {
		n, err := at.Read(buf)
		if err != nil {
			b.Fatal(err)
		}
		got += int64(n)
	}
}
