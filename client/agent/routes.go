package agent

import (
	"net/netip"
	"slices"
	"sync"

	"github.com/culvertnet/culvert/client/host"
	"github.com/culvertnet/culvert/internal/wire"
)

// routes is what goes into the tunnel at present. Its lock is held while the kernel is told, so that the last word wins.
type routes struct {
	mu   sync.Mutex
	want []netip.Prefix
	keep []netip.Addr // the gateway's candidates; outside's addresses and aside's come on top
	left []host.Yield
}

// never are destinations that no gateway gets, whatever it says: this host itself, its links, and where clouds keep their metadata and
// give out credentials. An honest gateway grants them one by one at most.
var never = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), // this host (RFC 1122, section 3.2.1.3)
	netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10"), // link-local (RFC 3927, RFC 4291), metadata
	netip.MustParsePrefix("224.0.0.0/3"), netip.MustParsePrefix("ff00::/8"), // multicast, reserved, broadcast
	netip.MustParsePrefix("::/127"),             // unspecified, loopback
	netip.MustParsePrefix("168.63.129.16/32"),   // Azure: DNS, DHCP, agent
	netip.MustParsePrefix("100.100.100.200/32"), // Alibaba: metadata
	netip.MustParsePrefix("fd00:ec2::/64"),      // AWS: metadata, DNS, time
	netip.MustParsePrefix("fd20:ce::254/128"),   // Google: metadata
}

// routable is what a gateway may be believed to lead to.
func routable(routes []netip.Prefix) []netip.Prefix { return host.Without(routes, never) }

// setRoutes replaces what goes into the tunnel: the gateway's overlay addresses and what it grants.
func (a *Agent) setRoutes(gw wire.Gateway) error {
	a.routes.mu.Lock()
	defer a.routes.mu.Unlock()
	believed := routable(gw.Routes)
	if refused := host.Without(gw.Routes, believed); len(refused) > 0 {
		a.log.Warn("the gateway wants traffic that is never a gateway's; it stays outside the tunnel", "routes", refused)
	}
	a.routes.want = append(hostPrefixes(gw.Addresses), a.aside.without(believed)...)
	a.routes.keep = a.routes.keep[:0]
	for _, c := range gw.Candidates {
		a.routes.keep = append(a.routes.keep, c.Addr.Addr().Unmap())
	}
	return a.applyRoutes()
}

// applyRoutes tells the link; the caller holds the lock. The host's own DNS servers stay outside whatever is granted: without its names
// a runner loses its job.
func (a *Agent) applyRoutes() error {
	keep := slices.Concat(a.routes.keep, a.direct.list(), a.aside.list(), a.opts.resolvers())
	left, err := a.openedLink().SetRoutes(a.routes.want, keep)
	if err != nil {
		return err
	}
	if !slices.Equal(left, a.routes.left) && len(left) > 0 {
		a.log.Warn("some of what is granted is directly connected, and stays outside the tunnel", "routes", texts(left))
	}
	a.routes.left = left
	return nil
}

// keepOutside makes room in the routes for addresses that are about to be talked to directly.
func (a *Agent) keepOutside(addrs ...netip.Addr) {
	a.routes.mu.Lock()
	defer a.routes.mu.Unlock()
	if !slices.ContainsFunc(addrs, func(addr netip.Addr) bool { return contains(a.routes.want, addr) }) {
		return
	}
	if err := a.applyRoutes(); err != nil {
		a.log.Warn("cannot keep addresses outside the tunnel", "addr", addrs, "err", err)
	}
}

// inside says whether an address goes into the tunnel.
func (a *Agent) inside(addr netip.Addr) bool {
	a.routes.mu.Lock()
	defer a.routes.mu.Unlock()
	addr = addr.Unmap() // loopback is this host whatever a route covers, as it is for the kernel
	return !addr.IsLoopback() && contains(a.routes.want, addr) && !yielded(a.routes.left, addr) && !a.aside.holds(addr)
}

func yielded(left []host.Yield, addr netip.Addr) bool {
	return slices.ContainsFunc(left, func(y host.Yield) bool { return y.Prefix.Contains(addr) })
}

func contains(prefixes []netip.Prefix, addr netip.Addr) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// hostPrefixes turns addresses into prefixes of one address each.
func hostPrefixes(addrs []netip.Addr) []netip.Prefix {
	prefixes := make([]netip.Prefix, 0, len(addrs))
	for _, addr := range addrs {
		prefixes = append(prefixes, netip.PrefixFrom(addr, addr.BitLen()))
	}
	return prefixes
}
