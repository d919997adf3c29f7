package host

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// protocol marks our routes among those that the kernel makes for the interface itself.
const protocol = unix.RTPROT_STATIC

// table is the main routing table as this package sees it.
type table struct {
	ours      map[netip.Prefix]bool // installed on our interface by us
	taken     map[netip.Prefix]bool // routed elsewhere
	shared    map[netip.Prefix]bool // into another tunnel of this kind as well
	same      map[netip.Prefix]bool // of these, into one that the same programs use
	connected []Yield               // directly connected on other interfaces
}

// setRoutes is [Interface.SetRoutes]. It computes again if somebody else added one of the routes in between.
func (l *link) setRoutes(want []netip.Prefix, keep []netip.Addr) ([]Yield, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.nl == nil {
		return nil, closed(l.name)
	}
	const tries = 3
	for try := 1; ; try++ {
		now, err := l.routes()
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		routes, left := plan(want, keep, prefixesIn(now.connected))
		free, lost := split(routes, now.taken)
		err = l.apply(append(free, l.within(free, now.taken)...), now.ours, now.shared)
		if !errors.Is(err, unix.EEXIST) || try == tries {
			l.routed = free
			l.shared = slices.DeleteFunc(slices.Clone(free), func(p netip.Prefix) bool { return !now.same[p] })
			return yields(left, lost, now.connected), err
		}
	}
}

// maxSingles bounds what a gateway's names can add to the host's routes.
const maxSingles = 2048

// within gives the singles that lie in routes, and are none of them.
func (l *link) within(routes []netip.Prefix, taken map[netip.Prefix]bool) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(l.singles), func(single netip.Prefix) bool {
		return taken[single] || !slices.ContainsFunc(routes, func(p netip.Prefix) bool { return p.Contains(single.Addr()) && p != single })
	})
}

// lead is [Interface.Lead].
func (l *link) lead(addrs []netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.nl == nil {
		return closed(l.name)
	}
	var errs []error
	for _, addr := range addrs {
		single := netip.PrefixFrom(addr, addr.BitLen())
		if slices.Contains(l.singles, single) || len(l.singles) == maxSingles {
			continue
		}
		l.singles = append(l.singles, single)
		if !slices.Contains(l.within(l.routed, nil), single) {
			continue
		}
		err := l.add(single, 0)
		if errors.Is(err, unix.EEXIST) || addr.Is6() && noIPv6(err) {
			err = nil
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("add route %s over %s: %w", single, l.name, err))
		}
	}
	return l.failed(errs)
}

func prefixesIn(connected []Yield) []netip.Prefix {
	prefixes := make([]netip.Prefix, len(connected))
	for i, c := range connected {
		prefixes[i] = c.Prefix
	}
	return prefixes
}

func (l *link) sharedRoutes() []netip.Prefix {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.shared)
}

// apply adds what is new, then removes what is gone. It goes on after a failure, and gives all of them.
func (l *link) apply(want []netip.Prefix, have, shared map[netip.Prefix]bool) error {
	var errs []error
	keep, skipped := make(map[netip.Prefix]bool, len(want)), 0
	for _, p := range want {
		keep[p] = true
		if have[p] {
			continue
		}
		priority := 0
		if shared[p] {
			priority = behind + l.attrs.Attrs().Index
		}
		err := l.add(p, priority)
		switch {
		case err != nil && p.Addr().Is6() && noIPv6(err):
			skipped++
		case err != nil:
			errs = append(errs, fmt.Errorf("add route %s over %s: %w", p, l.name, err))
		}
	}
	for p := range have {
		if keep[p] {
			continue
		}
		if err := l.remove(p); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove route %s over %s: %w", p, l.name, err))
		}
	}
	if skipped > 0 && !l.warned {
		l.warned = true
		l.log.Info("this host has IPv6 switched off, its routes are skipped", "routes", skipped)
	}
	return l.failed(errs)
}

// add installs a route in the main table, and in its user's.
func (l *link) add(p netip.Prefix, priority int) error {
	r := l.route(p)
	r.Priority = priority
	if err := l.nl.RouteAdd(r); err != nil || l.user == 0 {
		return err
	}
	r.Table = tableOf(l.user)
	if err := l.nl.RouteAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("in the table of user %d: %w", l.user, err)
	}
	return nil
}

// remove takes a route away; the user's table may not have it.
func (l *link) remove(p netip.Prefix) error {
	r := l.route(p)
	if l.user > 0 {
		own := *r
		own.Table = tableOf(l.user)
		_ = l.nl.RouteDel(&own)
	}
	return l.nl.RouteDel(r)
}

func (l *link) route(p netip.Prefix) *netlink.Route {
	r := &netlink.Route{
		LinkIndex: l.attrs.Attrs().Index,
		Dst:       &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
		Protocol:  protocol,
		Table:     unix.RT_TABLE_MAIN,
		Type:      unix.RTN_UNICAST,
	}
	if p.Addr().Is4() {
		r.Scope = netlink.SCOPE_LINK
	}
	return r
}

// routes reads the main table.
func (l *link) routes() (table, error) {
	t := table{ours: map[netip.Prefix]bool{}, taken: map[netip.Prefix]bool{}, shared: map[netip.Prefix]bool{}, same: map[netip.Prefix]bool{}}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		filter := &netlink.Route{Table: unix.RT_TABLE_MAIN}
		list, err := dump(func() ([]netlink.Route, error) {
			return l.nl.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE)
		})
		if err != nil && !(family == netlink.FAMILY_V6 && noIPv6(err)) {
			return t, err
		}
		for _, r := range list {
			t.add(l, &r, family)
		}
	}
	return t, nil
}

// add sorts one route in.
func (t *table) add(l *link, r *netlink.Route, family int) {
	dst, ok := destination(r, family)
	if !ok {
		return
	}
	if r.LinkIndex == l.attrs.Attrs().Index {
		if int(r.Protocol) == protocol {
			t.ours[dst] = true
		}
		return
	}
	other, err := l.nl.LinkByIndex(r.LinkIndex)
	if err == nil && int(r.Protocol) == protocol {
		if user, ok := owner(other); ok {
			t.shared[dst] = true
			t.same[dst] = t.same[dst] || l.user == user || l.user == 0
			return
		}
	}
	t.taken[dst] = true
	if err == nil && dst.Bits() > 0 && r.Gw == nil && r.Via == nil && len(r.MultiPath) == 0 && r.Type == unix.RTN_UNICAST && attached(r, family, other) {
		t.connected = append(t.connected, Yield{dst, other.Attrs().Name})
	}
}

// behind is a metric that comes after that of a route which is given none, in IPv4 (0) and IPv6 (1024). Several tunnels of a host lead to
// the same places, above all to their gateways, which have one address: the first one's routes are the host's while it lasts, then the next
// one's, and whoever is bound to an interface takes that interface's.
const behind = 2048

// bound has sockets use the interface and no other that leads to the same place.
func (l *link) bound(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) { // without it the routes decide
		_ = unix.BindToDevice(int(fd), l.name)
	})
}

// attached reports whether a route without gateway leads to a subnet on the wire. The kernel makes such a route from an
// address, or somebody gives it scope link (IPv6 has no scopes). Over a point-to-point link only the kernel's own count: others
// are another tunnel's choice of path, and there the longer prefix wins as everywhere.
func attached(r *netlink.Route, family int, over netlink.Link) bool {
	if int(r.Protocol) == unix.RTPROT_KERNEL {
		return true
	}
	if family == netlink.FAMILY_V4 && r.Scope != netlink.SCOPE_LINK {
		return false
	}
	return over.Attrs().RawFlags&unix.IFF_POINTOPOINT == 0
}

// destination is a route's destination; a route without one is a default route.
func destination(r *netlink.Route, family int) (netip.Prefix, bool) {
	if r.Dst == nil {
		if family == netlink.FAMILY_V4 {
			return netip.PrefixFrom(netip.IPv4Unspecified(), 0), true
		}
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0), true
	}
	addr, ok := netip.AddrFromSlice(r.Dst.IP)
	bits, size := r.Dst.Mask.Size()
	if family == netlink.FAMILY_V4 {
		addr = addr.Unmap()
	}
	return netip.PrefixFrom(addr, bits), ok && size == addr.BitLen()
}
