package tunnel

import (
	"encoding/binary"
	"net"
	"sync"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/relay"
)

// receive filters what comes in: WireGuard packets from validated paths go on to the device, STUN is handled here, all
// else is dropped. The device skips packets of size 0.
func (b *bind) receive(fn conn.ReceiveFunc) conn.ReceiveFunc {
	var last *path // packets come in runs from one spot
	timer := stoppedTimer()
	return func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		for {
			b.in.wait(timer)
			n, err := fn(bufs, sizes, eps)
			if err != nil {
				return n, err
			}
			data, live := 0, false
			for i := range n {
				if sizes[i] == 0 {
					continue
				}
				ep := eps[i].(*conn.StdNetEndpoint)
				ep.AddrPort = unmap(ep.AddrPort)
				from := spot{remote: ep.AddrPort}
				sizes[i], from.header = unframe(bufs[i], sizes[i])
				last = b.pathOf(last, from)
				eps[i], sizes[i] = b.accept(bufs[i], sizes[i], last, from, ep)
				if sizes[i] == 0 {
					continue
				}
				live = true
				data += isData(bufs[i], sizes[i])
			}
			if live {
				b.in.take(data)
				return n, nil
			}
		}
	}
}

// isData counts a packet that will come out at the TUN, if all goes well.
func isData(buf []byte, size int) int {
	if size > device.MessageKeepaliveSize && messageType(buf) == device.MessageTransportType {
		return 1
	}
	return 0
}

// unframe takes the header off a frame, 0 for what is none.
func unframe(buf []byte, size int) (int, uint32) {
	if !relay.IsFrame(buf[:size]) {
		return size, 0
	}
	header := binary.BigEndian.Uint32(buf)
	return copy(buf, buf[relay.FrameHeader:size]), header
}

// pathOf gives the path of a spot, nil if no authentic check has ever come from there. last is what it gave before.
func (b *bind) pathOf(last *path, from spot) *path {
	if last != nil && last.spot == from && !last.gone.Load() {
		return last
	}
	return b.table.lookup(from)
}

// accept judges one packet from a spot, whose path is p if an authentic check has ever come from there. It gives
// what the device shall see of it: a size of 0 for nothing.
func (b *bind) accept(buf []byte, size int, p *path, from spot, ep *conn.StdNetEndpoint) (conn.Endpoint, int) {
	pkt := buf[:size]
	switch {
	case isWireGuard(pkt):
		if p == nil {
			b.counts.stranger.Add(1)
			return nil, 0
		}
		return p.peer.accept(p, pkt)
	case nat.IsSTUN(pkt):
		if p := b.stun(pkt, &route{spot: from, ep: ep}); p != nil {
			if parked := p.peer.unpark(p, buf); parked > 0 {
				return p.peer, parked
			}
		}
		return nil, 0
	}
	b.counts.junk.Add(1)
	return nil, 0
}

// sideEntrance is how packets that come in through doors get to the device: one more function that it receives from. Whoever reads
// from a door hands over what has come and waits until it is copied out.
type sideEntrance struct {
	parcels chan *parcel

	mu     sync.Mutex
	closed chan struct{} // of this opening; nil while closed
}

// parcel is what one read from a door has brought: runs of packets from one spot, or from spots that differ in their headers.
type parcel struct {
	from spot
	// next gives the next packet and its header; false when there are no more.
	next func() (packet []byte, header uint32, ok bool)
	done chan struct{} // has a token when all is copied
}

func newSideEntrance() *sideEntrance { return &sideEntrance{parcels: make(chan *parcel)} }

// open gives the function for the device to receive from.
func (s *sideEntrance) open(b *bind) conn.ReceiveFunc {
	s.mu.Lock()
	s.closed = make(chan struct{})
	closed := s.closed
	s.mu.Unlock()
	var now *parcel
	var last *path
	timer := stoppedTimer()
	return func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		for {
			if now == nil {
				select {
				case now = <-s.parcels:
				case <-closed:
					return 0, net.ErrClosed
				}
			}
			b.in.wait(timer)
			n, more := 0, true
			data := 0
			for n < len(bufs) && more {
				var packet []byte
				from := now.from
				if packet, from.header, more = now.next(); !more || len(packet) > len(bufs[n]) {
					continue
				}
				sizes[n] = copy(bufs[n], packet)
				last = b.pathOf(last, from)
				if eps[n], sizes[n] = b.accept(bufs[n], sizes[n], last, from, nil); sizes[n] > 0 {
					data += isData(bufs[n], sizes[n])
					n++
				}
			}
			if !more {
				now.done <- struct{}{}
				now = nil
			}
			if n > 0 {
				b.in.take(data)
				return n, nil
			}
		}
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
