package lab

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// Forward lets the host route packets between its interfaces.
func (h *Host) Forward() error { return h.ns.sysctl("net/ipv4/ip_forward", "1") }

// Route sends what is for dst to a host behind the NAT.
func (t *NAT) Route(dst netip.Prefix, via *Host) error { return t.ns.route(dst, via.Addr()) }

func (ns *namespace) route(dst netip.Prefix, via netip.Addr) error {
	to, err := netlink.ParseIPNet(dst.String())
	if err != nil {
		return fmt.Errorf("route to %s: %w", dst, err)
	}
	if err := ns.handle.RouteAdd(&netlink.Route{Dst: to, Gw: via.AsSlice()}); err != nil {
		return fmt.Errorf("route to %s through %s: %w", dst, via, err)
	}
	return nil
}
