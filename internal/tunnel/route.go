package tunnel

import (
	"encoding/binary"
	"net/netip"

	"golang.zx2c4.com/wireguard/conn"

	"github.com/culvertnet/culvert/internal/relay"
)

// door is a way in and out beside the tunnel's own sockets: a relay's WebSocket, or a socket that was opened for one peer.
type door interface {
	// send sends packets without blocking; what there is no room for is dropped. It may write into them and behind them, up to
	// their capacity.
	send(packets [][]byte, header uint32) error
}

// route is how a path's packets leave: to which spot, from which local address. It never changes.
type route struct {
	spot
	ep *conn.StdNetEndpoint // nil through a door
}

// routeTo gives the route to a spot from whatever local address the system picks.
func routeTo(s spot) *route {
	if s.via != nil {
		return &route{spot: s}
	}
	return &route{spot: s, ep: &conn.StdNetEndpoint{AddrPort: s.remote}}
}

// mapped is the address that is told to whoever asks from here.
func (r *route) mapped() netip.AddrPort {
	if r.header != 0 {
		return netip.AddrPortFrom(netip.IPv4Unspecified(), 0) // the relay's address means nothing to the peer
	}
	return r.remote
}

// header is what stands before each packet of a channel, as a number in network byte order.
func header(c relay.Channel) uint32 {
	var b [relay.FrameHeader]byte
	relay.PutHeader(b[:], c)
	return binary.BigEndian.Uint32(b[:])
}

// channel is the channel that a header names.
func channel(header uint32) relay.Channel { return relay.Channel(header &^ (0xF << 28)) }

// frame puts a header before each packet. It shifts them within their own buffers, where there is room: wireguard-go's hold 64 KiB.
func frame(bufs [][]byte, header uint32) {
	for i, buf := range bufs {
		n := len(buf) + relay.FrameHeader
		framed := buf
		if cap(buf) >= n {
			framed = buf[:n]
		} else {
			framed = make([]byte, n) // a handshake
		}
		copy(framed[relay.FrameHeader:], buf)
		binary.BigEndian.PutUint32(framed, header)
		bufs[i] = framed
	}
}
