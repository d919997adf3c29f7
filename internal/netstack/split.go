package netstack

import (
	"encoding/binary"
	"net/netip"
	"os"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Read fills bufs with the packets that the stack sends, each at most an MTU long and complete with its checksums, and
// blocks while there are none.
func (d *Device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	d.readMu.Lock()
	defer d.readMu.Unlock()
	for {
		if d.closed.Load() {
			return 0, os.ErrClosed
		}
		if n := d.link.out.read(bufs, sizes, offset); n > 0 {
			d.counters.read.Add(uint64(n))
			return n, nil
		}
		if !d.link.out.block() {
			return 0, os.ErrClosed
		}
	}
}

const (
	tcpFinPsh = uint8(header.TCPFlagFin | header.TCPFlagPsh)
	tcpAck    = uint8(header.TCPFlagAck)
	ipv4Len   = header.IPv4MinimumSize
	ipv6Len   = header.IPv6MinimumSize
	tcpLen    = header.TCPMinimumSize
	// What the stack takes off the MSS for options that a segment may carry at most: timestamps and SACK blocks, or SACK
	// blocks alone. Most segments carry less, and splitting gives them the room.
	optionsWithTimestamps    = 40
	optionsWithoutTimestamps = 36
	timestampsLen            = 12
)

// splitter turns the stack's packets into packets for the wire. Contiguous segments of one connection are joined first,
// because the stack sends small bursts on each acknowledgement and a short packet at the end of each breaks up
// WireGuard's UDP segmentation batches.
type splitter struct {
	mtu      int
	path     *atomic.Pointer[func(netip.Addr) int] // see [Device.SetPathMTU]
	counters *counters

	waiting []*stack.PacketBuffer // taken from the queue; the run is at the front
	next    int                   // first of waiting that is not part of the run
	bytes   int                   // in waiting
	run     run
	cut     [][]byte // fragments that are to be sent next
	ident   *uint32  // of the last packet of IPv6 that was cut; the device's
}

// run is a series of joined segments that is being sent. Its header is that of the newest segment: an acknowledgement
// and a window only ever move forward, so the newest speak for all.
type run struct {
	active    bool
	hdr       [header.IPv6MinimumSize + header.TCPHeaderMaximumSize]byte
	ip, tcp   int // lengths of the two headers
	mss       uint16
	size      int    // payload bytes of one packet
	flags     uint8  // of the last packet
	seq       uint32 // of the next packet
	left      int    // payload bytes not sent yet
	sent      uint16 // packets sent, for the IPv4 identification
	pseudo    uint16 // sum over the addresses and the protocol
	ipSum     uint16 // sum over an IPv4 header without length, identification and checksum
	cur       int    // index in waiting of the packet that view belongs to
	view      *buffer.View
	viewStart int
}

// most is how many packets one Read gives: what fits into one UDP segmentation batch once WireGuard has added its 32 bytes to
// each and a relay's frame its four; one more, and each batch through a relay would be followed by a single packet. More would make fewer calls, but WireGuard encrypts what one Read gave on one core and sends it when all is done:
// with one batch at a time both cores encrypt, and the network never waits for long (an eighth more throughput on two cores).
func (s *splitter) most() int {
	const batchBytes, overhead = 65445, 32 + 4 // see MaxRun of package udpconn
	return min(batchSize, max(1, batchBytes/(s.mtu+overhead)))
}

// source is where a splitter gets packets from: take appends them, until it has so many bytes.
type source interface {
	take(into []*stack.PacketBuffer, bytes int) []*stack.PacketBuffer
}

// pending is how many bytes have been taken and not been given out.
func (s *splitter) pending() int {
	n := s.bytes
	for _, f := range s.cut {
		n += len(f)
	}
	return n
}

// fill puts packets into bufs until they or the packets run out.
func (s *splitter) fill(q source, bufs [][]byte, sizes []int, offset int) int {
	s.refill(q)
	n := 0
	for n < min(len(bufs), s.most()) {
		if len(s.cut) > 0 {
			sizes[n] = s.fragment(bufs[n][offset:])
			n++
			continue
		}
		if !s.run.active && !s.begin() {
			break
		}
		out := bufs[n][offset:]
		if !s.run.active { // a packet that goes out as it is
			if sizes[n] = s.plain(out); sizes[n] > 0 {
				n++
			}
			continue
		}
		if sizes[n] = s.segment(out); sizes[n] == 0 {
			s.abandon()
			continue
		}
		n++
		if s.run.left == 0 {
			s.finish()
		}
	}
	return n
}

// refill takes from the queue about as much as a batch can carry, so that what waits is bounded by the queue, and joins
// what belongs to the run under way.
func (s *splitter) refill(q source) {
	if want := s.mtu*batchSize - s.bytes; want > 0 {
		had := len(s.waiting)
		s.waiting = q.take(s.waiting, want)
		for _, pkt := range s.waiting[had:] {
			s.bytes += pkt.Size()
		}
	}
	if s.run.active {
		s.extend()
	}
}

// begin starts on the next packet; false says that there is none. It leaves the run inactive where the packet is to go
// out as it is.
func (s *splitter) begin() bool {
	if s.next == len(s.waiting) {
		return false
	}
	pkt := s.waiting[s.next]
	r := &s.run
	if !r.load(pkt) {
		return true
	}
	r.active = true
	r.size = segmentSize(s.mtu, int(r.mss), r.ip, r.tcp)
	r.size = max(1, min(r.size, s.limit(r.hdr[:])-r.ip-r.tcp))
	r.seq = binary.BigEndian.Uint32(r.hdr[r.ip+4:])
	r.left = pkt.Data().Size()
	r.flags = r.hdr[r.ip+header.TCPFlagsOffset]
	r.sent = 0
	r.cur = s.next
	r.view, r.viewStart = payload(pkt)
	s.next++
	s.extend()
	return true
}

// load copies the headers of a TCP packet with unfinished checksums; false for any other packet.
func (r *run) load(pkt *stack.PacketBuffer) bool {
	if pkt.GSOOptions.Type != stack.GSOTCPv4 && pkt.GSOOptions.Type != stack.GSOTCPv6 {
		return false
	}
	ip, tcp := pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice()
	if len(tcp) < tcpLen || len(ip)+len(tcp) > len(r.hdr) || pkt.GSOOptions.MSS == 0 {
		return false
	}
	r.ip, r.tcp, r.mss = len(ip), len(tcp), pkt.GSOOptions.MSS
	copy(r.hdr[:], ip)
	copy(r.hdr[r.ip:], tcp)
	addrs := ip[12:20]
	if ip[0]>>4 == 6 {
		addrs = ip[8:40]
	}
	r.pseudo = checksum.Combine(checksum.Checksum(addrs, 0), uint16(header.TCPProtocolNumber))
	r.ipSum = ipv4Sum(r.hdr[:r.ip])
	return true
}

// segmentSize is how much payload a packet carries. Where the stack's MSS is the MTU's, less its reserve for options,
// packets are filled up to the MTU; where the peer or the path has asked for less, the stack's MSS holds.
func segmentSize(mtu, mss, ip, tcp int) int {
	full := mtu - ip - tcp
	reserve := optionsWithoutTimestamps
	if tcp-tcpLen >= timestampsLen {
		reserve = optionsWithTimestamps
	}
	if mss+reserve == mtu-ip-tcpLen {
		return full
	}
	return min(mss, full)
}

// extend joins packets that continue the run.
func (s *splitter) extend() {
	r := &s.run
	for s.next < len(s.waiting) && r.flags&^tcpFinPsh == tcpAck && r.flags&uint8(header.TCPFlagFin) == 0 && r.left > 0 {
		pkt := s.waiting[s.next]
		if !r.continues(pkt) {
			return
		}
		tcp := pkt.TransportHeader().Slice()
		copy(r.hdr[r.ip:], tcp)
		r.flags |= tcp[header.TCPFlagsOffset]
		r.left += pkt.Data().Size()
		s.next++
		s.counters.joined.Add(1)
	}
}

// continues reports whether pkt is the next segment of the run's connection.
func (r *run) continues(pkt *stack.PacketBuffer) bool {
	if pkt.GSOOptions.Type == stack.GSONone || pkt.GSOOptions.MSS != r.mss || pkt.Data().Size() == 0 {
		return false
	}
	ip, tcp := pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice()
	return len(ip) == r.ip && len(tcp) == r.tcp && sameIP(ip, r.hdr[:]) &&
		[4]byte(tcp) == [4]byte(r.hdr[r.ip:]) && // ports
		binary.BigEndian.Uint32(tcp[4:]) == r.seq+uint32(r.left) &&
		tcp[header.TCPFlagsOffset]&^tcpFinPsh == tcpAck
}

// sameIP compares everything in two IP headers of the same length that merging does not change: all but the length, the
// identification and the checksum. Options are not compared; the callers have none.
func sameIP(a, b []byte) bool {
	if a[0] != b[0] || a[1] != b[1] {
		return false
	}
	if a[0]>>4 == 4 {
		return [4]byte(a[6:10]) == [4]byte(b[6:10]) && [8]byte(a[12:20]) == [8]byte(b[12:20])
	}
	return [2]byte(a[2:4]) == [2]byte(b[2:4]) && [2]byte(a[6:8]) == [2]byte(b[6:8]) && [32]byte(a[8:40]) == [32]byte(b[8:40])
}

// segment writes the run's next packet into out and gives its length; 0 says that it does not fit.
func (s *splitter) segment(out []byte) int {
	r := &s.run
	n := min(r.size, r.left)
	head := r.ip + r.tcp
	total := head + n
	if total > len(out) || n < 0 {
		return 0
	}
	copy(out, r.hdr[:head])
	s.copyPayload(out[head:total])
	r.left -= n

	ip, tcp := out[:r.ip], out[r.ip:total]
	binary.BigEndian.PutUint32(tcp[4:], r.seq)
	flags := r.flags
	if r.left > 0 {
		flags &^= tcpFinPsh
	}
	tcp[header.TCPFlagsOffset] = flags
	finishIP(ip, total, r.sent, r.ipSum)
	binary.BigEndian.PutUint16(tcp[header.TCPChecksumOffset:], 0)
	sum := checksum.Checksum(tcp, checksum.Combine(r.pseudo, uint16(len(tcp))))
	binary.BigEndian.PutUint16(tcp[header.TCPChecksumOffset:], ^sum)
	r.seq += uint32(n)
	r.sent++
	return total
}

// ipv4Sum is the sum over what does not differ between the packets of one run; 0 for IPv6, whose header has no checksum.
func ipv4Sum(ip []byte) uint16 {
	if ip[0]>>4 == 6 {
		return 0
	}
	// All but length and identification (bytes 2 to 5) and the checksum itself (10 and 11).
	return checksum.Combine(checksum.Checksum(ip[:2], 0),
		checksum.Combine(checksum.Checksum(ip[6:10], 0), checksum.Checksum(ip[12:], 0)))
}

// finishIP sets a header's length, and for IPv4 its checksum and, unless fragmentation is forbidden and the field means
// nothing (RFC 6864), the identification of the packet of that index. sum is the header's [ipv4Sum].
func finishIP(ip []byte, total int, index, sum uint16) {
	if ip[0]>>4 == 6 {
		binary.BigEndian.PutUint16(ip[4:], uint16(total-ipv6Len))
		return
	}
	id := binary.BigEndian.Uint16(ip[4:])
	if ip[6]&0x40 == 0 {
		id += index
		binary.BigEndian.PutUint16(ip[4:], id)
	}
	binary.BigEndian.PutUint16(ip[2:], uint16(total))
	binary.BigEndian.PutUint16(ip[10:], ^checksum.Combine(checksum.Combine(sum, uint16(total)), id))
}

// copyPayload takes the run's next bytes, across the views of its packets, and lets go of packets that it has used up.
func (s *splitter) copyPayload(out []byte) {
	r := &s.run
	for len(out) > 0 {
		if r.view == nil {
			s.release(r.cur)
			r.cur++
			r.view, r.viewStart = payload(s.waiting[r.cur])
			continue
		}
		n := copy(out, r.view.AsSlice()[r.viewStart:])
		out = out[n:]
		if r.viewStart += n; r.viewStart == r.view.Size() {
			r.view, r.viewStart = r.view.Next(), 0
		}
	}
}

// payload finds where a packet's payload begins; nil where it has none.
func payload(pkt *stack.PacketBuffer) (*buffer.View, int) {
	views, skip := pkt.AsViewList()
	skip += pkt.Size() - pkt.Data().Size()
	for v := views.Front(); v != nil; v = v.Next() {
		if skip < v.Size() {
			return v, skip
		}
		skip -= v.Size()
	}
	return nil, 0
}

// plain copies a packet that is complete and gives its length; 0 says that it does not fit and is dropped.
func (s *splitter) plain(out []byte) int {
	pkt := s.waiting[s.next]
	n := 0
	if pkt.Size() <= len(out) {
		views, skip := pkt.AsViewList()
		for v := views.Front(); v != nil; v = v.Next() {
			b := v.AsSlice()
			cut := min(skip, len(b))
			skip -= cut
			n += copy(out[n:], b[cut:])
		}
	}
	if n >= ipv4Len {
		if most := s.limit(out); n > most {
			s.cut, n = s.fragments(out[:n], most), 0
		}
	}
	if n == 0 && s.cut == nil {
		s.counters.overflow.Add(1)
	}
	s.release(s.next)
	s.next++
	s.compact()
	return n
}

// finish ends the run.
func (s *splitter) finish() {
	for i := s.run.cur; i < s.next; i++ {
		s.release(i)
	}
	s.run.active, s.run.view = false, nil
	s.compact()
}

// abandon drops what is left of a run that does not fit the buffers.
func (s *splitter) abandon() {
	s.counters.overflow.Add(1)
	s.finish()
}

func (s *splitter) release(i int) {
	pkt := s.waiting[i]
	if pkt == nil {
		return
	}
	s.bytes -= pkt.Size()
	pkt.DecRef()
	s.waiting[i] = nil
}

// compact reclaims the front of waiting once all of it has been used.
func (s *splitter) compact() {
	if s.next == len(s.waiting) {
		s.waiting, s.next = s.waiting[:0], 0
	}
}

// drop lets go of everything.
func (s *splitter) drop() {
	for i := range s.waiting {
		s.release(i)
	}
	s.waiting, s.next, s.bytes, s.cut = nil, 0, 0, nil
	s.run = run{}
}
