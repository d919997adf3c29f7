package kernel

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/udpconn"
)

const (
	wgName   = "wg0"
	cable    = "host0"     // our end
	numbered = "culvert%d" // the host's, with the next free number
)

// Device is the kernel's WireGuard. It implements what a tunnel needs of a device outside the process.
type Device struct {
	ns     *namespace
	name   string // of the cable's end on the host
	wg     netlink.Link
	near   netlink.Link // our end of the cable
	client *wgctrl.Client

	mu     sync.Mutex // guards what follows, and orders changes
	addrs  []netip.Addr
	closed bool
}

func open(opts Options) (*Device, error) {
	ns, err := newNamespace()
	if err != nil {
		return nil, explain(err)
	}
	d := &Device{ns: ns}
	if err := d.build(opts.MTU); err != nil {
		_ = d.Close()
		return nil, explain(err)
	}
	return d, nil
}

// errNoWireGuard says that the kernel does not know this kind of interface.
var errNoWireGuard = errors.New("the kernel has no WireGuard")

// settings are the namespace's: packets pass through it, and no interface gets a link-local address of its own, not even when IPv6 comes
// back to it (IN6_ADDR_GEN_MODE_NONE of linux/if_link.h).
var settings = [][2]string{{"ipv4/ip_forward", "1"}, {"ipv6/conf/all/forwarding", "1"}, {"ipv6/conf/default/addr_gen_mode", "1"}}

func (d *Device) build(mtu int) error {
	for _, s := range settings {
		if err := d.ns.sysctl(s[0], s[1]); err != nil && !errors.Is(err, os.ErrNotExist) { // no IPv6 here
			return fmt.Errorf("set %s: %w", s[0], err)
		}
	}
	wg := netlink.NewLinkAttrs()
	wg.Name, wg.MTU = wgName, mtu
	if err := d.ns.handle.LinkAdd(&netlink.Wireguard{LinkAttrs: wg}); errors.Is(err, unix.EOPNOTSUPP) {
		return errNoWireGuard
	} else if err != nil {
		return fmt.Errorf("make a wireguard interface: %w", err)
	}
	var err error
	if d.wg, err = d.ns.handle.LinkByName(wgName); err != nil {
		return fmt.Errorf("find the wireguard interface: %w", err)
	}
	if err := d.plug(mtu); err != nil {
		return err
	}
	for _, l := range []netlink.Link{d.wg, d.near} {
		if err := d.ns.handle.LinkSetUp(l); err != nil {
			return fmt.Errorf("bring %s up: %w", l.Attrs().Name, err)
		}
	}
	if err := d.routes(); err != nil {
		return err
	}
	return d.control()
}

// plug lays the cable. Its ends have one address, and ask nobody for another's: what one sends the other takes.
func (d *Device) plug(mtu int) error {
	home, err := os.Open(threadNamespace)
	if err != nil {
		return err
	}
	defer home.Close()
	host, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer host.Close()
	mac := make(net.HardwareAddr, 6)
	_, _ = rand.Read(mac)        // never fails, see crypto/rand
	mac[0] = mac[0]&^0b01 | 0b10 // an address of nobody's making (IEEE 802, local and unicast)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = cable, mtu, mac
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerHardwareAddr, veth.PeerMTU = numbered, mac, uint32(mtu)
	veth.PeerNamespace = netlink.NsFd(int(home.Fd()))
	if err := d.ns.handle.LinkAdd(veth); err != nil {
		return fmt.Errorf("make a pair of virtual ethernet interfaces: %w", err)
	}
	if d.near, err = d.ns.handle.LinkByName(cable); err != nil {
		return fmt.Errorf("find our end of the pair: %w", err)
	}
	far, err := host.LinkByIndex(d.near.Attrs().ParentIndex)
	if err != nil {
		return fmt.Errorf("find the host's end of the pair: %w", err)
	}
	d.name = far.Attrs().Name
	if err := errors.Join(d.ns.handle.LinkSetARPOff(d.near), host.LinkSetARPOff(far)); err != nil {
		return fmt.Errorf("keep %s from asking for addresses: %w", d.name, err)
	}
	return nil
}

// control opens what configures WireGuard. The kernel offers that once the interface's driver is there.
func (d *Device) control() error {
	err := d.ns.do(func() (err error) {
		d.client, err = wgctrl.New()
		return err
	})
	if err != nil {
		return fmt.Errorf("open the kernel's control of wireguard: %w", err)
	}
	return d.listen()
}

// routes lead everything to WireGuard, which knows what goes to whom, but what is for the host's addresses. mu is held, or
// nobody else knows of the device yet.
func (d *Device) routes() error {
	for _, text := range []string{"0.0.0.0/0", "::/0"} {
		p := netip.MustParsePrefix(text)
		if err := d.ns.handle.RouteReplace(route(d.wg, p)); err != nil && !(p.Addr().Is6() && noIPv6(err)) {
			return fmt.Errorf("lead packets to wireguard: %w", err)
		}
	}
	for _, addr := range d.addrs {
		if err := d.ns.handle.RouteReplace(route(d.near, netip.PrefixFrom(addr, addr.BitLen()))); err != nil && !(addr.Is6() && noIPv6(err)) {
			return fmt.Errorf("lead packets for %s to the host: %w", addr, err)
		}
	}
	return nil
}

func route(over netlink.Link, p netip.Prefix) *netlink.Route {
	r := &netlink.Route{
		LinkIndex: over.Attrs().Index,
		Dst:       &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
		Type:      unix.RTN_UNICAST,
	}
	if p.Addr().Is4() {
		r.Scope = netlink.SCOPE_LINK
	}
	return r
}

// noIPv6 reports that the kernel refused because IPv6 is switched off.
func noIPv6(err error) bool {
	return errors.Is(err, unix.EACCES) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) ||
		errors.Is(err, unix.EPROTONOSUPPORT)
}

// Name is the host's end of the cable: the interface that programs see.
func (d *Device) Name() string { return d.name }

// SetAddresses says which addresses the host's interface has: packets for them, and no others, leave the namespace there.
func (d *Device) SetAddresses(addrs []netip.Addr) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return net.ErrClosed
	}
	for _, old := range d.addrs {
		_ = d.ns.handle.RouteDel(route(d.near, netip.PrefixFrom(old, old.BitLen()))) // gone already where IPv6 went
	}
	d.addrs = addrs
	return d.routes()
}

// SetMTU bounds what goes through WireGuard, in bytes. Below 1280 the kernel takes the routes of IPv6 away, until
// [Device.SetAddresses].
func (d *Device) SetMTU(mtu int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return net.ErrClosed
	}
	for _, l := range []netlink.Link{d.wg, d.near} {
		if err := d.ns.handle.LinkSetMTU(l, mtu); err != nil {
			return fmt.Errorf("set the mtu of %s to %d: %w", l.Attrs().Name, mtu, err)
		}
	}
	return nil
}

// Listen opens a socket in the namespace, which only the device and other such sockets can reach.
func (d *Device) Listen(ctx context.Context) (c *udpconn.Conn, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, net.ErrClosed
	}
	err = d.ns.do(func() error {
		c, err = udpconn.Listen(ctx, udpconn.Options{Network: "udp4", Addr: "127.0.0.1:0"})
		return err
	})
	return c, err
}

// Addr is where the device takes packets.
func (*Device) Addr() netip.AddrPort { return address }

// Close removes everything. Further calls do nothing.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	var errs []error
	for _, l := range []netlink.Link{d.near, d.wg} {
		if l == nil {
			continue
		}
		if err := d.ns.handle.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) { // the cable has gone with its other end
			errs = append(errs, fmt.Errorf("remove %s: %w", l.Attrs().Name, err))
		}
	}
	if d.client != nil {
		errs = append(errs, d.client.Close())
	}
	d.ns.close()
	return errors.Join(errs...)
}

// explain turns what the kernel said into a problem.
func explain(err error) error {
	switch {
	case errors.Is(err, errNoWireGuard):
		return problem.Wrap(err, problem.Unsupported, "this host's kernel has no WireGuard",
			"load it with `modprobe wireguard` (Linux 5.6 or later), or use --mode tun, which needs none")
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return problem.Wrap(err, problem.NeedsPrivilege, "kernel WireGuard needs root, or CAP_NET_ADMIN and CAP_SYS_ADMIN",
			"run the command with sudo -E (plain sudo drops what the job needs to ask for a token), or use --mode proxy, which needs no privilege")
	case errors.Is(err, unix.EROFS):
		return problem.Wrap(err, problem.Unsupported, "network settings cannot be written here: /proc/sys is read-only",
			"use --mode tun, which writes none")
	}
	return problem.Wrap(err, problem.Failed, fmt.Sprintf("setting up kernel WireGuard failed: %v", err), "use --mode tun, which needs none")
}
