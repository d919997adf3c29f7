package tunnel

import (
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/wire"
)

// loopbackBind is a bind with one peer whose path leads to a socket of the test.
func loopbackBind(tb testing.TB, to netip.AddrPort) (*bind, *Peer) {
	tb.Helper()
	b := &bind{StdNetBind: conn.NewStdNetBind().(*conn.StdNetBind), side: newSideEntrance(), in: newWindow(0), out: newWindow(0)}
	if _, _, err := b.Open(0); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = b.Close() })
	p := &Peer{tunnel: &Tunnel{bind: b}, opts: PeerOptions{Session: "test"}}
	p.engine = engine{onChange: p.changed, onDrop: p.dropped}
	p.current.Store(routeTo(spot{remote: to}))
	return b, p
}

// packets are n transport messages of size bytes in buffers as large as the device's.
func packets(n, size int) [][]byte {
	bufs := make([][]byte, n)
	for i := range bufs {
		buf := make([]byte, device.MaxMessageSize)
		buf[0] = device.MessageTransportType
		bufs[i] = buf[:size]
	}
	return bufs
}

// The kernel segments a batch in software when it reaches 65,536 bytes with its headers. What arrives on a socket with
// UDP_GRO on loopback is what was sent as one batch.
func TestBatchesStayBelowTheKernelsLimit(t *testing.T) {
	receiver, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(loopback(0)))
	if err != nil {
		t.Fatal(err)
	}
	defer receiver.Close()
	raw, err := receiver.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	}); err != nil {
		t.Fatal(err)
	}
	b, p := loopbackBind(t, receiver.LocalAddr().(*net.UDPAddr).AddrPort())
	for _, size := range []int{1452, 1424, 1312, 576} {
		if err := b.Send(packets(128, size), p); err != nil {
			t.Fatal(err)
		}
		_ = receiver.SetReadDeadline(time.Now().Add(5 * time.Second))
		largest, total := 0, 0
		for buf := make([]byte, 1<<17); total < 128*size; {
			n, _, err := receiver.ReadFromUDPAddrPort(buf)
			if err != nil {
				t.Fatalf("size %d: after %d bytes: %v", size, total, err)
			}
			largest, total = max(largest, n), total+n
		}
		if largest > maxBatch {
			t.Errorf("size %d: a batch of %d bytes, the limit is %d", size, largest, maxBatch)
		}
		if want := min(64, maxBatch/size) * size; largest != want {
			t.Errorf("size %d: the largest batch has %d bytes, %d are possible: offload is lost", size, largest, want)
		}
	}
}

func BenchmarkBindSend(b *testing.B) {
	sink, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(loopback(0)))
	if err != nil {
		b.Fatal(err)
	}
	defer sink.Close()
	bind, p := loopbackBind(b, sink.LocalAddr().(*net.UDPAddr).AddrPort())
	bufs := packets(128, 1452)
	b.SetBytes(128 * 1452)
	b.ReportAllocs()
	for b.Loop() {
		if err := bind.Send(bufs, p); err != nil && err != syscall.ENOBUFS {
			b.Fatal(err)
		}
	}
}

// BenchmarkBindAccept is what the receive path adds to wireguard-go for each packet.
func BenchmarkBindAccept(b *testing.B) {
	bind := &bind{}
	p := &Peer{tunnel: &Tunnel{bind: bind}}
	from := &conn.StdNetEndpoint{AddrPort: netip.MustParseAddrPort("192.0.2.1:51820")}
	known := &path{peer: p, spot: spot{remote: from.AddrPort}, kind: wire.Reflexive}
	known.open.Store(true)
	bind.table.put(known)
	pkt := packets(1, 1452)[0]
	b.ReportAllocs()
	for b.Loop() {
		if _, n := bind.accept(pkt, len(pkt), bind.table.lookup(known.spot), known.spot, from); n == 0 {
			b.Fatal("dropped")
		}
	}
}
