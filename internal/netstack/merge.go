package netstack

import (
	"encoding/binary"
	"net/netip"
	"os"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Write hands a batch of packets from WireGuard to the stack. It takes everything: what is malformed or comes from a
// source that the filter does not know is dropped and counted. It is called from many goroutines at once, and the
// buffers are the caller's again when it returns.
func (d *Device) Write(bufs [][]byte, offset int) (int, error) {
	d.writing.RLock()
	defer d.writing.RUnlock()
	if d.closed.Load() {
		return 0, os.ErrClosed
	}
	m := d.mergers.Get().(*merger)
	for rest := bufs; len(rest) > 0; {
		n := min(len(rest), batchSize)
		d.writeBatch(m, rest[:n], offset)
		rest = rest[n:]
	}
	d.mergers.Put(m)
	return len(bufs), nil
}

func (d *Device) writeBatch(m *merger, bufs [][]byte, offset int) {
	filter := d.filter.Load()
	m.watch, m.forward, m.pieces, m.gate = d.watch.Load(), d.opts.Forward, d.pieces, d.gate.Load()
	var became [fates]int
	for _, buf := range bufs {
		p := buf[offset:]
		if len(p) == 0 {
			continue
		}
		if filter != nil && !m.known(p, *filter) {
			became[filtered]++
			continue
		}
		became[m.add(p)]++
	}
	d.counters.written.Add(uint64(len(bufs)))
	d.counters.merged.Add(uint64(m.merged))
	if became[taken] < len(bufs) {
		d.counters.filtered.Add(uint64(became[filtered]))
		d.counters.malformed.Add(uint64(became[malformed]))
		d.counters.uncarried.Add(uint64(became[uncarried]))
		d.counters.gated.Add(uint64(became[gated]))
	}
	m.deliver(&d.inbound)
}

// fate is what becomes of a packet in Write.
type fate int

const (
	taken     fate = iota // by the stack, or by [pieces]
	filtered              // its source is unknown, or it says what that cannot say
	malformed             // it is no packet, or a damaged one
	uncarried             // nobody forwards such packets, see [carried]
	gated                 // over what its source may send to the gateway itself
	fates
)

// merger makes large packets of a batch: contiguous TCP segments of a connection become one, copied once into one
// buffer, which spares the stack most of its work per packet (generic receive offload). A merger serves one Write at a
// time.
type merger struct {
	parts  [batchSize]part
	n      int
	merged int
	groups [batchSize]group
	count  int

	watch   *Watch
	forward bool
	pieces  *pieces                         // where it forwards
	gate    *func(src, dst netip.Addr) bool // where it forwards; may be nil

	last  netip.Addr // the source that known was asked about last
	keep  bool
	valid bool
}

// part is one packet of the batch.
type part struct {
	packet []byte // as long as its IP header says
	head   int    // IP and TCP header, in bytes
	next   int    // the part that follows in its group; 0 for none
}

// group is what becomes one packet for the stack.
type group struct {
	first, last int // parts
	ip          int // length of the IP header
	size        int // of the merged packet
	end         uint32
	open        bool // takes more
	checked     bool // its checksums are right
}

// openGroups bounds how far back a segment looks for its connection: connections that a batch interleaves.
const openGroups = 8

func newMerger() *merger { return new(merger) }

// known asks the filter about a packet's source, once for packets in a row from the same one.
func (m *merger) known(p []byte, filter func(netip.Addr) bool) bool {
	var src netip.Addr
	switch {
	case p[0]>>4 == 4 && len(p) >= ipv4Len:
		src = netip.AddrFrom4([4]byte(p[12:16]))
	case p[0]>>4 == 6 && len(p) >= ipv6Len:
		src = netip.AddrFrom16([16]byte(p[8:24]))
	default:
		return true // add finds it malformed
	}
	if !m.valid || src != m.last {
		m.last, m.keep, m.valid = src, filter(src), true
	}
	return m.keep
}

// add takes a packet into the batch and says what becomes of it.
func (m *merger) add(p []byte) fate {
	p, ip, tcp, ok := parse(p)
	if !ok {
		return malformed
	}
	if tcp {
		return m.addTCP(p, ip)
	}
	if m.forward {
		return m.addOther(p, ip)
	}
	m.push(p, ip, 0, false)
	return taken
}

// addOther takes a packet of a session that is no plain TCP segment: it is put together first where it comes in fragments.
func (m *merger) addOther(p []byte, ip int) fate {
	if hasOptions(p, ip) {
		return uncarried // before it is put together with others, whose headers may be shorter
	}
	tcp := false
	switch f, is, ok := readFragment(p, ip); {
	case !ok:
		return malformed
	case is:
		if p = m.pieces.add(f); p == nil {
			return taken
		}
		if p, ip, tcp, ok = parse(p); !ok {
			return malformed
		}
	}
	if what := m.admits(p, ip); what != taken {
		return what
	}
	if tcp {
		return m.addTCP(p, ip)
	}
	markFragmentable(p, ip)
	m.push(p, ip, 0, false)
	return taken
}

// admits holds a whole packet of a session against what a gateway takes.
func (m *merger) admits(p []byte, ip int) fate {
	switch {
	case !carried(p, ip):
		return uncarried
	case forgedError(p):
		return filtered
	case upper(p) == uint8(header.UDPProtocolNumber) && len(p) >= ip+header.UDPMinimumSize && !m.passes(p, ip):
		return gated
	}
	return taken
}

// passes asks the gate about a datagram, or a TCP connection's first segment.
func (m *merger) passes(p []byte, ip int) bool {
	if m.gate == nil {
		return true
	}
	src, dst := tuple(p, p[ip:])
	return (*m.gate)(src.Addr(), dst.Addr())
}

// parse checks a packet's header and cuts the packet to its length.
func parse(p []byte) (packet []byte, ip int, tcp, ok bool) {
	switch p[0] >> 4 {
	case 4:
		return parseIPv4(p)
	case 6:
		return parseIPv6(p)
	}
	return nil, 0, false, false
}

// parseIPv4 checks an IPv4 header (RFC 791) and cuts the packet to its length. tcp is only said of packets that can be
// merged: no options, no fragments.
func parseIPv4(p []byte) (packet []byte, ip int, tcp, ok bool) {
	if len(p) < ipv4Len {
		return nil, 0, false, false
	}
	ip = int(p[0]&0xf) * 4
	total := int(binary.BigEndian.Uint16(p[2:]))
	if ip < ipv4Len || total < ip || total > len(p) || checksum.Checksum(p[:ip], 0) != 0xffff {
		return nil, 0, false, false
	}
	fragment := binary.BigEndian.Uint16(p[6:])&0x3fff != 0
	tcp = p[9] == uint8(header.TCPProtocolNumber) && ip == ipv4Len && !fragment
	return p[:total], ip, tcp, true
}

// parseIPv6 does the same for IPv6 (RFC 8200). Packets with extension headers are not merged.
func parseIPv6(p []byte) (packet []byte, ip int, tcp, ok bool) {
	if len(p) < ipv6Len {
		return nil, 0, false, false
	}
	total := ipv6Len + int(binary.BigEndian.Uint16(p[4:]))
	if total > len(p) {
		return nil, 0, false, false
	}
	return p[:total], ipv6Len, p[6] == uint8(header.TCPProtocolNumber), true
}

// addTCP checks a segment and appends it to its connection's group where it continues it.
func (m *merger) addTCP(p []byte, ip int) fate {
	if len(p) < ip+tcpLen {
		return malformed
	}
	seg := p[ip:]
	head := ip + int(seg[header.TCPDataOffset]>>4)*4
	if head < ip+tcpLen || head > len(p) || !tcpChecksumValid(p, ip) {
		return malformed
	}
	flags := seg[header.TCPFlagsOffset]
	if header.TCPFlags(flags)&(header.TCPFlagSyn|header.TCPFlagAck) == header.TCPFlagSyn {
		if m.forward && !m.passes(p, ip) {
			return gated
		}
		if m.watch != nil {
			m.watch.asked(p, ip)
		}
	}
	data := len(p) > head && flags&^tcpFinPsh == tcpAck
	g := m.find(p, ip)
	if data && g != nil && m.fits(g, p, head) {
		m.append(g, p, head, flags)
		return taken
	}
	if g != nil {
		g.open = false // the order within a connection stays
	}
	g = m.push(p, ip, head, true)
	g.open = data && flags&tcpFinPsh == 0
	g.end = binary.BigEndian.Uint32(seg[4:]) + uint32(len(p)-head)
	return taken
}

// tcpChecksumValid verifies a segment's checksum with its pseudo-header (RFC 9293, section 3.1).
func tcpChecksumValid(p []byte, ip int) bool {
	addrs := p[12:20]
	if ip == ipv6Len {
		addrs = p[8:40]
	}
	sum := checksum.Checksum(addrs, uint16(header.TCPProtocolNumber))
	sum = checksum.Combine(sum, uint16(len(p)-ip))
	return checksum.Checksum(p[ip:], sum) == 0xffff
}

// find gives the open group of p's connection.
func (m *merger) find(p []byte, ip int) *group {
	for i := m.count - 1; i >= 0 && i >= m.count-openGroups; i-- {
		g := &m.groups[i]
		if !g.open || g.ip != ip {
			continue
		}
		q := m.parts[g.first].packet
		if [4]byte(p[ip:]) == [4]byte(q[ip:]) && sameAddresses(p, q, ip) {
			return g
		}
	}
	return nil
}

func sameAddresses(p, q []byte, ip int) bool {
	if ip == ipv4Len {
		return [8]byte(p[12:20]) == [8]byte(q[12:20])
	}
	return [32]byte(p[8:40]) == [32]byte(q[8:40])
}

// fits reports whether p continues g: the next sequence number, and headers that differ in nothing that the stack would
// have to see packet by packet.
func (m *merger) fits(g *group, p []byte, head int) bool {
	q := m.parts[g.first]
	if head != q.head || g.size+len(p)-head > gsoMax || !sameIP(p, q.packet) {
		return false
	}
	a, b := p[g.ip:head], q.packet[g.ip:head]
	return binary.BigEndian.Uint32(a[4:]) == g.end &&
		[4]byte(a[8:12]) == [4]byte(b[8:12]) && // acknowledgement
		string(a[tcpLen:]) == string(b[tcpLen:]) // options
}

func (m *merger) push(p []byte, ip, head int, checked bool) *group {
	m.parts[m.n] = part{packet: p, head: head}
	g := &m.groups[m.count]
	*g = group{first: m.n, last: m.n, ip: ip, size: len(p), checked: checked}
	m.n++
	m.count++
	return g
}

func (m *merger) append(g *group, p []byte, head int, flags uint8) {
	m.parts[m.n] = part{packet: p, head: head}
	m.parts[g.last].next = m.n
	g.last = m.n
	m.n++
	m.merged++
	g.size += len(p) - head
	g.end += uint32(len(p) - head)
	g.open = flags&tcpFinPsh == 0
}

// deliver hands the groups to the stack, in the order in which they began, and empties the batch.
func (m *merger) deliver(inbound *[2]stack.NetworkEndpoint) {
	for i := range m.count {
		g := &m.groups[i]
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: m.assemble(g)})
		pkt.RXChecksumValidated = g.checked
		ep := inbound[0]
		pkt.NetworkProtocolNumber = ipv4.ProtocolNumber
		if m.parts[g.first].packet[0]>>4 == 6 {
			ep = inbound[1]
			pkt.NetworkProtocolNumber = ipv6.ProtocolNumber
		}
		ep.HandlePacket(pkt)
		pkt.DecRef()
	}
	for i := range m.n {
		m.parts[i] = part{} // the buffers are the caller's
	}
	m.n, m.count, m.merged, m.valid = 0, 0, 0, false
}

// assemble copies a group into a buffer of the stack's. A TCP segment's headers get a view of their own: the stack holds
// on to them while it parses, and a view whose chunk is shared is copied, all 64 KiB of it, when it is parsed further.
func (m *merger) assemble(g *group) buffer.Buffer {
	first := &m.parts[g.first]
	if first.head == 0 {
		return buffer.MakeWithData(first.packet)
	}
	head := buffer.NewViewWithData(first.packet[:first.head])
	if g.first != g.last {
		m.patch(g, head.AsSlice())
	}
	packet := buffer.MakeWithView(head)
	if g.size == first.head {
		return packet
	}
	v := buffer.NewView(g.size - first.head)
	_, _ = v.Write(first.packet[first.head:]) // a view grows; it never fails
	for i := first.next; i != 0; i = m.parts[i].next {
		_, _ = v.Write(m.parts[i].packet[m.parts[i].head:])
	}
	payload := buffer.MakeWithView(v)
	packet.Merge(&payload) // Append would copy into the room behind the headers
	return packet
}

// patch makes the first packet's headers those of the merged one: the length, the window of the last segment, and its
// PSH and FIN. The TCP checksum is left stale; the packet is marked as checked.
func (m *merger) patch(g *group, p []byte) {
	finishIP(p[:g.ip], g.size, 0, ipv4Sum(p[:g.ip]))
	last := m.parts[g.last].packet[g.ip:]
	tcp := p[g.ip:]
	tcp[header.TCPFlagsOffset] |= last[header.TCPFlagsOffset]
	copy(tcp[header.TCPWinSizeOffset:header.TCPWinSizeOffset+2], last[header.TCPWinSizeOffset:])
}

// Inject sends a complete IP packet towards WireGuard as if the stack had sent it: what the stack has no call for. What is longer
// than the MTU goes out in fragments.
func (d *Device) Inject(packet []byte) error {
	if len(packet) > gsoMax {
		return &tooLongError{len(packet), gsoMax}
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
	if !d.link.out.push(pkt) {
		pkt.DecRef()
		return tcpipError{&tcpip.ErrNoBufferSpace{}}
	}
	return nil
}
