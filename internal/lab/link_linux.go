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

// end is one end of a link: an interface with addresses in a namespace.
type end struct {
	ns      *namespace
	name    string
	addr    address
	gateway address // default routes, where valid
}

const linkMTU = 1500

// congestion is the TCP congestion control of the lab's hosts: what Linux has unless somebody chose another, so that the lab shows
// what most hosts do, and not what the kernel under it is configured for. Routes name it, because a namespace may choose freely only
// among what the machine's administrator has allowed.
const congestion = "cubic"

// vethPair connects two namespaces without delay.
func vethPair(a, b end, mtu int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = a.name, mtu
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: b.name, PeerMTU: uint32(mtu),
		PeerNamespace: netlink.NsFd(int(b.ns.file.Fd()))}
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
	if err := a.neighbours(la, b.addr, lb.Attrs().HardwareAddr); err != nil {
		return err
	}
	if err := b.neighbours(lb, a.addr, la.Attrs().HardwareAddr); err != nil {
		return err
	}
	return errors.Join(a.running(), b.running())
}

// running waits until the interface carries packets: the kernel learns of a carrier a moment after the peer came up and
// drops what is sent before, and only then does it take IPv6 packets for the interface's own address.
func (e end) running() error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		link, err := e.ns.handle.LinkByName(e.name)
		if err != nil {
			return fmt.Errorf("find interface %s: %w", e.name, err)
		}
		if link.Attrs().RawFlags&unix.IFF_RUNNING != 0 && (!e.addr.v6.IsValid() || e.ns.takes(e.addr.v6.Addr())) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("interface %s does not come up", e.name)
		}
		time.Sleep(time.Millisecond)
	}
}

// takes reports whether the namespace takes packets for an address as its own.
func (ns *namespace) takes(addr netip.Addr) bool {
	routes, err := ns.handle.RouteGet(addr.AsSlice())
	return err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL
}

func (e end) configure() (netlink.Link, error) {
	h := e.ns.handle
	link, err := h.LinkByName(e.name)
	if err != nil {
		return nil, fmt.Errorf("find interface %s: %w", e.name, err)
	}
	if err := e.assign(link); err != nil {
		return nil, err
	}
	if err := h.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("bring %s up: %w", e.name, err)
	}
	if !e.gateway.v4.IsValid() {
		return link, nil
	}
	for _, via := range e.gateway.all() {
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: via.Addr().AsSlice(), Congctl: congestion}
		if err := h.RouteAdd(route); err != nil {
			return nil, fmt.Errorf("route through %s: %w", via, err)
		}
	}
	return link, nil
}

func (e end) neighbours(link netlink.Link, of address, mac net.HardwareAddr) error {
	for _, p := range of.all() {
		family := unix.AF_INET
		if p.Addr().Is6() {
			family = unix.AF_INET6
		}
		err := e.ns.handle.NeighSet(&netlink.Neigh{
			LinkIndex:    link.Attrs().Index,
			Family:       family,
			State:        netlink.NUD_PERMANENT,
			IP:           p.Addr().AsSlice(),
			HardwareAddr: mac,
		})
		if err != nil {
			return fmt.Errorf("tell %s its neighbour %s: %w", e.name, p.Addr(), err)
		}
	}
	return nil
}

// assign gives the end's addresses to its interface.
func (e end) assign(link netlink.Link) error {
	for _, p := range e.addr.all() {
		addr, err := netlink.ParseAddr(p.String())
		if err != nil {
			return fmt.Errorf("address of %s: %w", e.name, err)
		}
		if p.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD // nobody else is there, and detection would take a second
		}
		if err := e.ns.handle.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("give %s to %s: %w", p, e.name, err)
		}
	}
	return nil
}

// attach connects a namespace to the internet by an interface of this name and gives its public addresses.
func (n *Net) attach(ns *namespace, iface string, link Link, ipv6 bool) (address, error) {
	index, near, far, err := n.nextPublic()
	if err != nil {
		return address{}, err
	}
	uplink := end{ns: n.router, name: fmt.Sprintf("to%d", index), addr: address{v4: near}}
	own := end{ns: ns, name: iface, addr: address{v4: far}}
	if ipv6 {
		uplink.addr.v6, own.addr.v6 = public6(index, 1), public6(index, 2)
	}
	own.gateway = uplink.addr
	if link.MTU > 0 {
		if err := errors.Join(n.router.muteTooBig(), ns.muteTooBig()); err != nil {
			return address{}, err
		}
	}
	if link.Delay == 0 && link.Loss == 0 {
		return own.addr, vethPair(uplink, own, link.mtu())
	}
	w, err := newWire(uplink, own, link)
	if err != nil {
		return address{}, err
	}
	n.mu.Lock()
	n.wires = append(n.wires, w)
	n.mu.Unlock()
	return own.addr, nil
}

func (l Link) mtu() int {
	if l.MTU > 0 {
		return int(l.MTU)
	}
	return linkMTU
}

// muteTooBig makes a namespace that routes a black hole for packets that are too big.
func (ns *namespace) muteTooBig() error { return ns.rule((*rules).muteTooBig) }

// clampMSS makes TCP connections through a namespace fit an MTU.
func (ns *namespace) clampMSS(mtu uint16) error {
	return ns.rule(func(r *rules) { r.clampMSS(mtu) })
}

// rule adds rules in a namespace.
func (ns *namespace) rule(add func(*rules)) error {
	return ns.do(func() error {
		r, err := newRules()
		if err != nil {
			return err
		}
		add(r)
		return r.commit()
	})
}

// AddAddr gives the host a further address on its loopback interface, for services that only it reaches.
func (h *Host) AddAddr(addr netip.Addr) error {
	lo, err := h.ns.handle.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback interface: %w", err)
	}
	return end{ns: h.ns, name: "lo", addr: address{v4: netip.PrefixFrom(addr, addr.BitLen())}}.assign(lo)
}

func (e end) setMTU(mtu int) error {
	link, err := e.ns.handle.LinkByName(e.name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", e.name, err)
	}
	if err := e.ns.handle.LinkSetMTU(link, mtu); err != nil {
		return fmt.Errorf("give %s an MTU of %d: %w", e.name, mtu, err)
	}
	return nil
}
