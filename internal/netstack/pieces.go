package netstack

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Bounds of what a forwarding device keeps of packets that come in fragments. The stack's own reassembly has 4 MiB for everybody, of which
// one session could take all.
const (
	piecesOfOne = 512 << 10 // bytes that one source may have waiting: eight datagrams of the largest size
	piecesTotal = 32 << 20  // bytes of all sources
	pieceCost   = 256       // bytes that a fragment counts for beside its own
	pieceMost   = 65535     // bytes of a whole packet behind the header of IPv6, or with that of IPv4
	piecesWait  = 15 * time.Second
)

// pieces puts packets together that sessions send in fragments (RFC 791, section 3.2; RFC 8200, section 4.5), before anything is read
// from them. Fragments that overlap spoil their packet (RFC 5722), in both families. When a source has as much waiting as it may, its
// own oldest packet goes; when all sources together have, that of one that has more than most.
type pieces struct {
	dropped atomic.Uint64 // fragments that never became a packet

	mu      sync.Mutex
	bytes   int
	whole   map[pieceKey]*puzzle
	sources map[netip.Addr]*pieceSource
	oldest  *puzzle // of all, in the order in which they began …
	newest  *puzzle // … and the last
	timer   *time.Timer
	closed  bool
}

// pieceKey says to which packet a fragment belongs.
type pieceKey struct {
	src, dst netip.Addr
	id       uint32
	proto    uint8 // IPv4 only
}

// pieceSource is what waits of one source.
type pieceSource struct {
	bytes   int
	puzzles []*puzzle // oldest first
}

// puzzle is a packet of which fragments are missing.
type puzzle struct {
	key        pieceKey
	born       time.Time
	prev, next *puzzle
	head       []byte // the IP header of the first fragment; nil until that has come
	proto      uint8  // IPv6: the next header in the first fragment
	parts      []piece
	got, end   int // bytes; end is -1 until the last fragment has come
	bytes      int // that it counts for
	spoiled    bool
}

type piece struct {
	at   int
	data []byte
}

// fragment is what a fragment's headers say.
type fragment struct {
	key   pieceKey
	head  []byte
	proto uint8
	at    int
	more  bool
	data  []byte
}

func newPieces() *pieces {
	return &pieces{whole: map[pieceKey]*puzzle{}, sources: map[netip.Addr]*pieceSource{}}
}

// readFragment reads a fragment whose IP header has been checked. is says whether it is one, ok whether it makes sense.
func readFragment(p []byte, ip int) (f fragment, is, ok bool) {
	if p[0]>>4 == 4 {
		field := binary.BigEndian.Uint16(p[6:])
		f = fragment{head: p[:ip], at: int(field&0x1fff) * 8, more: field&0x2000 != 0, data: p[ip:]}
		f.key = pieceKey{netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), uint32(binary.BigEndian.Uint16(p[4:])), p[9]}
		return f, f.more || f.at > 0, f.sound(ip)
	}
	const head = ipv6Len + header.IPv6FragmentHeaderSize
	if p[6] != uint8(header.IPv6FragmentHeader) {
		return f, false, true
	}
	if len(p) < head {
		return f, true, false
	}
	field := binary.BigEndian.Uint16(p[ipv6Len+2:])
	f = fragment{head: p[:ipv6Len], proto: p[ipv6Len], at: int(field &^ 7), more: field&1 != 0, data: p[head:]}
	f.key = pieceKey{src: netip.AddrFrom16([16]byte(p[8:24])), dst: netip.AddrFrom16([16]byte(p[24:40])), id: binary.BigEndian.Uint32(p[ipv6Len+4:])}
	return f, true, f.sound(0)
}

// sound reports whether a fragment fits a packet; over is what that has beside the fragments' data.
func (f *fragment) sound(over int) bool {
	return len(f.data) > 0 && over+f.at+len(f.data) <= pieceMost && (!f.more || len(f.data)%8 == 0)
}

// add takes a fragment, and gives the packet when it is complete. What it gives is the caller's.
func (ps *pieces) add(f fragment) []byte {
	if f.at == 0 && !f.more { // a fragment of IPv6 that is a whole packet (RFC 6946)
		return f.alone()
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	now := time.Now()
	ps.expire(now)
	if ps.closed {
		return nil
	}
	z := ps.whole[f.key]
	if z == nil {
		z = ps.begin(f.key, now)
	}
	if z.spoiled || z.has(&f) {
		ps.dropped.Add(1)
		return nil
	}
	if !z.fits(&f) {
		ps.spoil(z)
		ps.dropped.Add(1)
		return nil
	}
	ps.put(z, &f)
	if z.head != nil && z.got == z.end {
		packet := z.assemble()
		z.parts = nil // none of them is lost
		ps.drop(z)
		return packet
	}
	ps.makeRoom(z)
	return nil
}

// alone makes a packet of its only fragment.
func (f *fragment) alone() []byte {
	z := puzzle{head: f.head, proto: f.proto, parts: []piece{{0, f.data}}, got: len(f.data)}
	return z.assemble()
}

// begin makes room for a packet. mu is held.
func (ps *pieces) begin(key pieceKey, now time.Time) *puzzle {
	z := &puzzle{key: key, born: now, end: -1, prev: ps.newest}
	if ps.whole[key] = z; ps.newest == nil {
		ps.oldest = z
	} else {
		ps.newest.next = z
	}
	ps.newest = z
	s := ps.sources[key.src]
	if s == nil {
		s = &pieceSource{}
		ps.sources[key.src] = s
	}
	s.puzzles = append(s.puzzles, z)
	ps.count(z, pieceCost)
	if ps.timer == nil {
		ps.timer = time.AfterFunc(piecesWait, ps.tick)
	}
	return z
}

// has reports whether a fragment is there already, bit for bit: a path may bring it twice.
func (z *puzzle) has(f *fragment) bool {
	i, found := z.find(f.at)
	return found && string(z.parts[i].data) == string(f.data)
}

func (z *puzzle) find(at int) (int, bool) {
	return slices.BinarySearchFunc(z.parts, at, func(p piece, at int) int { return p.at - at })
}

// fits reports whether a fragment overlaps no other and agrees with them on where the packet ends.
func (z *puzzle) fits(f *fragment) bool {
	end := f.at + len(f.data)
	if z.end >= 0 && (end > z.end || !f.more) {
		return false
	}
	if n := len(z.parts); !f.more && n > 0 && z.parts[n-1].at+len(z.parts[n-1].data) > end {
		return false
	}
	i, found := z.find(f.at)
	return !found && (i == 0 || z.parts[i-1].at+len(z.parts[i-1].data) <= f.at) && (i == len(z.parts) || end <= z.parts[i].at)
}

// put adds a fragment. mu is held.
func (ps *pieces) put(z *puzzle, f *fragment) {
	i, _ := z.find(f.at)
	z.parts = slices.Insert(z.parts, i, piece{f.at, slices.Clone(f.data)})
	if z.got += len(f.data); !f.more {
		z.end = f.at + len(f.data)
	}
	if f.at == 0 {
		z.head, z.proto = slices.Clone(f.head), f.proto
	}
	ps.count(z, len(f.data)+pieceCost)
}

// count adds to what a packet counts for. mu is held.
func (ps *pieces) count(z *puzzle, n int) {
	z.bytes += n
	ps.sources[z.key.src].bytes += n
	ps.bytes += n
}

// makeRoom drops what is too much; z is the packet that has just grown. mu is held.
func (ps *pieces) makeRoom(z *puzzle) {
	for s := ps.sources[z.key.src]; s.bytes > piecesOfOne && len(s.puzzles) > 0; {
		ps.drop(s.puzzles[0])
	}
	for ps.bytes > piecesTotal {
		ps.drop(ps.greediest().puzzles[0])
	}
}

// greediest gives a source that has much, of some that it looks at. mu is held.
func (ps *pieces) greediest() (most *pieceSource) {
	const looks = 16
	n := 0
	for _, s := range ps.sources { // in no order
		if most == nil || s.bytes > most.bytes {
			most = s
		}
		if n++; n == looks {
			break
		}
	}
	return most
}

// spoil forgets what has come of a packet, but not that it is spoiled. mu is held.
func (ps *pieces) spoil(z *puzzle) {
	ps.dropped.Add(uint64(len(z.parts)))
	ps.count(z, pieceCost-z.bytes)
	z.spoiled, z.parts, z.head = true, nil, nil
}

// drop forgets a packet. mu is held.
func (ps *pieces) drop(z *puzzle) {
	ps.dropped.Add(uint64(len(z.parts)))
	ps.count(z, -z.bytes)
	delete(ps.whole, z.key)
	if z.prev == nil {
		ps.oldest = z.next
	} else {
		z.prev.next = z.next
	}
	if z.next == nil {
		ps.newest = z.prev
	} else {
		z.next.prev = z.prev
	}
	s := ps.sources[z.key.src]
	if i := slices.Index(s.puzzles, z); i >= 0 {
		s.puzzles = slices.Delete(s.puzzles, i, i+1)
	}
	if len(s.puzzles) == 0 {
		delete(ps.sources, z.key.src)
	}
}

// expire drops what has waited for too long. mu is held.
func (ps *pieces) expire(now time.Time) {
	for ps.oldest != nil && now.Sub(ps.oldest.born) >= piecesWait {
		ps.drop(ps.oldest)
	}
}

// tick drops what nobody asks for any more.
func (ps *pieces) tick() {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.expire(time.Now())
	if ps.timer = nil; ps.oldest != nil && !ps.closed {
		ps.timer = time.AfterFunc(time.Until(ps.oldest.born.Add(piecesWait)), ps.tick)
	}
}

// forget drops what waits of a source that has gone.
func (ps *pieces) forget(src netip.Addr) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for s := ps.sources[src]; s != nil && len(s.puzzles) > 0; {
		ps.drop(s.puzzles[0])
	}
}

// close ends the timer; nothing is taken any more.
func (ps *pieces) close() {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.closed = true
	if ps.timer != nil {
		ps.timer.Stop()
	}
}

// assemble makes the packet, marked as one that may be fragmented, see [MayBeFragmented].
func (z *puzzle) assemble() []byte {
	p := append(make([]byte, 0, len(z.head)+z.got), z.head...)
	for _, part := range z.parts {
		p = append(p, part.data...)
	}
	if p[0]>>4 == 6 {
		binary.BigEndian.PutUint16(p[4:], uint16(z.got))
		p[6], p[7] = z.proto, fragmentable
		return p
	}
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	binary.BigEndian.PutUint16(p[6:], 0)
	p[8] = fragmentable
	binary.BigEndian.PutUint16(p[10:], 0)
	binary.BigEndian.PutUint16(p[10:], ^checksum.Checksum(p[:len(z.head)], 0))
	return p
}
