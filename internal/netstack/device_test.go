package netstack_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/netstack/netstacktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func random(n int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{7}), n)
}

// transfer sends size bytes over a connection and compares the checksums.
func transfer(t *testing.T, from, at net.Conn, size int64) {
	t.Helper()
	var work sync.WaitGroup
	work.Go(func() {
		if _, err := io.Copy(from, random(size)); err != nil {
			t.Errorf("send: %v", err)
		}
		_ = from.(interface{ CloseWrite() error }).CloseWrite()
	})
	got, want := sha256.New(), sha256.New()
	if n, err := io.Copy(got, at); n != size || err != nil {
		t.Errorf("received %d of %d bytes: %v", n, size, err)
	}
	work.Wait()
	_, _ = io.Copy(want, random(size))
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Error("other bytes came out than went in")
	}
}

func TestTransfer(t *testing.T) {
	for family, to := range map[string]netip.Addr{"ipv4": addrB, "ipv6": addrB6} {
		for _, mtu := range []int{1280, 1420, 9000} {
			name := fmt.Sprintf("%s, MTU %d", family, mtu)
			wire := new(netstacktest.Wire)
			var tooLong atomic.Int64
			wire.Drop = func(_ bool, p []byte) bool {
				if len(p) > mtu {
					tooLong.Add(1)
				}
				return false
			}
			t.Run(name, func(t *testing.T) {
				a, b := wiredPair(t, wire, mtu)
				from, at := connect(t, a, b, to)
				transfer(t, from, at, 10<<20)
				if n := tooLong.Load(); n > 0 {
					t.Errorf("%d packets over the MTU of %d", n, mtu)
				}
				if s := b.Stats(); s.Merged == 0 || s.Malformed != 0 {
					t.Errorf("the receiver: %+v", s)
				}
			})
		}
	}
}

// TestTransferWithLoss loses one packet in 500 each way, and 60 new ones in a row once. Retransmissions are not part of
// the burst: a sender that waits out its timer for each would be testing patience.
func TestTransferWithLoss(t *testing.T) {
	wire := new(netstacktest.Wire)
	var count [2]int // one for each direction's goroutine
	var newest uint32
	wire.Drop = func(fromA bool, p []byte) bool {
		if !fromA {
			count[0]++
			return count[0]%500 == 0
		}
		count[1]++
		seq := header.TCP(p[header.IPv4MinimumSize:]).SequenceNumber()
		fresh := int32(seq-newest) > 0 || count[1] == 1
		if fresh {
			newest = seq
		}
		return count[1]%500 == 0 || fresh && count[1] > 3000 && count[1] < 3060
	}
	a, b := wiredPair(t, wire, 0)
	from, at := connect(t, a, b, addrB)
	transfer(t, from, at, 20<<20)
}

// TestPathMTU: an ICMP error that a hop takes packets of 1,300 bytes at most is heeded (RFC 1191).
func TestPathMTU(t *testing.T) {
	wire := new(netstacktest.Wire)
	var a, b *netstack.Device
	ready := make(chan struct{})
	var long atomic.Int64
	wire.Drop = func(fromA bool, p []byte) bool {
		if !fromA || len(p) <= 1300 {
			return false
		}
		<-ready
		long.Add(1)
		_, _ = a.Write([][]byte{fragmentationNeeded(p, 1300)}, 0)
		return true
	}
	a, b = wiredPair(t, wire, 0)
	close(ready)
	from, at := connect(t, a, b, addrB)
	transfer(t, from, at, 4<<20)
	if n := long.Load(); n == 0 || n > 500 {
		t.Errorf("%d packets were too long", n)
	}
}

func fragmentationNeeded(about []byte, mtu uint16) []byte {
	p := make([]byte, header.IPv4MinimumSize+header.ICMPv4MinimumSize+header.IPv4MinimumSize+8)
	ip := header.IPv4(p)
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(p)), TTL: 64, Protocol: uint8(header.ICMPv4ProtocolNumber),
		SrcAddr: header.IPv4(about).DestinationAddress(), DstAddr: header.IPv4(about).SourceAddress(),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	icmp := header.ICMPv4(ip.Payload())
	icmp.SetType(header.ICMPv4DstUnreachable)
	icmp.SetCode(header.ICMPv4FragmentationNeeded)
	icmp.SetMTU(mtu)
	copy(icmp.Payload(), about)
	icmp.SetChecksum(header.ICMPv4Checksum(icmp, 0))
	return p
}

func TestDialErrors(t *testing.T) {
	a, _ := pair(t)
	ctx := context.Background()
	if _, err := a.DialContext(ctx, "tcp", netip.AddrPortFrom(addrB, 1).String()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("closed port: %v", err)
	}
	for _, c := range [][2]string{{"tcp", "db.internal:5432"}, {"tcp", "198.18.0.2"}, {"unix", "198.18.0.2:80"}} {
		if _, err := a.DialContext(ctx, c[0], c[1]); err == nil {
			t.Errorf("dial %s %s succeeded", c[0], c[1])
		}
	}
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := a.DialContext(gone, "tcp", netip.AddrPortFrom(addrB, 1).String()); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	a.Close()
	if _, err := a.DialContext(ctx, "tcp", netip.AddrPortFrom(addrB, 1).String()); err == nil {
		t.Error("a closed device dials")
	}
}

func TestUDP(t *testing.T) {
	a, b := pair(t)
	at := netip.AddrPortFrom(addrB, 7)
	l, err := b.ListenUDP(at)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := a.DialContext(context.Background(), "udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, size := range []int{1, 1392, 5000} { // the last travels as fragments
		want := bytes.Repeat([]byte{byte(size)}, size)
		if _, err := c.Write(want); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 65535)
		n, _, err := l.ReadFrom(got)
		if err != nil || !bytes.Equal(got[:n], want) {
			t.Errorf("%d bytes: got %d, %v", size, n, err)
		}
	}
}

func TestSetAddresses(t *testing.T) {
	a, b := pair(t)
	moved := netip.MustParseAddr("198.18.7.7")
	if err := b.SetAddresses([]netip.Addr{moved}); err != nil {
		t.Fatal(err)
	}
	from, at := connect(t, a, b, moved)
	transfer(t, from, at, 1<<20)
	if _, err := b.ListenTCP(netip.AddrPortFrom(addrB, 80)); err == nil {
		t.Error("the old address is still there")
	}
	for _, bad := range []string{"0.0.0.0", "224.0.0.1", "::ffff:198.18.0.1"} {
		if err := b.SetAddresses([]netip.Addr{netip.MustParseAddr(bad)}); err == nil {
			t.Errorf("%s was taken", bad)
		}
	}
}

func TestOptions(t *testing.T) {
	for _, mtu := range []int{-1, 100, 1279, 65536} {
		if _, err := netstack.New(netstack.Options{MTU: mtu}); err == nil {
			t.Errorf("an MTU of %d was taken", mtu)
		}
	}
	d := device(t, netstack.Options{})
	if mtu, _ := d.MTU(); mtu != 1420 || d.BatchSize() != 128 || d.File() != nil {
		t.Errorf("mtu %d, batch %d", mtu, d.BatchSize())
	}
}

// TestFilter: packets from sources that the filter does not know go no further.
func TestFilter(t *testing.T) {
	d := device(t, netstack.Options{Addresses: []netip.Addr{addrA, addrA6}})
	d.SetFilter(func(a netip.Addr) bool { return a == addrB })
	syn := segmentSpec{src: netip.AddrPortFrom(addrB, 1), dst: netip.AddrPortFrom(addrA, 2), flags: header.TCPFlagSyn}
	stray := syn
	stray.src = netip.MustParseAddrPort("198.18.0.77:1")
	stray6 := syn
	stray6.src, stray6.dst = netip.AddrPortFrom(addrB6, 1), netip.AddrPortFrom(addrA6, 2)
	batch := [][]byte{flat(stray), flat(syn), flat(stray), flat(stray6)}
	if n, err := d.Write(batch, 0); n != 4 || err != nil {
		t.Fatal(n, err)
	}
	if s := d.Stats(); s.Filtered != 3 || s.WritePackets != 4 {
		t.Errorf("%+v", s)
	}
	bufs, sizes := [][]byte{make([]byte, 2048)}, make([]int, 1)
	if _, err := d.Read(bufs, sizes, 0); err != nil { // the reset for the one that passed
		t.Fatal(err)
	}
	d.SetFilter(nil)
	_, _ = d.Write([][]byte{flat(stray)}, 0)
	if s := d.Stats(); s.Filtered != 3 {
		t.Errorf("%+v", s)
	}
}

// flat is a segment as one slice, complete.
func flat(s segmentSpec) []byte {
	pkt := s.build()
	defer pkt.DecRef()
	v := pkt.ToView()
	defer v.Release()
	return v.ToSlice()
}

// TestMalformed: what is no packet, or a damaged one, is dropped and counted.
func TestMalformed(t *testing.T) {
	d := device(t, netstack.Options{Addresses: []netip.Addr{addrA}})
	good := segmentSpec{
		src: netip.AddrPortFrom(addrB, 1), dst: netip.AddrPortFrom(addrA, 2), flags: header.TCPFlagAck, payload: []byte("data"),
	}
	bad := [][]byte{{0x45}, {0x60, 0}, {0x00, 1, 2}, {0xff}}
	for _, i := range []int{1, 3, 10, 16, 20, 24, 36, 41} { // each byte is covered by a checksum or a length
		p := flat(good)
		p[i] ^= 0x11
		bad = append(bad, p)
	}
	bad = append(bad, flat(good)[:30], flat(good)[:43])
	if _, err := d.Write(bad, 0); err != nil {
		t.Fatal(err)
	}
	if s := d.Stats(); s.Malformed != uint64(len(bad)) {
		t.Errorf("%d of %d dropped", s.Malformed, len(bad))
	}
}

// TestFullQueue: a stack whose packets nobody reads is held up for a bounded time at most, memory stays bounded, and
// what is lost is counted. The queue is tested without a stack, whose goroutines would keep time from being faked.
func TestFullQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := netstack.NewQueue()
		start := time.Now()
		s := segmentSpec{
			src: netip.AddrPortFrom(addrA, 1), dst: netip.AddrPortFrom(addrB, 2), flags: header.TCPFlagAck,
			options: timestamps, payload: make([]byte, 60000), mss: 1340,
		}
		for range 100 {
			q.Push(s.build())
		}
		if took := time.Since(start); took != netstack.QueueWait {
			t.Errorf("the stack was held up for %v, want %v once", took, netstack.QueueWait)
		}
		if n := q.Bytes(); n > netstack.QueueLimit {
			t.Errorf("%d bytes wait", n)
		}
		dropped := q.Overflow()
		if want := uint64(100 - netstack.QueueLimit/60052); dropped != want {
			t.Errorf("%d packets were dropped, want %d", dropped, want)
		}
		s.payload = nil // an acknowledgement still finds room, and waits for nothing
		q.Push(s.build())
		if q.Overflow() != dropped {
			t.Error("an acknowledgement was dropped")
		}
		q.Close()
	})
}

// TestQueueWaits: while somebody reads, a full queue delays and loses nothing.
func TestQueueWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const packets, size = 200, 60000
		q := netstack.NewQueue()
		s := segmentSpec{
			src: netip.AddrPortFrom(addrA, 1), dst: netip.AddrPortFrom(addrB, 2), flags: header.TCPFlagAck,
			options: timestamps, payload: make([]byte, size), mss: 1340,
		}
		var work sync.WaitGroup
		work.Go(func() {
			for range packets {
				q.Push(s.build())
			}
		})
		got := 0
		for range packets {
			time.Sleep(netstack.QueueWait / 2)
			got += q.Take(20 * size)
		}
		work.Wait()
		if got != packets || q.Overflow() != 0 {
			t.Errorf("%d of %d packets, %d dropped", got, packets, q.Overflow())
		}
		q.Close()
	})
}

// TestCloseUnderTraffic closes one end while both send as fast as they can.
func TestCloseUnderTraffic(t *testing.T) {
	for range 5 {
		wire := new(netstacktest.Wire)
		a, b := wiredPair(t, wire, 0)
		from, at := connect(t, a, b, addrB)
		var work sync.WaitGroup
		work.Go(func() { _, _ = io.Copy(from, random(1<<40)) })
		work.Go(func() { _, _ = io.Copy(at, random(1<<40)) })
		work.Go(func() { _, _ = io.Copy(io.Discard, from) })
		_, _ = io.ReadFull(at, make([]byte, 1<<20))
		b.Close()
		b.Close()
		if _, err := b.Write([][]byte{{0x45}}, 0); !errors.Is(err, os.ErrClosed) {
			t.Errorf("write after close: %v", err)
		}
		if _, err := b.Read(nil, nil, 0); !errors.Is(err, os.ErrClosed) {
			t.Errorf("read after close: %v", err)
		}
		a.Close()
		work.Wait()
	}
}

// TestConcurrentWrite: WireGuard writes from one goroutine for each peer.
func TestConcurrentWrite(t *testing.T) {
	d := device(t, netstack.Options{Addresses: []netip.Addr{addrA}})
	var work sync.WaitGroup
	for i := range 8 {
		work.Go(func() {
			s := segmentSpec{
				src: netip.AddrPortFrom(addrB, uint16(i+1)), dst: netip.AddrPortFrom(addrA, 9),
				flags: header.TCPFlagAck, payload: make([]byte, 1000),
			}
			batch := make([][]byte, 200) // more than a batch
			for j := range batch {
				batch[j] = flat(s)
				s.seq += 1000
			}
			if n, err := d.Write(batch, 0); n != 200 || err != nil {
				t.Error(n, err)
			}
		})
	}
	work.Wait()
	if s := d.Stats(); s.WritePackets != 1600 || s.Malformed != 0 || s.Merged < 1500 {
		t.Errorf("%+v", s)
	}
}

// FuzzWrite feeds the device anything at all; it must neither panic nor block.
func FuzzWrite(f *testing.F) {
	s := segmentSpec{
		src: netip.AddrPortFrom(addrB, 1), dst: netip.AddrPortFrom(addrA, 2), flags: header.TCPFlagAck, payload: []byte("data"),
	}
	f.Add(flat(s), flat(s))
	s.src, s.dst = netip.AddrPortFrom(addrB6, 1), netip.AddrPortFrom(addrA6, 2)
	f.Add(flat(s), []byte{0x60})
	f.Add([]byte{0x4f, 0}, fragmentationNeeded(flat(segmentSpec{
		src: netip.AddrPortFrom(addrA, 1), dst: netip.AddrPortFrom(addrB, 2),
	}), 100))
	d, err := netstack.New(netstack.Options{Addresses: []netip.Addr{addrA, addrA6}, Forward: true})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { d.Close() })
	go func() {
		bufs, sizes := [][]byte{make([]byte, 65535)}, make([]int, 1)
		for {
			if _, err := d.Read(bufs, sizes, 0); err != nil {
				return
			}
		}
	}()
	f.Fuzz(func(t *testing.T, one, two []byte) {
		if n, err := d.Write([][]byte{one, two}, 0); n != 2 || err != nil {
			t.Fatal(n, err)
		}
	})
}
