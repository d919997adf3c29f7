package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// diagRequest is struct inet_diag_req_v2 of linux/inet_diag.h: family, protocol, states, and the socket with its cookie.
type diagRequest [56]byte

// Len implements [nl.NetlinkRequestData].
func (r *diagRequest) Len() int { return len(r) }

// Serialize implements [nl.NetlinkRequestData].
func (r *diagRequest) Serialize() []byte { return r[:] }

func newDiagRequest(s *netlink.Socket) *diagRequest {
	var r diagRequest
	r[0], r[1] = s.Family, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(r[8:], s.ID.SourcePort)
	binary.BigEndian.PutUint16(r[10:], s.ID.DestinationPort)
	from, to := s.ID.Source.To16(), s.ID.Destination.To16()
	if s.Family == unix.AF_INET {
		from, to = s.ID.Source.To4(), s.ID.Destination.To4()
	}
	copy(r[12:28], from)
	copy(r[28:44], to)
	binary.NativeEndian.PutUint32(r[44:], s.ID.Interface)
	binary.NativeEndian.PutUint32(r[48:], s.ID.Cookie[0])
	binary.NativeEndian.PutUint32(r[52:], s.ID.Cookie[1])
	return &r
}

// established are the states of net/tcp_states.h in which the other side knows of a connection: not those in which it is being opened,
// listened for, or over.
var established = []uint8{1, 4, 5, 8, 9, 11}

// establishedFrom gives what resets the TCP connections of this host that are established from one of these addresses.
func establishedFrom(addrs []netip.Addr) (reset func() error, err error) {
	var open []*netlink.Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		list, err := netlink.SocketDiagTCP(family)
		if err != nil {
			return nil, fmt.Errorf("list this host's connections: %w", err)
		}
		for _, s := range list {
			from, ok := netip.AddrFromSlice(s.ID.Source)
			if ok && slices.Contains(addrs, from.Unmap()) && slices.Contains(established, s.State) {
				open = append(open, s)
			}
		}
	}
	return func() error {
		var failed error
		for _, s := range open {
			req := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
			req.AddData(newDiagRequest(s))
			_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
			if err != nil && !errors.Is(err, unix.ENOENT) { // it has closed by itself meanwhile
				failed = fmt.Errorf("reset a connection: %w", err)
			}
		}
		return failed
	}, nil
}

// established gives what resets the connections that are established now.
func (l *link) established() (func() error, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.nl == nil {
		return nil, unix.EBADF
	}
	list, err := l.nl.AddrList(l.attrs, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list the tunnel's addresses: %w", err)
	}
	var addrs []netip.Addr
	for _, a := range list {
		if addr, ok := netip.AddrFromSlice(a.IP); ok {
			addrs = append(addrs, addr.Unmap())
		}
	}
	return establishedFrom(addrs)
}
