package tunnel

import (
	"encoding/binary"
	"errors"
	"net"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/repair"
	"github.com/culvertnet/culvert/internal/udpconn"
)

// reads is how many datagrams one system call takes at most, each a run of up to 64 packets.
const reads = 8

// arrivals are what one read has brought, packet by packet. A packet is valid until the next read.
type arrivals interface {
	// next gives the next packet and where it comes from; false when there are no more.
	next() (packet []byte, from *route, ok bool)
}

// inbox hands packets to the device: WireGuard packets from validated paths. STUN is handled on the way, all else is dropped. One goroutine
// uses it.
type inbox struct {
	*bind
	last  *path // packets come in runs from one spot
	timer *time.Timer
	run   repair.Run // of packets that are not yet in the tally …
	runOf *Peer      // … of this peer
	// release has packets for the device that have waited, if it is not nil.
	release *mender

	turns   *turns   // nil where packets go to the device as they come
	of      *Peer    // whom the last packet came from: it may have …
	granted int      // so many more past its queue …
	entered []uint64 // and has had these that are not in the sums yet, by their keys

	keys []uint64 // what the device gets that will come out at the TUN, if all goes well
}

// fill copies packets out until there are no more, or no room. It gives how many the device gets, and whether there may be more.
func (in *inbox) fill(a arrivals, bufs [][]byte, sizes []int, eps []conn.Endpoint) (n int, more bool) {
	if l, ok := a.(*letter); ok {
		return l.fill(bufs, sizes, eps), false
	}
	in.keys = in.keys[:0]
	defer func() {
		in.tally()
		in.in.enter(in.keys)
		in.account(nil)
	}()
	for n < len(bufs) {
		if m := in.release; m != nil {
			if sizes[n] = m.pop(bufs[n]); sizes[n] == 0 {
				in.release = nil
				continue
			}
			eps[n] = m.peer
			if isData(bufs[n][:sizes[n]]) {
				key := flightKey(bufs[n])
				if in.turns != nil {
					in.turns.entered(m.peer, key)
				}
				in.keys = append(in.keys, key)
			}
			n++
			continue
		}
		packet, from, ok := a.next()
		if !ok {
			return n, false
		}
		if in.last == nil || in.last.spot != from.spot || in.last.gone.Load() {
			in.last = in.table.lookup(from.spot)
		}
		p, packet := in.accept(packet, in.last, from)
		if p == nil || len(packet) > len(bufs[n]) || !in.mended(p, packet) || in.queued(p, packet) {
			continue
		}
		sizes[n], eps[n] = copy(bufs[n], packet), p
		if isData(packet) {
			in.keys = append(in.keys, flightKey(packet))
		}
		n++
	}
	return n, true
}

// isData tells a packet that will come out at the TUN, if all goes well, from all else.
func isData(packet []byte) bool {
	return len(packet) > device.MessageKeepaliveSize && messageType(packet) == device.MessageTransportType
}

// queued reports that a packet waits for its peer's turn, or was dropped.
func (in *inbox) queued(p *Peer, packet []byte) bool {
	if in.turns == nil || messageType(packet) != device.MessageTransportType {
		return false
	}
	if p != in.of || in.granted == 0 && len(in.entered) > 0 {
		in.account(p)
		in.granted = in.turns.grant(p)
	}
	if in.granted == 0 {
		in.turns.put(p, packet)
		return true
	}
	if in.granted--; isData(packet) {
		in.entered = append(in.entered, flightKey(packet))
	} else if len(in.entered) == 0 {
		in.of = nil // ask again
	}
	return false
}

// account puts what has gone to the device past the queues into the sums; next is whose packets come now.
func (in *inbox) account(next *Peer) {
	if len(in.entered) > 0 {
		in.turns.entered(in.of, in.entered...)
	}
	in.of, in.granted, in.entered = next, 0, in.entered[:0]
}

// mended counts a packet of a peer, and reports whether the device shall see it now: it may be a parity, or wait for what is missing.
func (in *inbox) mended(p *Peer, packet []byte) bool {
	switch {
	case repair.IsTransport(packet):
		if p != in.runOf || !in.run.Add(packet) {
			in.tally()
			in.runOf = p
			in.run.Add(packet)
		}
		m := p.mender.Load()
		if m == nil {
			return true
		}
		now, more := m.packet(packet)
		if more {
			in.release = m
		}
		return now
	case repair.IsParity(packet):
		if m := p.mend(); m != nil && m.parity(packet) {
			in.release = m
		}
		return false
	}
	return true
}

// tally counts the run that has ended.
func (in *inbox) tally() {
	if in.run.N > 0 {
		in.runOf.tally.note(in.run)
		in.run.N = 0
	}
}

// accept judges one packet from a spot, whose path is p if an authentic check has ever come from there. It gives
// what the device shall see, and of which peer; nil for nothing.
func (b *bind) accept(pkt []byte, p *path, from *route) (*Peer, []byte) {
	switch {
	case isWireGuard(pkt):
		if p == nil {
			b.counts.stranger.Add(1)
			return nil, nil
		}
		return p.peer.accept(p, pkt)
	case nat.IsSTUN(pkt):
		origin := *from
		return b.stun(pkt, &origin)
	case p != nil && p.open.Load() && repair.IsParity(pkt):
		return p.peer, pkt
	}
	b.counts.junk.Add(1)
	return nil, nil
}

// datagrams are the arrivals of a socket.
type datagrams struct {
	batch *udpconn.Batch
	via   door // where the socket belongs to one peer

	i    int    // the datagram after the one that rest belongs to
	rest []byte // packets of it that have not been given
	size int    // of each
	from route
}

// reset starts over after a read.
func (d *datagrams) reset() { d.i, d.rest = 0, nil }

// next takes the header off a frame.
func (d *datagrams) next() ([]byte, *route, bool) {
	for len(d.rest) == 0 {
		if d.i >= d.batch.Len() {
			return nil, nil, false
		}
		one := d.batch.Datagram(d.i)
		d.i++
		d.rest, d.size = one.Data, one.Segment
		d.from = route{spot: spot{via: d.via, remote: one.From}, local: one.Local}
	}
	n := min(d.size, len(d.rest))
	packet := d.rest[:n:n]
	d.rest = d.rest[n:]
	d.from.header = 0
	if relay.IsFrame(packet) {
		d.from.header = binary.BigEndian.Uint32(packet)
		packet = packet[relay.FrameHeader:]
	}
	return packet, &d.from, true
}

// readPause is how long a socket is left alone after an error.
const readPause = 10 * time.Millisecond

// receive gives the function by which the device receives from a socket.
func (b *bind) receive(c *udpconn.Conn) conn.ReceiveFunc {
	in := &inbox{bind: b, timer: stoppedTimer(), turns: b.turns}
	d := &datagrams{batch: c.NewBatch(reads)}
	more := false
	return func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (n int, err error) {
		for n == 0 {
			if !more {
				b.in.wait(in.timer)
				read := d.batch.Read
				if in.crowded() {
					read = d.batch.Poll
				}
				if err := read(); errors.Is(err, net.ErrClosed) {
					return 0, net.ErrClosed
				} else if err != nil {
					time.Sleep(readPause) // the next one may succeed; an error would end the device
					continue
				}
				d.reset()
			}
			n, more = in.deliver(d, bufs, sizes, eps)
		}
		return n, nil
	}
}

// crowded reports that packets wait for their turns.
func (in *inbox) crowded() bool { return in.turns != nil && in.turns.crowded.Load() }

// straightMost is how many packets go to the device past those that wait for their turns, in each round: what is no data does.
const straightMost = 16

// deliver gives the device what has come in and, where packets wait for their turns, some of these as well: whoever sends one handshake
// after the other must not keep them waiting. It waits a little where the device takes nothing. more is as in fill.
func (in *inbox) deliver(a arrivals, bufs [][]byte, sizes []int, eps []conn.Endpoint) (n int, more bool) {
	most := len(bufs)
	if in.crowded() {
		most = min(most, straightMost)
	}
	n, more = in.fill(a, bufs[:most], sizes, eps)
	if !in.crowded() {
		return n, more
	}
	taken := in.turns.take(bufs[n:], sizes[n:], eps[n:])
	if n+taken == 0 {
		in.turns.await(in.timer)
	}
	return n + taken, more
}

// sideEntrance is how packets that come in through doors get to the device: one more function that it receives from. Whoever reads
// from a door hands over what has come and waits until it is copied out.
type sideEntrance struct {
	parcels chan *parcel

	mu     sync.Mutex
	closed chan struct{} // of this opening; nil while closed
}

// parcel is what one read from a door has brought.
type parcel struct {
	arrivals
	release *mender       // or packets that have waited
	done    chan struct{} // has a token when all is copied
}

func newParcel(a arrivals) *parcel { return &parcel{arrivals: a, done: make(chan struct{}, 1)} }

func newSideEntrance() *sideEntrance { return &sideEntrance{parcels: make(chan *parcel)} }

// open gives the function for the device to receive from.
func (s *sideEntrance) open(b *bind) conn.ReceiveFunc {
	s.mu.Lock()
	s.closed = make(chan struct{})
	closed := s.closed
	s.mu.Unlock()
	in := &inbox{bind: b, timer: stoppedTimer()}
	var now *parcel
	return func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (n int, err error) {
		for n == 0 {
			if now == nil {
				select {
				case now = <-s.parcels:
				case <-closed:
					return 0, net.ErrClosed
				}
				b.in.wait(in.timer)
				if now.release != nil {
					in.release = now.release
				}
			}
			more := false
			if n, more = in.fill(now.arrivals, bufs, sizes, eps); !more {
				now.done <- struct{}{}
				now = nil
			}
		}
		return n, nil
	}
}

// close ends what open has given.
func (s *sideEntrance) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed != nil {
		close(s.closed)
		s.closed = nil
	}
}

// hand gives a parcel to the device and returns when it is copied, or quit is closed. It reports false in the second case: the
// parcel must not be used again then.
func (s *sideEntrance) hand(p *parcel, quit <-chan struct{}) bool {
	select {
	case s.parcels <- p:
	case <-quit:
		return false
	}
	select {
	case <-p.done:
		return true
	case <-quit:
		return false
	}
}
