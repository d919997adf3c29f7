package portmap

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/culvertnet/culvert/internal/nat"
)

// unroutable are the IPv4 ranges in which no host on the internet is (RFC 6890 and the registry that it began). The ranges of
// documentation are not among them: they are in use nowhere, and play the internet in labs.
var unroutable = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"), // shared: behind a provider's NAT
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("198.18.0.0/15"), // benchmarks, and our own overlay
	netip.MustParsePrefix("224.0.0.0/3"),   // multicast and what is reserved
}

// Routable reports whether an IPv4 address may belong to a host on the internet.
func Routable(a netip.Addr) bool {
	return a.Is4() && !slices.ContainsFunc(unroutable, func(p netip.Prefix) bool { return p.Contains(a) })
}

// DefaultRouter gives the router of the best IPv4 default route and the address from which this host speaks to it. It fails
// where there is no such route, and on systems that do not tell.
func DefaultRouter() (router, self netip.Addr, err error) {
	network, err := nat.ReadNetwork(nil)
	if err != nil {
		return router, self, err
	}
	for _, r := range network.Routes {
		if r.IPv6 || !r.Via.Is4() || r.Via.IsLinkLocalUnicast() { // link-local routers are clouds' and container networks'
			continue
		}
		self, err := towards(r.Via)
		return r.Via, self, err
	}
	return router, self, errors.New("there is no IPv4 default route through a router")
}

// towards gives the address from which packets to a router leave. Nothing is sent.
func towards(router netip.Addr) (netip.Addr, error) {
	conn, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(router, pcpPort)))
	if err != nil {
		return netip.Addr{}, fmt.Errorf("find this host's address towards the router: %w", err)
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}
