package tunnel

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
)

// maxBatch is the most that may go into one UDP GSO send, in bytes of payload. The kernel segments a batch in software as soon
// as the packet with all its headers reaches 65,536 bytes, link header included (gso_features_check), which costs more
// than half of the throughput. 42 bytes are Ethernet, IPv4 and UDP; 48 more leave room for IPv6 and a VLAN tag.
const maxBatch = 1<<16 - 42 - 48 - 1

// bind puts path choice under wireguard-go: a conn.Bind around the standard one, whose batching and offloads it keeps. Towards
// wireguard-go a peer has one endpoint, the [Peer] itself, whatever path is behind it at the moment.
type bind struct {
	*conn.StdNetBind
	table  table
	side   *sideEntrance
	stun   func(pkt []byte, from *route) *path
	find   func(session string) *Peer
	in     *window // packets from the socket to the TUN
	out    *window // and from the TUN to the socket
	counts bindCounts
	bound  atomic.Uint32 // the UDP port
}

// bindCounts counts what the bind dropped, in packets.
type bindCounts struct {
	stranger atomic.Uint64 // WireGuard packets from a spot that is no validated path
	junk     atomic.Uint64 // neither WireGuard nor STUN
	noPath   atomic.Uint64 // sent to a peer without a path
}

// Open opens the socket and wraps what receives from it.
func (b *bind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	fns, port, err := b.StdNetBind.Open(port)
	if err != nil {
		return nil, 0, err
	}
	for i, fn := range fns {
		fns[i] = b.receive(fn)
	}
	b.bound.Store(uint32(port))
	return append(fns, b.side.open(b)), port, nil
}

// Close closes the socket and ends what receives.
func (b *bind) Close() error {
	b.side.close()
	return b.StdNetBind.Close()
}

// port is the UDP port that is open, 0 if none is.
func (b *bind) port() uint16 { return uint16(b.bound.Load()) }

// Send sends WireGuard packets to a peer over its chosen path. Without one, a handshake is kept for the first path that
// comes up and all else is dropped: nothing waits here.
func (b *bind) Send(bufs [][]byte, endpoint conn.Endpoint) error {
	p, ok := endpoint.(*Peer)
	if !ok {
		return conn.ErrWrongEndpointType
	}
	if p.handshake.sending(bufs[0]) {
		p.act(func(time.Time) {}) // sets the timer for sending it again
	}
	r := p.current.Load()
	if r == nil {
		if r = p.hint.Load(); r == nil || len(bufs) > 1 || messageType(bufs[0]) == device.MessageTransportType {
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
	b.out.give(len(bufs))
	return b.transmit(bufs, r)
}

// transmit sends packets over a route. It may write into them and behind them, up to their capacity.
func (b *bind) transmit(bufs [][]byte, r *route) error {
	if r.via != nil {
		return r.via.send(bufs, r.header)
	}
	if r.header != 0 {
		frame(bufs, r.header)
	}
	for i, buf := range bufs {
		// The standard bind coalesces into the first buffer of a batch as far as its capacity goes.
		bufs[i] = buf[:len(buf):min(cap(buf), max(len(buf), maxBatch))]
	}
	return b.StdNetBind.Send(bufs, r.ep)
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
