package agent

import (
	"errors"
	"net"
	"net/netip"
	"sync/atomic"

	"github.com/culvertnet/culvert/internal/wire"
)

// maxRanges bounds the overlay ranges that a coordinator may name.
const maxRanges = 16

// overlay are the default ranges of sessions and services. No flow leaves the tunnel towards them: what lives there is
// reached through the tunnel or not at all.
var overlay = []netip.Prefix{
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("fd63:756c:7665:7274::/96"),
}

// ownAddrs knows the addresses at which this machine takes packets: those of its interfaces, and those that it has in common with others
// of a network, the broadcast addresses of IPv4 and the subnet-router anycast address of IPv6 (RFC 4291, section 2.6.1), which is a
// forwarding machine's own as well. Asking the kernel for every flow would cost more than the
// flow, so a copy is kept and refreshed beside the candidates.
type ownAddrs struct {
	extra []netip.Addr // reach this machine too: a forwarded public address
	set   atomic.Pointer[map[netip.Addr]struct{}]
	list  func() ([]net.Addr, error) // net.InterfaceAddrs
}

func newOwnAddrs(extra ...netip.Addr) (*ownAddrs, error) {
	o := &ownAddrs{extra: extra, list: net.InterfaceAddrs}
	return o, o.refresh()
}

// refresh reads the interfaces again. On an error the last copy stays in force.
func (o *ownAddrs) refresh() error {
	addrs, err := o.list()
	if err != nil {
		return err
	}
	set := make(map[netip.Addr]struct{}, len(addrs)+len(o.extra))
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			set[p.Addr().Unmap().WithZone("")] = struct{}{}
			for _, a := range shared(p) {
				set[a] = struct{}{}
			}
		}
	}
	for _, a := range o.extra {
		set[a.Unmap()] = struct{}{}
	}
	o.set.Store(&set)
	return nil
}

// shared gives what is every host's in an interface's network: the first and the last address of IPv4's, with which broadcasts are
// sent, and the first of IPv6's. Networks of one or two hosts have none (RFC 3021, RFC 6164).
func shared(p netip.Prefix) []netip.Addr {
	if p.Bits() >= p.Addr().BitLen()-1 {
		return nil
	}
	first := p.Masked().Addr()
	if first.Is6() {
		return []netip.Addr{first.WithZone("")}
	}
	last := first.As4()
	for bit := p.Bits(); bit < 32; bit++ {
		last[bit/8] |= 0x80 >> (bit % 8)
	}
	return []netip.Addr{first, netip.AddrFrom4(last)}
}

// has reports whether a is an address of this machine.
func (o *ownAddrs) has(a netip.Addr) bool {
	_, ok := (*o.set.Load())[a.Unmap().WithZone("")]
	return ok
}

// saneUnicast reports whether a can be one host's address at all: not unspecified, loopback, multicast, broadcast or link-local,
// no zone, and not one address family dressed up as the other.
func saneUnicast(a netip.Addr) bool {
	switch {
	case !a.IsValid(), a.Zone() != "", a.Is4In6():
		return false
	case a.IsUnspecified(), a.IsLoopback(), a.IsMulticast(), a.IsLinkLocalUnicast():
		return false
	case a.Is4():
		first := a.As4()[0]
		return first != 0 && first < 240
	}
	return true
}

var errPair = errors.New("not exactly one IPv4 and one IPv6 address of a host")

// pair orders the two overlay addresses that a side has, IPv4 first.
func pair(addrs []netip.Addr) ([]netip.Addr, error) {
	if len(addrs) != 2 {
		return nil, errPair
	}
	four, six := addrs[0], addrs[1]
	if !four.Is4() {
		four, six = six, four
	}
	if !four.Is4() || !six.Is6() || !saneUnicast(four) || !saneUnicast(six) {
		return nil, errPair
	}
	return []netip.Addr{four, six}, nil
}

// hostPrefixes are the /32 and /128 of addrs.
func hostPrefixes(addrs []netip.Addr) []netip.Prefix {
	out := make([]netip.Prefix, len(addrs))
	for i, a := range addrs {
		out[i] = netip.PrefixFrom(a, a.BitLen())
	}
	return out
}

// saneCandidates drops what no peer can be at: checks go out to the rest, so that a coordinator cannot aim them at groups of
// hosts or at the cloud's metadata service. Loopback stays, for both ends on one machine.
func saneCandidates(in []wire.Candidate) []wire.Candidate {
	out := make([]wire.Candidate, 0, min(len(in), wire.MaxCandidates))
	for _, c := range in {
		c.Addr = netip.AddrPortFrom(c.Addr.Addr().Unmap(), c.Addr.Port())
		a := c.Addr.Addr()
		if (saneUnicast(a) || a.IsLoopback()) && c.Addr.Port() != 0 && len(out) < wire.MaxCandidates {
			out = append(out, c)
		}
	}
	return out
}
