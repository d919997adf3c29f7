package tunnel

import (
	"encoding/binary"
	"net/netip"

	"github.com/culvertnet/culvert/internal/relay"
)

// door is a way in and out beside the tunnel's own sockets: a relay's WebSocket, or a socket that was opened for one peer.
type door interface {
	// send sends packets without blocking; what there is no room for is dropped. It may write into them and behind them, up to
	// their capacity.
	send(packets [][]byte, r *route) error
}

// route is how a path's packets leave: to which spot, from which local address. It never changes.
type route struct {
	spot
	local netip.Addr // not valid where the system is to choose
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
