package lab

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
)

// TapDevice is the name of the interface that [Host.ServeGuest] makes.
const TapDevice = "tap0"

// ServeGuest makes a TAP device on the host for a virtual machine, and routes and maps what comes from there: a second easy NAT. subnet is
// the machine's network, in which the host has the given address.
func (h *Host) ServeGuest(subnet netip.Prefix) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = TapDevice
	// The ioctl that makes a TAP device works in the namespace of the thread.
	err := h.ns.do(func() error {
		return netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR})
	})
	if err != nil {
		return fmt.Errorf("make a tap device on host %s: %w", h.name, err)
	}
	if _, err := (end{ns: h.ns, name: TapDevice, addr: address{v4: subnet}}).configure(); err != nil {
		return err
	}
	return errors.Join(h.ns.sysctl("net/ipv4/ip_forward", "1"), h.ns.rule(func(r *rules) {
		r.add(r.out(), from(subnet.Masked()), []expr.Any{&expr.Masq{}})
	}))
}
