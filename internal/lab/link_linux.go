package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// end is one end of a link: an interface with an address in a namespace.
type end struct {
	ns   *namespace
	name string
	addr netip.Prefix
	via  netip.Addr // default route, if valid
}

const linkMTU = 1500

// vethPair connects two namespaces without delay.
func vethPair(a, b end) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = a.name, linkMTU
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: b.name, PeerNamespace: netlink.NsFd(int(b.ns.file.Fd()))}
	if err := a.ns.handle.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth pair %s, %s: %w", a.name, b.name, err)
	}
	return configurePair(a, b)
}

// configurePair gives both ends their addresses and tells each the other's link address for good: a link of the lab
// plays a provider's, where no round trip goes into ARP.
func configurePair(a, b end) error {
	la, err := a.configure()
	if err != nil {
		return err
	}
	lb, err := b.configure()
	if err != nil {
		return err
	}
	if err := a.neighbour(la, b.addr.Addr(), lb.Attrs().HardwareAddr); err != nil {
		return err
	}
	if err := b.neighbour(lb, a.addr.Addr(), la.Attrs().HardwareAddr); err != nil {
		return err
	}
	return errors.Join(a.running(), b.running())
}

// running waits until the interface carries packets: the kernel learns of a carrier a moment after the peer came up, and
// drops what is sent before.
func (e end) running() error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		link, err := e.ns.handle.LinkByName(e.name)
		if err != nil {
			return fmt.Errorf("find interface %s: %w", e.name, err)
		}
		if link.Attrs().RawFlags&unix.IFF_RUNNING != 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("interface %s does not come up", e.name)
		}
		time.Sleep(time.Millisecond)
	}
}

func (e end) configure() (netlink.Link, error) {
	h := e.ns.handle
	link, err := h.LinkByName(e.name)
	if err != nil {
		return nil, fmt.Errorf("find interface %s: %w", e.name, err)
	}
	if err := e.address(link); err != nil {
		return nil, err
	}
	if err := h.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("bring %s up: %w", e.name, err)
	}
	if !e.via.IsValid() {
		return link, nil
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: e.via.AsSlice()}
	if err := h.RouteAdd(route); err != nil {
		return nil, fmt.Errorf("route through %s: %w", e.via, err)
	}
	return link, nil
}

func (e end) neighbour(link netlink.Link, addr netip.Addr, mac net.HardwareAddr) error {
	err := e.ns.handle.NeighSet(&netlink.Neigh{
		LinkIndex:    link.Attrs().Index,
		Family:       unix.AF_INET,
		State:        netlink.NUD_PERMANENT,
		IP:           addr.AsSlice(),
		HardwareAddr: mac,
	})
	if err != nil {
		return fmt.Errorf("tell %s its neighbour %s: %w", e.name, addr, err)
	}
	return nil
}

// address gives the end's address to its interface.
func (e end) address(link netlink.Link) error {
	addr, err := netlink.ParseAddr(e.addr.String())
	if err != nil {
		return fmt.Errorf("address of %s: %w", e.name, err)
	}
	if err := e.ns.handle.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("give %s to %s: %w", e.addr, e.name, err)
	}
	return nil
}

// attach connects a namespace to the internet by an interface of this name and gives its public address.
func (n *Net) attach(ns *namespace, iface string, link Link) (netip.Addr, error) {
	near, far, err := n.nextPublic()
	if err != nil {
		return netip.Addr{}, err
	}
	uplink := end{ns: n.router, name: fmt.Sprintf("to%d", n.publics), addr: near}
	own := end{ns: ns, name: iface, addr: far, via: near.Addr()}
	if link == (Link{}) {
		return far.Addr(), vethPair(uplink, own)
	}
	w, err := newWire(uplink, own, link)
	if err != nil {
		return netip.Addr{}, err
	}
	n.mu.Lock()
	n.wires = append(n.wires, w)
	n.mu.Unlock()
	return far.Addr(), nil
}

// AddAddr gives the host a further address on its loopback interface, for services that only it reaches.
func (h *Host) AddAddr(addr netip.Addr) error {
	lo, err := h.ns.handle.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback interface: %w", err)
	}
	return end{ns: h.ns, name: "lo", addr: netip.PrefixFrom(addr, addr.BitLen())}.address(lo)
}
