package tunnel

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/nat"
)

// maxBatch is the most that may go into one UDP GSO send, in bytes of payload. The kernel segments a batch in software as soon
// as the packet with all its headers reaches 65,536 bytes, link header included (gso_features_check), which costs more
// than half of the throughput. 42 bytes are Ethernet, IPv4 and UDP; 48 more leave room for IPv6 and a VLAN tag.
const maxBatch = 1<<16 - 42 - 48 - 1

// bind puts path choice under wireguard-go: a conn.Bind around the standard one, whose batching and offloads it keeps. Towards
// wireguard-go a peer has one endpoint, the [Peer] itself, whatever address is behind it at the moment.
type bind struct {
	*conn.StdNetBind
	table  table
	stun   func(pkt []byte, from *conn.StdNetEndpoint, now time.Time) *path
	find   func(session string) *Peer
	in     *window // packets from the socket to the TUN
	out    *window // and from the TUN to the socket
	counts bindCounts
	bound  atomic.Uint32 // the UDP port
}

// bindCounts counts what the bind dropped, in packets.
type bindCounts struct {
	stranger atomic.Uint64 // WireGuard packets from an address that is no validated path
	junk     atomic.Uint64 // neither WireGuard nor STUN
	noPath   atomic.Uint64 // sent to a peer without a path
}

// Open opens the socket and wraps what receives from it.
func (b *bind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	fns, port, err := b.StdNetBind.Open(port)
	for i, fn := range fns {
		fns[i] = b.receive(fn)
	}
	b.bound.Store(uint32(port))
	return fns, port, err
}

// port is the UDP port that is open, 0 if none is.
func (b *bind) port() uint16 { return uint16(b.bound.Load()) }

// receive filters what comes in: WireGuard packets from validated paths go on to the device, STUN is handled here, all
// else is dropped. The device skips packets of size 0.
func (b *bind) receive(fn conn.ReceiveFunc) conn.ReceiveFunc {
	var last *path // packets come in runs from one address
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
				from := eps[i].(*conn.StdNetEndpoint)
				from.AddrPort = unmap(from.AddrPort)
				if last == nil || last.remote != from.AddrPort || last.gone.Load() {
					last = b.table.lookup(from.AddrPort)
				}
				eps[i], sizes[i] = b.accept(bufs[i], sizes[i], last, from)
				if sizes[i] == 0 {
					continue
				}
				live = true
				if sizes[i] > device.MessageKeepaliveSize && messageType(bufs[i]) == device.MessageTransportType {
					data++
				}
			}
			if live {
				b.in.take(data)
				return n, nil
			}
		}
	}
}

// accept judges one datagram from an address, whose path is p if an authentic check has ever come from there. It gives
// what the device shall see of it: a size of 0 for nothing.
func (b *bind) accept(buf []byte, size int, p *path, from *conn.StdNetEndpoint) (conn.Endpoint, int) {
	pkt := buf[:size]
	switch {
	case isWireGuard(pkt):
		if p == nil {
			b.counts.stranger.Add(1)
			return nil, 0
		}
		return p.peer.accept(p, pkt)
	case nat.IsSTUN(pkt):
		if p := b.stun(pkt, from, time.Now()); p != nil {
			if parked := p.peer.unpark(p, buf); parked > 0 {
				return p.peer, parked
			}
		}
		return nil, 0
	}
	b.counts.junk.Add(1)
	return nil, 0
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

// Send sends WireGuard packets to a peer over its chosen path. Without one, a handshake is kept for the first path that
// comes up and all else is dropped: nothing waits here.
func (b *bind) Send(bufs [][]byte, endpoint conn.Endpoint) error {
	p, ok := endpoint.(*Peer)
	if !ok {
		return conn.ErrWrongEndpointType
	}
	if len(bufs) == 1 && messageType(bufs[0]) != device.MessageTransportType {
		p.handshake.sending(bufs[0])
		p.act(func(time.Time) {}) // sets the timer for sending it again
	}
	ep := p.current.Load()
	if ep == nil {
		if ep = p.hint.Load(); ep == nil || len(bufs) > 1 || messageType(bufs[0]) == device.MessageTransportType {
			b.counts.noPath.Add(uint64(len(bufs)))
			p.handshake.unsent()
			return nil
		}
	}
	var total uint64
	for i, buf := range bufs {
		total += uint64(len(buf))
		// The standard bind coalesces into the first buffer of a batch as far as its capacity goes.
		bufs[i] = buf[:len(buf):min(cap(buf), max(len(buf), maxBatch))]
	}
	p.tx.Add(total)
	b.out.give(len(bufs))
	return b.StdNetBind.Send(bufs, ep)
}

// ParseEndpoint gives the peer of a session: the device is configured with session ids as endpoints.
func (b *bind) ParseEndpoint(session string) (conn.Endpoint, error) {
	if p := b.find(session); p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("no peer for session %q", session)
}

// sendTo sends one datagram that is not WireGuard's.
func (b *bind) sendTo(pkt []byte, ep *conn.StdNetEndpoint) error {
	return b.StdNetBind.Send([][]byte{pkt}, ep)
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
