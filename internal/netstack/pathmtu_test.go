package netstack_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/netstack/netstacktest"
)

// TestTCPFitsThePath: segments that the stack has made for the MTU leave no longer than the path takes, without a byte lost,
// and other destinations keep theirs.
func TestTCPFitsThePath(t *testing.T) {
	for name, to := range map[string][2]netip.Addr{"ipv4": {addrA, addrB}, "ipv6": {addrA6, addrB6}} {
		d := device(t, netstack.Options{})
		var limit atomic.Int64
		d.SetPathMTU(func(dst netip.Addr) int {
			if dst == to[1] {
				return int(limit.Load())
			}
			return 0
		})
		src, dst := netip.AddrPortFrom(to[0], 443), netip.AddrPortFrom(to[1], 40000)
		for _, most := range []int64{0, 1420, 1419, 1300, 576, 9000} {
			limit.Store(most)
			payload := bytes.Repeat([]byte("0123456789"), 2000)
			send(d, segmentSpec{src: src, dst: dst, seq: 7, flags: header.TCPFlagAck, options: timestamps, payload: payload, mss: 1340})
			send(d, segmentSpec{src: src, dst: dst, flags: header.TCPFlagRst})
			var got []byte
			longest := 0
			for _, p := range readAll(t, d, 128) {
				got, longest = append(got, p.payload...), max(longest, p.size)
			}
			want := 1420
			if most != 0 {
				want = int(min(most, 1420))
			}
			if name == "ipv6" { // an MSS that the peer asked for
				want = min(want, 1340+40+32)
			}
			if !bytes.Equal(got, payload) || longest != want {
				t.Errorf("%s with %d: %d bytes in packets of at most %d, want %d", name, most, len(got), longest, want)
			}
		}
		other := netip.AddrPortFrom(to[0], 40000)
		limit.Store(600)
		send(d, segmentSpec{src: dst, dst: other, seq: 1, flags: header.TCPFlagAck, options: timestamps, payload: make([]byte, 1340), mss: 1340})
		send(d, segmentSpec{src: dst, dst: other, flags: header.TCPFlagRst})
		if got := readAll(t, d, 8); len(got) != 1 {
			t.Errorf("%s: another destination's packet came in %d pieces", name, len(got))
		}
	}
}

// reassemble puts fragments together (RFC 791, section 3.2; RFC 8200, section 4.5).
func reassemble(t rapid.TB, packets [][]byte, most int) []byte {
	t.Helper()
	var data []byte
	for i, p := range packets {
		if len(p) > most {
			t.Fatalf("fragment %d has %d bytes of %d", i, len(p), most)
		}
		var offset int
		var more bool
		var part []byte
		if p[0]>>4 == 4 {
			ip := header.IPv4(p)
			if !ip.IsValid(len(p)) || int(ip.TotalLength()) != len(p) || checksum.Checksum(p[:20], 0) != 0xffff {
				t.Fatalf("fragment %d has a bad header", i)
			}
			offset, more, part = int(ip.FragmentOffset()), ip.More(), ip.Payload()
		} else {
			if len(packets) > 1 && p[6] != uint8(header.IPv6FragmentExtHdrIdentifier) || int(binary.BigEndian.Uint16(p[4:])) != len(p)-40 {
				t.Fatalf("fragment %d has a bad header", i)
			}
			field := binary.BigEndian.Uint16(p[42:])
			offset, more, part = int(field&^7), field&1 != 0, p[48:]
		}
		if offset != len(data) || more != (i < len(packets)-1) || more && len(part)%8 != 0 {
			t.Fatalf("fragment %d of %d at %d, want %d; more: %t", i, len(packets), offset, len(data), more)
		}
		data = append(data, part...)
	}
	return data
}

// TestFragmentsProperty: what is cut comes together again, and no piece is too long.
func TestFragmentsProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		body := rapid.SliceOfN(rapid.Byte(), 600, 1380).Draw(t, "body")
		most := rapid.IntRange(68, 600).Draw(t, "most")
		p := make([]byte, 20, 20+len(body))
		header.IPv4(p).Encode(&header.IPv4Fields{TotalLength: uint16(20 + len(body)), ID: 99, TTL: 64, Protocol: 17})
		if rapid.Bool().Draw(t, "ipv6") {
			p = make([]byte, 40, 40+len(body))
			header.IPv6(p).Encode(&header.IPv6Fields{PayloadLength: uint16(len(body)), TransportProtocol: 17, HopLimit: 64})
		}
		pieces := netstack.Fragments(append(p, body...), most)
		if got := reassemble(t, pieces, most); !bytes.Equal(got, body) {
			t.Fatalf("%d bytes of %d came together again", len(got), len(body))
		}
	})
}

func TestNotFragmented(t *testing.T) {
	plain := make([]byte, 100)
	header.IPv4(plain).Encode(&header.IPv4Fields{TotalLength: 100, TTL: 64, Protocol: 17})
	options := bytes.Clone(plain)
	options[0] = 0x46
	if netstack.Fragments(plain, 68) == nil || netstack.Fragments(options, 68) != nil || netstack.Fragments(plain, 20) != nil {
		t.Error("a packet was cut that must not be, or one was not that may")
	}
}

// TestPathThatShrinks: connections that are open, and datagrams, go on when the path takes less than the MTU from now on.
func TestPathThatShrinks(t *testing.T) {
	var limit, long atomic.Int64
	limit.Store(1420)
	wire := new(netstacktest.Wire)
	wire.Drop = func(fromA bool, p []byte) bool {
		if !fromA || len(p) <= int(limit.Load()) {
			return false
		}
		long.Add(1)
		return true
	}
	a, b := wiredPair(t, wire, 0)
	for _, to := range []netip.Addr{addrB, addrB6} {
		limit.Store(1420)
		from, at := connect(t, a, b, to)
		copied := make(chan error, 1)
		go func() { _, err := io.CopyN(from, random(1<<20), 1<<20); copied <- err }()
		if _, err := io.CopyN(io.Discard, at, 1<<20); err != nil || <-copied != nil {
			t.Fatal(err)
		}
		a.SetPathMTU(func(netip.Addr) int { return int(limit.Load()) })
		long.Store(0)
		limit.Store(900)
		transfer(t, from, at, 4<<20)
		if n := long.Load(); n > 500 { // what was on its way
			t.Errorf("%s: %d packets were too long", to, n)
		}
		for _, size := range []int{1000, 1300, 5000} {
			datagram(t, a, b, netip.AddrPortFrom(to, uint16(size)), size)
		}
	}
}

// datagram sends one.
func datagram(t *testing.T, a, b *netstack.Device, at netip.AddrPort, size int) {
	t.Helper()
	l, err := b.ListenUDP(at)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := a.DialContext(t.Context(), "udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	want := bytes.Repeat([]byte{byte(size)}, size)
	if _, err := c.Write(want); err != nil {
		t.Fatal(err)
	}
	_ = l.SetReadDeadline(time.Now().Add(30 * time.Second))
	got := make([]byte, 65535)
	if n, _, err := l.ReadFrom(got); err != nil || !bytes.Equal(got[:n], want) {
		t.Errorf("%d bytes to %s: got %d, %v", size, at, n, err)
	}
}
