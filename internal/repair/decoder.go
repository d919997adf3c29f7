package repair

// Bounds of what a decoder keeps and waits for, in packets.
const (
	ring     = 32   // packets that are kept, for what a parity covers and for what waits
	holdSpan = 20   // packets after a gap that wait at most: three groups and what is between them
	quiet    = 40   // packets without any parity after which nothing is waited for
	astray   = 16   // packets in a row that are far from the others, after which these are where it goes on
	far      = 1024 // and this is far
)

// slot holds one packet.
type slot struct {
	counter uint64
	len     int  // 0 where nothing is held
	waits   bool // has not been given to the device
	buf     [MaxPacket]byte
}

// Decoder rebuilds packets of one peer that are missing, and gives the others in order of their counters: what follows a gap waits
// until the gap is filled or cannot be any more. It copies packets and allocates nothing after it was made. It is not safe for concurrent use.
type Decoder struct {
	index   uint32
	begun   bool
	next    uint64 // nothing below waits to be given, except late
	until   uint64 // gaps below are not waited for
	top     uint64 // above every packet that is held
	silence int    // packets since the last parity
	strays  int    // packets in a row that were far off
	late    *slot  // a rebuilt packet that comes after its gap was given up
	slots   [ring]slot
	acc     [MaxPacket]byte

	// Rebuilt counts packets that were rebuilt.
	Rebuilt uint64
}

// NewDecoder gives a decoder. It begins with the first parity.
func NewDecoder() *Decoder { return &Decoder{} }

// Packet takes a transport message. now says whether the device shall see it now; else it is kept, or known. more says that
// [Decoder.Pop] has packets to give.
func (d *Decoder) Packet(pkt []byte) (now, more bool) {
	if !d.begun || len(pkt) > MaxPacket {
		return true, false
	}
	c := counter(pkt)
	if index(pkt) != d.index || c > d.next+far || c+far < d.next {
		return true, d.stray(index(pkt), c+1)
	}
	d.strays = 0
	d.silence++
	switch s := d.slot(c); {
	case c < d.next: // given up before, or there twice
		if c+ring > d.top && !s.waits {
			d.keep(s, c, pkt, false)
		}
		return true, false
	case d.has(c):
		return false, d.ready() // it waits already
	case s.waits:
		d.until = max(d.until, c) // there is no room to wait
		return true, d.ready()
	case c == d.next && c >= d.until:
		d.keep(s, c, pkt, false)
		d.next++
		return true, d.ready()
	default:
		d.keep(s, c, pkt, true)
		if d.silence > quiet {
			d.until = max(d.until, c)
		} else if c-d.next >= holdSpan {
			d.until = max(d.until, c-holdSpan+1)
		}
		return false, d.ready()
	}
}

// Parity takes a parity packet. more says that [Decoder.Pop] has packets to give.
func (d *Decoder) Parity(pkt []byte) (more bool) {
	c, ok := read(pkt)
	if !ok {
		return false
	}
	if !d.begun {
		d.restart(index(pkt), c.end)
		return false
	}
	if index(pkt) != d.index || c.base > d.next+far || c.end+far < d.next {
		return d.stray(index(pkt), c.end)
	}
	d.strays, d.silence = 0, 0
	d.until = max(d.until, c.base) // what was to cover the packets before was lost
	missing, gaps := uint64(0), 0
	for at := c.base; at < c.end; at++ {
		if !d.has(at) {
			missing = at
			gaps++
		}
	}
	if gaps == 1 && d.rebuild(pkt, c, missing) {
		return d.ready()
	}
	d.until = max(d.until, c.end)
	return d.ready()
}

// rebuild makes the only packet of a group that is missing.
func (d *Decoder) rebuild(pkt []byte, c coverage, missing uint64) bool {
	s := d.slot(missing)
	if s.waits || missing+ring <= d.top || missing < d.next && d.late != nil {
		return false
	}
	acc := d.acc[:len(pkt)]
	copy(acc, pkt)
	length := int(c.lengths)
	for at := c.base; at < c.end; at++ {
		if at == missing {
			continue
		}
		have := d.slot(at)
		if have.len > len(acc) {
			return false // no parity of this packet
		}
		mix(acc, have.buf[:have.len])
		length ^= have.len
	}
	if length < minPacket || length > len(acc) {
		return false
	}
	for _, b := range acc[length:] {
		if b != 0 {
			return false
		}
	}
	putTransport(acc, d.index, missing)
	d.keep(s, missing, acc[:length], true)
	if missing < d.next {
		d.late = s
	}
	d.Rebuilt++
	return true
}

// Pop copies the next packet that the device shall see into buf and gives its length; 0 where there is none. A packet that buf has no room
// for is dropped.
func (d *Decoder) Pop(buf []byte) int {
	for {
		s := d.late
		d.late = nil
		if s == nil {
			if s = d.advance(); s == nil {
				return 0
			}
		}
		if s.waits = false; s.len <= len(buf) {
			return copy(buf, s.buf[:s.len])
		}
	}
}

// advance gives the next packet that waits and need not any more.
func (d *Decoder) advance() *slot {
	for d.next < d.until || d.has(d.next) {
		if d.next >= d.top && d.until > d.top {
			d.next = d.until
			return nil
		}
		s := d.slot(d.next)
		held := d.has(d.next) && s.waits
		d.next++
		if held {
			return s
		}
	}
	return nil
}

// Waiting gives the gap that packets wait for.
func (d *Decoder) Waiting() (gap uint64, waiting bool) { return d.next, d.next < d.top && !d.ready() }

// GiveUp ends the wait for everything that is missing. more says that [Decoder.Pop] has packets to give.
func (d *Decoder) GiveUp() (more bool) {
	d.until = max(d.until, d.top)
	return d.ready()
}

// stray takes note of a packet that is far from the others or of another key; after a while it goes on there.
func (d *Decoder) stray(idx uint32, next uint64) (more bool) {
	if d.strays++; d.strays < astray {
		return false
	}
	if _, waiting := d.Waiting(); waiting || d.ready() {
		return d.GiveUp() // first what has waited
	}
	d.restart(idx, next)
	return false
}

// restart forgets everything.
func (d *Decoder) restart(idx uint32, next uint64) {
	for i := range d.slots {
		d.slots[i].len, d.slots[i].waits = 0, false
	}
	d.index, d.begun, d.late = idx, true, nil
	d.next, d.until, d.top = next, next, next
	d.silence, d.strays = 0, 0
}

// ready reports whether Pop has something to give.
func (d *Decoder) ready() bool {
	return d.late != nil || d.next < d.top && (d.next < d.until || d.has(d.next))
}

func (d *Decoder) slot(c uint64) *slot { return &d.slots[c%ring] }

// has reports whether the packet with this counter is held.
func (d *Decoder) has(c uint64) bool {
	s := d.slot(c)
	return s.len > 0 && s.counter == c
}

func (d *Decoder) keep(s *slot, c uint64, pkt []byte, waits bool) {
	s.counter, s.len, s.waits = c, copy(s.buf[:], pkt), waits
	d.top = max(d.top, c+1)
}
