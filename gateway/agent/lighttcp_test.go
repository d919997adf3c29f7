//go:build linux

package agent

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

const (
	lightMTU     = 1420
	lightHeaders = 20 + 32 // IPv4, TCP with timestamps
	lightSegment = lightMTU - lightHeaders
	lightRun     = 45       // packets that are sent at a time, as a batch of WireGuard's
	lightScale   = 7        // of the window that it promises
	lightWindow  = 4 << 20  // which is always so large
	lightMost    = 1 << 20  // on its way at most
	lightFirst   = 64 << 10 // and at first
	lightLate    = 4        // ticks without news after which it sends again
	lightPort    = 40000
)

// TCP's flags.
const (
	lightSyn = 2
	lightAck = 16
)

// lightTCP is one connection of a light client: a sender of zeros with slow start and go-back-n, a receiver that takes what comes in
// order. It acknowledges once for each run that comes.
type lightTCP struct {
	src     netip.Addr
	service netip.AddrPort
	head    []byte
	sends   bool
	state   int // 0 before, 1 asked, 2 open

	first, acked, next uint32 // of what is sent
	sent               uint32 // the most that next has been
	room, scale        uint32 // what the other side promises
	most, calm         uint32 // what may be on its way, and up to where that doubles
	repeats            int    // acknowledgements that say nothing new
	silent             int    // ticks without news

	expected uint32 // of what is received
	echo     uint32 // the other side's timestamp
	owes     int    // acknowledgements
	packet   [lightMTU]byte
}

func (t *lightTCP) begin(c *light, service netip.AddrPort, head []byte, sends bool) {
	t.service, t.head, t.sends, t.state = service, head, sends, 1
	t.first = uint32(c.index) << 8
	t.acked, t.next, t.sent = t.first, t.first+1, t.first+1
	t.most, t.calm = lightFirst, lightMost
	t.syn(c)
}

func (t *lightTCP) syn(c *light) {
	options := []byte{2, 4, 0, 0, 4, 2, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 3, lightScale}
	binary.BigEndian.PutUint16(options[2:], lightMTU-40)
	options[4], options[5] = 1, 1 // no selective acknowledgements
	binary.BigEndian.PutUint32(options[8:], c.all.clock)
	c.seal(t.build(t.first, lightSyn, options, 0))
}

// build makes a packet with so many zeros, or the head.
func (t *lightTCP) build(seq uint32, flags byte, options []byte, payload int) []byte {
	header := 20 + 20 + len(options)
	size := header + payload
	b := t.packet[:size]
	src, dst := t.src.As4(), t.service.Addr().As4()
	b[0], b[1], b[8], b[9] = 0x45, 0, 64, 6
	binary.BigEndian.PutUint16(b[2:], uint16(size))
	clear(b[4:8])
	b[10], b[11] = 0, 0
	copy(b[12:], src[:])
	copy(b[16:], dst[:])
	binary.BigEndian.PutUint16(b[10:], ^checksum.Checksum(b[:20], 0))
	p := b[20:]
	binary.BigEndian.PutUint16(p, lightPort)
	binary.BigEndian.PutUint16(p[2:], t.service.Port())
	binary.BigEndian.PutUint32(p[4:], seq)
	binary.BigEndian.PutUint32(p[8:], t.expected)
	if flags&lightAck == 0 {
		clear(p[8:12])
	}
	p[12], p[13] = byte((20+len(options))/4)<<4, flags
	window := lightWindow >> lightScale
	if flags&lightSyn != 0 {
		window = 65535
	}
	binary.BigEndian.PutUint16(p[14:], uint16(window))
	clear(p[16:20])
	copy(p[20:], options)
	clear(b[header:])
	sum := uint16(0)
	if payload > 0 && seq == t.first+1 {
		copy(b[header:], t.head)
		sum = checksum.Checksum(b[header:], 0)
	}
	sum = checksum.Checksum(b[12:20], sum) // zeros add nothing
	sum = checksum.Combine(sum, 6)
	sum = checksum.Combine(sum, uint16(size-20))
	binary.BigEndian.PutUint16(p[16:], ^checksum.Checksum(b[20:header], sum))
	return b
}

// stamps are the options of every packet but the first.
func (t *lightTCP) stamps(c *light) []byte {
	options := [12]byte{1, 1, 8, 10}
	binary.BigEndian.PutUint32(options[4:], c.all.clock)
	binary.BigEndian.PutUint32(options[8:], t.echo)
	return options[:]
}

// take gets a packet from the tunnel.
func (t *lightTCP) take(c *light, ip []byte) {
	if len(ip) < 40 || ip[0]>>4 != 4 || ip[9] != 6 || t.state == 0 {
		return
	}
	header, total := int(ip[0]&15)*4, int(binary.BigEndian.Uint16(ip[2:]))
	if total > len(ip) || header+20 > total {
		return
	}
	p := ip[header:total]
	data := int(p[12]>>4) * 4
	if data < 20 || data > len(p) {
		return
	}
	seq, ack, flags := binary.BigEndian.Uint32(p[4:]), binary.BigEndian.Uint32(p[8:]), p[13]
	t.options(p[20:data], flags)
	t.acknowledged(ack, uint32(binary.BigEndian.Uint16(p[14:])), flags, len(p) == data)
	if flags&lightSyn != 0 {
		if t.state == 1 {
			t.state, t.expected = 2, seq+1
			close(c.opened)
		}
		t.owes = 1
	}
	if n := len(p) - data; n > 0 {
		switch {
		case seq == t.expected:
			t.expected += uint32(n)
			t.owes = max(t.owes, 1)
			c.all.count(c.index, int64(n))
		default:
			t.owes = max(1, min(t.owes+1, 4))
		}
	}
}

// options reads the other side's timestamp, and its window's scale.
func (t *lightTCP) options(o []byte, flags byte) {
	for len(o) > 1 && o[0] != 0 {
		if o[0] == 1 {
			o = o[1:]
			continue
		}
		n := int(o[1])
		if n < 2 || n > len(o) {
			return
		}
		switch {
		case o[0] == 8 && n == 10:
			t.echo = binary.BigEndian.Uint32(o[2:])
		case o[0] == 3 && n == 3 && flags&lightSyn != 0:
			t.scale = uint32(o[2])
		}
		o = o[n:]
	}
}

// acknowledged notes what the other side has and how much more it takes.
func (t *lightTCP) acknowledged(ack, window uint32, flags byte, bare bool) {
	if flags&lightAck == 0 {
		return
	}
	if flags&lightSyn == 0 {
		window <<= t.scale
	}
	news := int32(ack - t.acked)
	switch {
	case news > 0 && int32(ack-t.sent) <= 0:
		t.acked, t.repeats, t.silent = ack, 0, 0
		if int32(ack-t.next) > 0 {
			t.next = ack
		}
		if t.most < t.calm {
			t.most = min(t.most+uint32(news), lightMost)
		} else {
			t.most = min(t.most+max(lightSegment*uint32(news)/t.most, 1), lightMost)
		}
	case news == 0 && bare && window == t.room && t.next != t.acked:
		if t.repeats++; t.repeats == 3 {
			t.back()
		}
	}
	if news >= 0 {
		t.room = window
	}
}

// back has everything sent again that was not acknowledged, at half of the speed.
func (t *lightTCP) back() {
	t.calm = max((t.next-t.acked)/2, lightFirst)
	t.most, t.next = t.calm, t.acked
}

// late is told of time that has passed.
func (t *lightTCP) late(c *light) {
	switch {
	case t.state == 0 || t.state == 2 && t.next == t.acked && !t.sends:
		return
	case t.silent < lightLate:
		t.silent++
		return
	}
	t.silent = 0
	if t.state == 1 {
		t.syn(c)
		return
	}
	if t.room < lightSegment && t.next == t.acked { // the window may have opened without our having heard of it
		c.seal(t.build(t.acked-1, lightAck, t.stamps(c), 0))
		return
	}
	t.back()
	t.respond(c)
}

// respond sends what may be sent, and acknowledges what has come.
func (t *lightTCP) respond(c *light) {
	if t.state != 2 {
		return
	}
	at, n := 0, 0
	for t.state == 2 && (n > 0 || t.worth()) {
		size := t.size()
		if size == 0 || size < lightSegment && n > 0 {
			break
		}
		at = c.put(at, t.build(t.next, lightAck, t.stamps(c), size))
		if t.next += uint32(size); int32(t.next-t.sent) > 0 {
			t.sent = t.next
		}
		t.owes = 0
		if n++; n == lightRun || size < lightSegment {
			c.emit(c.all.run[:at], at/n)
			at, n = 0, 0
		}
	}
	if n > 0 {
		c.emit(c.all.run[:at], at/n)
	}
	for ; t.owes > 0; t.owes-- {
		c.seal(t.build(t.next, lightAck, t.stamps(c), 0))
	}
}

// worth reports that enough may be sent for a batch, or a third of what may be on its way, as Linux waits for (tcp_tso_should_defer).
func (t *lightTCP) worth() bool {
	most, flying := min(t.room, t.most), t.next-t.acked
	return flying == 0 || t.next == t.first+1 || flying < most && most-flying >= min(lightRun*lightSegment, most/3)
}

// size is how many bytes may go next: the head, or a full segment.
func (t *lightTCP) size() int {
	if t.next == t.first+1 {
		return len(t.head)
	}
	if !t.sends || t.next-t.acked+lightSegment > min(t.room, t.most) {
		return 0
	}
	return lightSegment
}
