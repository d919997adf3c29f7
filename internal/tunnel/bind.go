package tunnel

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/udpconn"
)

// bind puts path choice under wireguard-go. Towards it a peer has one endpoint, the [Peer] itself, whatever path is behind it at the
// moment.
//
// It is not made of wireguard-go's standard bind, which allocates for each packet that it receives, copies each packet of a relay twice, and
// lets the kernel fragment what a forged ICMP message says is too large.
type bind struct {
	table  table
	side   *sideEntrance
	stun   func(pkt []byte, from *route) (*Peer, []byte)
	find   func(session string) *Peer
	in     *window // packets from the socket to the TUN
	turns  *turns  // which share it between peers; nil where there is but one
	out    *window // and from the TUN to the socket
	counts bindCounts
	// menders is how many peers' packets are kept, see [maxMenders].
	menders atomic.Int32
	socket  atomic.Pointer[socket] // nil while closed
}

// bindCounts counts what the bind dropped, in packets, and what it rebuilt.
type bindCounts struct {
	stranger atomic.Uint64 // WireGuard packets from a spot that is no validated path
	junk     atomic.Uint64 // neither WireGuard nor STUN
	noPath   atomic.Uint64 // sent to a peer without a path
	rebuilt  atomic.Uint64 // not dropped: rebuilt from parities
}

// Open opens the socket, for both families where there are two.
func (b *bind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	c, err := udpconn.Listen(context.Background(), udpconn.Options{Addr: ":" + strconv.Itoa(int(port))})
	if err != nil {
		return nil, 0, err
	}
	b.socket.Store(newSocket(c))
	return []conn.ReceiveFunc{b.receive(c), b.side.open(b)}, c.LocalAddr().Port(), nil
}

// Close closes the socket and ends what receives.
func (b *bind) Close() error {
	b.side.close()
	if s := b.socket.Swap(nil); s != nil {
		return s.conn.Close()
	}
	return nil
}

// BatchSize is how many packets are received and sent at a time.
func (*bind) BatchSize() int {
	if batched {
		return conn.IdealBatchSize
	}
	return 1
}

// SetMark does nothing: our packets are kept out of the tunnel by routes.
func (*bind) SetMark(uint32) error { return nil }

// port is the UDP port that is open, 0 if none is.
func (b *bind) port() uint16 {
	if s := b.socket.Load(); s != nil {
		return s.conn.LocalAddr().Port()
	}
	return 0
}

// Send sends WireGuard packets to a peer over its chosen path. Without one, a handshake is kept for the first path that
// comes up and all else is dropped: nothing waits here.
func (b *bind) Send(bufs [][]byte, endpoint conn.Endpoint) error {
	p, ok := endpoint.(*Peer)
	if !ok {
		return conn.ErrWrongEndpointType
	}
	if p.opts.Sent != nil {
		defer p.opts.Sent(dataPackets(bufs))
	}
	if p.handshake.sending(bufs[0]) {
		p.act(func(time.Time) {}) // sets the timer for sending it again
	}
	r := p.current.Load()
	if r == nil {
		if r = p.hint.Load(); r == nil || len(bufs) > 1 || !p.greets(messageType(bufs[0])) {
			b.counts.noPath.Add(uint64(len(bufs)))
			p.handshake.unsent()
			return nil
		}
	}
	var total uint64
	for _, buf := range bufs {
		total += uint64(len(buf))
	}
	p.tx.Add(total)
	if s, ok := r.via.(*stream); ok && messageType(bufs[0]) == device.MessageTransportType {
		s.wait(r)
	}
	b.out.give(len(bufs))
	if s := p.covers(bufs, r); s != nil {
		return s.send(bufs, r)
	}
	return b.transmit(bufs, r)
}

// dataPackets is how many of the packets that the device sends at once came from the TUN.
func dataPackets(bufs [][]byte) int {
	if messageType(bufs[0]) != device.MessageTransportType || len(bufs[0]) <= device.MessageKeepaliveSize {
		return 0
	}
	return len(bufs)
}

// transmit sends packets over a route. It may write into them and behind them, up to their capacity.
func (b *bind) transmit(bufs [][]byte, r *route) error {
	if r.via != nil {
		return r.via.send(bufs, r)
	}
	if s := b.socket.Load(); s != nil {
		return s.send(bufs, r)
	}
	return net.ErrClosed
}

// sendTo sends one datagram that is not the device's.
func (b *bind) sendTo(pkt []byte, r *route) error { return b.transmit([][]byte{pkt}, r) }

// ParseEndpoint gives the peer of a session: the device is configured with session ids as endpoints.
func (b *bind) ParseEndpoint(session string) (conn.Endpoint, error) {
	if p := b.find(session); p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("no peer for session %q", session)
}

// isWireGuard recognises a WireGuard message: a type of 1 to 4 and three zero bytes, and the length of its type. RFC 7983
// leaves these first bytes free. What has another length would be kept as a handshake before the device refuses it.
func isWireGuard(pkt []byte) bool {
	if len(pkt) < device.MinMessageSize {
		return false
	}
	switch messageType(pkt) {
	case device.MessageInitiationType:
		return len(pkt) == device.MessageInitiationSize
	case device.MessageResponseType:
		return len(pkt) == device.MessageResponseSize
	case device.MessageCookieReplyType:
		return len(pkt) == device.MessageCookieReplySize
	case device.MessageTransportType:
		return true
	}
	return false
}

func messageType(pkt []byte) uint32 { return binary.LittleEndian.Uint32(pkt) }

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
