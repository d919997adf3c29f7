package tunnel

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/udpconn"
	"github.com/culvertnet/culvert/internal/wire"
)

// loopbackBind is a bind with one peer whose path leads to a socket of the test.
func loopbackBind(tb testing.TB, to netip.AddrPort) (*bind, *Peer) {
	tb.Helper()
	b := &bind{side: newSideEntrance(), in: newWindow(0), out: newWindow(0)}
	if _, _, err := b.Open(0); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = b.Close() })
	p := &Peer{tunnel: &Tunnel{bind: b}, opts: PeerOptions{Session: "test"}}
	p.engine = engine{onChange: p.changed, onDrop: p.dropped}
	p.current.Store(&route{spot: spot{remote: to}})
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
		_ = receiver.SetReadDeadline(time.Now().Add(40 * time.Second))
		largest, total := 0, 0
		for buf := make([]byte, 1<<17); total < 128*size; {
			n, _, err := receiver.ReadFromUDPAddrPort(buf)
			if err != nil {
				t.Fatalf("size %d: after %d bytes: %v", size, total, err)
			}
			largest, total = max(largest, n), total+n
		}
		if largest > udpconn.MaxRun {
			t.Errorf("size %d: a batch of %d bytes, the limit is %d", size, largest, udpconn.MaxRun)
		}
		if want := min(64, udpconn.MaxRun/size) * size; largest != want {
			t.Errorf("size %d: the largest batch has %d bytes, %d are possible: offload is lost", size, largest, want)
		}
	}
}

// renew makes packets of bufs anew: sending changes what it is given.
func renew(packets, bufs [][]byte) {
	copy(packets, bufs)
	for _, p := range packets {
		binary.LittleEndian.PutUint32(p, device.MessageTransportType)
	}
}

// kindsOfRoute are the hot paths: direct, and through a relay over UDP.
var kindsOfRoute = map[string]uint32{"direct": 0, "relay": 0x4abcdef0}

func BenchmarkBindSend(b *testing.B) {
	for kind, header := range kindsOfRoute {
		b.Run(kind, func(b *testing.B) {
			sink, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(loopback(0)))
			if err != nil {
				b.Fatal(err)
			}
			defer sink.Close()
			to := sink.LocalAddr().(*net.UDPAddr).AddrPort()
			bind, p := loopbackBind(b, to)
			p.current.Store(&route{spot: spot{remote: to, header: header}})
			bufs, again := packets(128, 1452), make([][]byte, 128)
			b.SetBytes(128 * 1452)
			b.ReportAllocs()
			for b.Loop() {
				renew(again, bufs)
				if err := bind.Send(again, p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkBindSendCovered is the same with a parity for every few packets.
func BenchmarkBindSendCovered(b *testing.B) {
	sink, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(loopback(0)))
	if err != nil {
		b.Fatal(err)
	}
	defer sink.Close()
	bind, p := loopbackBind(b, sink.LocalAddr().(*net.UDPAddr).AddrPort())
	p.cover(true)
	bufs, again := packets(128, 1452), make([][]byte, 128)
	b.SetBytes(128 * 1452)
	b.ReportAllocs()
	count := uint64(0)
	for b.Loop() {
		renew(again, bufs)
		for _, pkt := range again {
			binary.LittleEndian.PutUint64(pkt[8:], count)
			count++
		}
		if err := bind.Send(again, p); err != nil {
			b.Fatal(err)
		}
	}
	p.cover(false)
	p.timers.Wait()
}

// received is a bind with a validated path from a socket of the test, and a run of transport messages from there.
func received(tb testing.TB, header uint32) (out *socket, fn conn.ReceiveFunc, run [][]byte, to *route) {
	tb.Helper()
	c, err := udpconn.Listen(tb.Context(), udpconn.Options{Addr: "127.0.0.1:0"})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	b := &bind{side: newSideEntrance(), in: newWindow(0), out: newWindow(0)}
	fns, port, err := b.Open(0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { b.Close() })
	p := &Peer{tunnel: &Tunnel{bind: b}}
	known := &path{peer: p, spot: spot{remote: c.LocalAddr(), header: header}}
	known.open.Store(true)
	b.table.put(known)
	return newSocket(c), fns[0], packets(44, 1452), &route{spot: spot{remote: loopback(port), header: header}}
}

// BenchmarkBindReceive is the whole way from the socket to the device's buffers, for one run of packets as the kernel coalesces
// them. The sending of that run is part of it.
func BenchmarkBindReceive(b *testing.B) {
	for kind, header := range kindsOfRoute {
		b.Run(kind, func(b *testing.B) {
			out, fn, run, to := received(b, header)
			bufs, again := packets(128, device.MaxMessageSize), make([][]byte, len(run))
			sizes, eps := make([]int, len(bufs)), make([]conn.Endpoint, len(bufs))
			b.SetBytes(44 * 1452)
			b.ReportAllocs()
			for b.Loop() {
				renew(again, run)
				if err := out.send(again, to); err != nil {
					b.Fatal(err)
				}
				for got := 0; got < len(run); {
					n, err := fn(bufs, sizes, eps)
					if err != nil {
						b.Fatal(err)
					}
					got += n
				}
			}
		})
	}
}

// Sending and receiving allocate nothing, directly and through a relay.
func TestPacketsAllocateNothing(t *testing.T) {
	for kind, header := range kindsOfRoute {
		t.Run(kind, func(t *testing.T) {
			out, fn, run, to := received(t, header)
			bufs, again := packets(128, device.MaxMessageSize), make([][]byte, len(run))
			sizes, eps := make([]int, len(bufs)), make([]conn.Endpoint, len(bufs))
			round := func() {
				renew(again, run)
				if err := out.send(again, to); err != nil {
					t.Fatal(err)
				}
				for got := 0; got < len(run); {
					n, err := fn(bufs, sizes, eps)
					if err != nil {
						t.Fatal(err)
					}
					for i := range n {
						if sizes[i] != 1452 || eps[i] == nil || messageType(bufs[i][:sizes[i]]) != device.MessageTransportType {
							t.Fatalf("packet %d of %d bytes", i, sizes[i])
						}
					}
					got += n
				}
			}
			// A pool may be emptied by a collection at any time, and the race detector does so often, hence not zero.
			if n := testing.AllocsPerRun(200, round); n >= 10 {
				t.Errorf("%v allocations for 44 packets", n)
			}
		})
	}
}

// BenchmarkBindAccept is what judging a received packet costs.
func BenchmarkBindAccept(b *testing.B) {
	bind := &bind{}
	p := &Peer{tunnel: &Tunnel{bind: bind}}
	from := &route{spot: spot{remote: netip.MustParseAddrPort("192.0.2.1:51820")}}
	known := &path{peer: p, spot: from.spot, kind: wire.Reflexive}
	known.open.Store(true)
	bind.table.put(known)
	pkt := packets(1, 1452)[0]
	b.ReportAllocs()
	for b.Loop() {
		if p, _ := bind.accept(pkt, bind.table.lookup(known.spot), from); p == nil {
			b.Fatal("dropped")
		}
	}
}
