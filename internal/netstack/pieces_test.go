package netstack

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"pgregory.net/rapid"
)

// datagram makes a UDP packet of IPv4 or IPv6 whose payload is random and so long.
func datagram(from netip.Addr, id, size int) []byte {
	payload := make([]byte, size)
	_, _ = rand.Read(payload)
	udp := header.UDP(append(make([]byte, header.UDPMinimumSize), payload...))
	udp.Encode(&header.UDPFields{SrcPort: 1, DstPort: 2, Length: uint16(len(udp))})
	if from.Is6() {
		p := append(make([]byte, ipv6Len), udp...)
		p[0], p[6], p[7] = 6<<4, uint8(header.UDPProtocolNumber), 64
		binary.BigEndian.PutUint16(p[4:], uint16(len(udp)))
		src := from.As16()
		copy(p[8:], src[:])
		p[24] = 0xfd
		return p
	}
	p := append(make([]byte, ipv4Len), udp...)
	p[0], p[8], p[9], p[16] = 0x45, 64, uint8(header.UDPProtocolNumber), 10
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	binary.BigEndian.PutUint16(p[4:], uint16(id))
	src := from.As4()
	copy(p[12:], src[:])
	binary.BigEndian.PutUint16(p[10:], ^checksum.Checksum(p[:ipv4Len], 0))
	return p
}

// cutUp makes fragments of a packet.
func cutUp(p []byte, id, limit int) [][]byte {
	if p[0]>>4 == 6 {
		return fragments6(p, limit, uint32(id))
	}
	return fragments4(p, limit, uint16(id))
}

// give hands a packet to pieces as Write does, and gives what comes out.
func give(t interface{ Fatalf(string, ...any) }, ps *pieces, p []byte) []byte {
	p, ip, _, ok := parse(p)
	if !ok {
		t.Fatalf("%x is no packet", p)
	}
	f, is, ok := readFragment(p, ip)
	if !is || !ok {
		t.Fatalf("%x is no fragment", p)
	}
	return ps.add(f)
}

func sourceOf(six bool, n int) netip.Addr {
	if six {
		return netip.AddrFrom16([16]byte{0xfd, 14: byte(n >> 8), 15: byte(n)})
	}
	return netip.AddrFrom4([4]byte{198, 18, byte(n >> 8), byte(n)})
}

// audit holds the sums against what there is.
func (ps *pieces) audit(t interface{ Fatalf(string, ...any) }) {
	sum, n := 0, 0
	for z := ps.oldest; z != nil; z = z.next {
		own := pieceCost
		for _, p := range z.parts {
			own += len(p.data) + pieceCost
		}
		if own != z.bytes || ps.whole[z.key] != z || z.next == nil && ps.newest != z {
			t.Fatalf("a packet counts for %d bytes, want %d", z.bytes, own)
		}
		sum += own
		n++
	}
	each, waiting := 0, 0
	for _, s := range ps.sources {
		each += s.bytes
		waiting += len(s.puzzles)
	}
	if sum != ps.bytes || each != sum || n != len(ps.whole) || waiting != n {
		t.Fatalf("%d bytes are counted and %d by source, there are %d; %d packets and %d, there are %d", ps.bytes, each, sum, len(ps.whole), waiting, n)
	}
}

// TestPiecesProperty: fragments of several packets in any order, some of them twice, become these packets, once each, and nothing is left.
func TestPiecesProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ps := newPieces()
		defer ps.close()
		var all [][]byte
		want := map[string]bool{}
		for id := range rapid.IntRange(1, 4).Draw(t, "packets") {
			p := datagram(sourceOf(rapid.Bool().Draw(t, "v6"), id%2), id, rapid.SampledFrom([]int{1300, 1301, 9000, 65507}).Draw(t, "size"))
			cut := cutUp(p, id, rapid.IntRange(576, 1280).Draw(t, "limit"))
			all = append(all, cut...)
			if len(cut) > 1 { // all but one: a whole second set would be a second packet
				all = append(all, cut[rapid.IntRange(0, len(cut)-1).Draw(t, "twice")])
			}
			want[string(p)] = true
		}
		for _, p := range rapid.Permutation(all).Draw(t, "order") {
			got := give(t, ps, p)
			ps.audit(t)
			if got == nil {
				continue
			}
			if !MayBeFragmented(got) {
				t.Fatal("what came in fragments is said to have to stay whole")
			}
			got[8-got[0]>>4/6] = 64 // the TTL, or hop limit
			if got[0]>>4 == 4 {
				binary.BigEndian.PutUint16(got[10:], 0)
				binary.BigEndian.PutUint16(got[10:], ^checksum.Checksum(got[:ipv4Len], 0))
			}
			if !want[string(got)] {
				t.Fatalf("%d bytes that nobody sent", len(got))
			}
			delete(want, string(got))
		}
		if len(want) > 0 {
			t.Fatalf("%d packets did not become whole", len(want))
		}
	})
}

// TestFragmentsThatOverlapSpoilTheirPacket: nothing comes of it, nor of what follows under the same number. What a fragment may not say is
// malformed.
func TestFragmentsThatOverlapSpoilTheirPacket(t *testing.T) {
	for _, six := range []bool{false, true} {
		whole := datagram(sourceOf(six, 1), 7, 3000)
		cut := cutUp(whole, 7, 1280)
		shifted := bytes.Clone(cut[1])
		if six { // a fragment that begins eight bytes before the last one's end
			binary.BigEndian.PutUint16(shifted[ipv6Len+2:], binary.BigEndian.Uint16(shifted[ipv6Len+2:])-8)
		} else {
			binary.BigEndian.PutUint16(shifted[6:], binary.BigEndian.Uint16(shifted[6:])-1)
			binary.BigEndian.PutUint16(shifted[10:], 0)
			binary.BigEndian.PutUint16(shifted[10:], ^checksum.Checksum(shifted[:ipv4Len], 0))
		}
		ps := newPieces()
		for _, p := range [][]byte{cut[0], shifted, cut[1], cut[2], cut[0], cut[1], cut[2]} {
			if got := give(t, ps, p); got != nil {
				t.Errorf("v6 %t: a packet of %d bytes came of it", six, len(got))
			}
			ps.audit(t)
		}
		if n := ps.dropped.Load(); n != 7 {
			t.Errorf("v6 %t: %d fragments were dropped, want 7", six, n)
		}
		ps.close()
	}
	long := datagram(sourceOf(false, 1), 1, 100)
	binary.BigEndian.PutUint16(long[6:], 0x1fff) // the last fragment of more than a packet may have
	if _, is, ok := readFragment(long, ipv4Len); !is || ok {
		t.Error("a packet may be too long")
	}
	odd := datagram(sourceOf(false, 1), 1, 101)
	binary.BigEndian.PutUint16(odd[6:], 0x2000)
	if _, is, ok := readFragment(odd, ipv4Len); !is || ok {
		t.Error("a fragment may end anywhere")
	}
}

// TestPiecesOfOneStarveNobody: a source sends first fragments without end. Another one's packet, begun before, becomes whole after; what
// the first has waiting is bounded, whatever its fragments are.
func TestPiecesOfOneStarveNobody(t *testing.T) {
	for _, size := range []int{8, 1200} {
		ps := newPieces()
		honest := cutUp(datagram(sourceOf(false, 2), 1, 9000), 1, 1280)
		for _, p := range honest[1:] {
			give(t, ps, p)
		}
		first := datagram(sourceOf(false, 1), 0, size)
		first = first[:ipv4Len+header.UDPMinimumSize+size]
		for id := range 20_000 {
			binary.BigEndian.PutUint16(first[4:], uint16(id))
			binary.BigEndian.PutUint16(first[6:], 0x2000)
			binary.BigEndian.PutUint16(first[10:], 0)
			binary.BigEndian.PutUint16(first[10:], ^checksum.Checksum(first[:ipv4Len], 0))
			give(t, ps, first)
			if n := ps.sources[sourceOf(false, 1)].bytes; n > piecesOfOne {
				t.Fatalf("%d bytes of one source wait", n)
			}
		}
		ps.audit(t)
		if give(t, ps, honest[0]) == nil {
			t.Errorf("%d bytes each: another one's packet was lost", size)
		}
		ps.close()
	}
}

// TestPiecesOfAll: many sources have as much waiting as they may. All together stay within what there is, and one that has little
// gets its packet.
func TestPiecesOfAll(t *testing.T) {
	ps := newPieces()
	defer ps.close()
	honest := cutUp(datagram(sourceOf(true, 5000), 1, 9000), 1, 1280)
	for _, p := range honest[1:] {
		give(t, ps, p)
	}
	for source := range 2 * piecesTotal / piecesOfOne {
		for id := range piecesOfOne / 60_000 {
			for _, p := range cutUp(datagram(sourceOf(false, source), id, 60_000), id, 1280)[1:] {
				give(t, ps, p)
			}
		}
		if ps.bytes > piecesTotal {
			t.Fatalf("%d bytes wait", ps.bytes)
		}
	}
	ps.audit(t)
	if give(t, ps, honest[0]) == nil {
		t.Error("the packet of one that has little was lost")
	}
}

// TestPiecesDoNotStay: what never becomes whole is forgotten, whether or not anything follows; so is what an address had sent before
// it is another session's.
func TestPiecesDoNotStay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ps := newPieces()
		defer ps.close()
		cut := cutUp(datagram(sourceOf(false, 1), 1, 3000), 1, 1280)
		give(t, ps, cut[0])
		time.Sleep(piecesWait / 2)
		give(t, ps, cutUp(datagram(sourceOf(false, 2), 1, 3000), 1, 1280)[0])
		time.Sleep(piecesWait/2 + time.Second)
		ps.mu.Lock()
		if len(ps.whole) != 1 || ps.timer == nil {
			t.Errorf("%d packets wait, want one", len(ps.whole))
		}
		ps.mu.Unlock()
		time.Sleep(piecesWait)
		ps.mu.Lock()
		if len(ps.whole) != 0 || ps.bytes != 0 || ps.timer != nil || len(ps.sources) != 0 {
			t.Errorf("%d packets and %d bytes wait still", len(ps.whole), ps.bytes)
		}
		ps.mu.Unlock()
		give(t, ps, cut[0])
		ps.forget(sourceOf(false, 1))
		if give(t, ps, cut[1]) != nil || give(t, ps, cut[2]) != nil {
			t.Error("a packet was made of two sessions' fragments")
		}
	})
}

// TestUncarried: what a gateway has nothing to do with is dropped before the stack sees it, as a device that ends here does not.
func TestUncarried(t *testing.T) {
	icmp4 := func(kind byte) []byte {
		p := datagram(sourceOf(false, 1), 1, 20)
		p[9], p[ipv4Len] = uint8(header.ICMPv4ProtocolNumber), kind
		binary.BigEndian.PutUint16(p[10:], 0)
		binary.BigEndian.PutUint16(p[10:], ^checksum.Checksum(p[:ipv4Len], 0))
		return p
	}
	next := func(proto, first byte) []byte {
		p := datagram(sourceOf(true, 1), 1, 60)
		p[6], p[ipv6Len] = proto, first
		return p
	}
	options := append(append([]byte{0x46}, icmp4(8)[1:ipv4Len]...), append(make([]byte, 4), icmp4(8)[ipv4Len:]...)...)
	binary.BigEndian.PutUint16(options[2:], uint16(len(options)))
	binary.BigEndian.PutUint16(options[10:], 0)
	binary.BigEndian.PutUint16(options[10:], ^checksum.Checksum(options[:ipv4Len+4], 0))
	hidden := next(uint8(header.IPv6FragmentHeader), 60) // options behind a fragment that is a whole packet
	hidden[ipv6Len+2], hidden[ipv6Len+3] = 0, 0
	for name, c := range map[string]struct {
		packet []byte
		want   fate
	}{
		"options":                        {options, uncarried},
		"redirect":                       {icmp4(5), uncarried},
		"source quench":                  {icmp4(4), uncarried},
		"router advertisement":           {icmp4(9), uncarried},
		"timestamp":                      {icmp4(13), uncarried},
		"echo":                           {icmp4(8), taken},
		"unreachable":                    {icmp4(3), filtered}, // it says nothing that its source can know
		"v6 router advertisement":        {next(58, 134), uncarried},
		"v6 neighbour advertisement":     {next(58, 136), uncarried},
		"v6 redirect":                    {next(58, 137), uncarried},
		"v6 echo reply":                  {next(58, 129), uncarried},
		"v6 echo":                        {next(58, 128), taken},
		"v6 too big":                     {next(58, 2), filtered},
		"v6 hop-by-hop options":          {next(0, 58), uncarried},
		"v6 routing header":              {next(43, 6), uncarried},
		"v6 destination options":         {next(60, 6), uncarried},
		"v6 authentication header":       {next(51, 6), uncarried},
		"v6 options behind fragment":     {hidden, uncarried},
		"v6 datagram":                    {next(17, 0), taken},
		"v6 fragment without its header": {next(44, 0)[:ipv6Len+4], malformed},
	} {
		m := newMerger()
		m.forward, m.pieces = true, newPieces()
		if len(c.packet) == ipv6Len+4 {
			binary.BigEndian.PutUint16(c.packet[4:], 4)
		}
		if got := m.add(c.packet); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
		m.pieces.close()
	}
}

// TestFragmentsBehindOptions: fragments whose headers differ in length make no packet that is longer than its header can say. A first fragment
// with options and a last one without once did, and the gateway read from a packet that was none.
func TestFragmentsBehindOptions(t *testing.T) {
	m := newMerger()
	m.forward, m.pieces = true, newPieces()
	defer m.pieces.close()
	const step = 1024
	for end, at := pieceMost-ipv4Len, 0; at < end; at += step {
		n := min(step, end-at)
		ip, more := ipv4Len, uint16(header.IPv4FlagMoreFragments)<<13
		if at == 0 {
			ip = header.IPv4MaximumHeaderSize
		}
		if at+n == end {
			more = 0
		}
		p := make([]byte, ip+n)
		src := sourceOf(false, 1).As4()
		p[0], p[8], p[9], p[16] = 4<<4|byte(ip/4), 64, uint8(header.UDPProtocolNumber), 10
		copy(p[12:], src[:])
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		binary.BigEndian.PutUint16(p[6:], more|uint16(at/8))
		binary.BigEndian.PutUint16(p[10:], ^checksum.Checksum(p[:ip], 0))
		want := taken
		if at == 0 {
			want = uncarried
		}
		if got := m.add(p); got != want {
			t.Errorf("the fragment at %d becomes %d, want %d", at, got, want)
		}
	}
	if m.count != 0 {
		t.Errorf("%d packets came of it", m.count)
	}
}

// FuzzPieces: whatever fragments say, the sums are right, the bounds hold, and what comes out is a packet.
func FuzzPieces(f *testing.F) {
	f.Add([]byte{0, 1, 0, 8, 1, 1, 8, 0})
	f.Add([]byte{0, 1, 1, 8, 0, 1, 1, 16, 0, 0, 0, 64})
	f.Fuzz(func(t *testing.T, script []byte) {
		ps := newPieces()
		defer ps.close()
		for ; len(script) >= 4; script = script[4:] {
			six, id := script[0]&1 == 1, int(script[0]>>6)
			p := datagram(sourceOf(six, int(script[0]>>1&3)), id, int(script[3]))
			var fr fragment
			var is, ok bool
			if six {
				p = append(p[:ipv6Len], append([]byte{17, 0, script[1], script[2], 0, 0, 0, byte(id)}, p[ipv6Len:]...)...)
				p[6] = uint8(header.IPv6FragmentHeader)
				fr, is, ok = readFragment(p, ipv6Len)
			} else {
				binary.BigEndian.PutUint16(p[6:], binary.BigEndian.Uint16(script[1:]))
				fr, is, ok = readFragment(p, ipv4Len)
			}
			if !is || !ok {
				continue
			}
			if got := ps.add(fr); got != nil {
				if _, _, _, ok := parse(got); !ok || len(got) > pieceMost+ipv6Len {
					t.Fatalf("what came out is no packet: %x", got[:ipv4Len])
				}
			}
			ps.audit(t)
		}
	})
}
