package lab

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const wan = "wan" // a NAT's interface towards the internet

// NATOptions describe a NAT. The zero value is [Easy] on a plain link.
type NATOptions struct {
	Kind Kind
	Link Link // towards the internet
	// IPv6 gives the hosts behind it global addresses, with a firewall that lets answers in alone ([Open]: everything).
	IPv6 bool
	// LAN is what the private addresses behind it are taken from, a /16; default one of its own. Two NATs may have the same.
	LAN netip.Prefix
}

// NAT is a router that hides the hosts behind it.
type NAT struct {
	net    *Net
	ns     *namespace
	name   string
	kind   Kind
	public address
	lan    [2]byte // first two bytes of the private addresses
	number int
	hosts  int
}

// NAT attaches a NAT to the internet.
func (n *Net) NAT(name string, opts NATOptions) (*NAT, error) {
	if opts.Kind.rules == nil {
		opts.Kind = Easy
	}
	nat, err := n.buildNAT(name, opts)
	if err != nil {
		return nil, fmt.Errorf("build NAT %s: %w", name, err)
	}
	return nat, nil
}

func (n *Net) buildNAT(name string, opts NATOptions) (*NAT, error) {
	ns, err := n.space(true)
	if err != nil {
		return nil, err
	}
	nat := &NAT{net: n, ns: ns, name: name, kind: opts.Kind}
	nat.number, nat.lan = n.nextLAN()
	if opts.LAN.IsValid() {
		nat.lan = [2]byte(opts.LAN.Addr().AsSlice())
	}
	if nat.public, err = n.attach(ns, wan, opts.Link, opts.IPv6); err != nil {
		return nil, err
	}
	if opts.IPv6 {
		if err := n.router.route(nat.lan6(), nat.public.v6.Addr()); err != nil {
			return nil, err
		}
	}
	if opts.Link.MTU > 0 {
		if err := ns.clampMSS(opts.Link.MTU); err != nil {
			return nil, err
		}
	}
	return nat, nat.rule(nat.kind.rules)
}

// rule adds rules in the NAT's namespace.
func (t *NAT) rule(add func(*rules)) error {
	return t.ns.rule(func(r *rules) {
		r.public, r.lan = t.public.Addr(), t.LAN()
		add(r)
	})
}

// nextLAN gives each NAT private addresses of its own: 192.168.k.0/24, then 10.20.k.0/24, 10.21.k.0/24 and so on.
func (n *Net) nextLAN() (number int, lan [2]byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.nats++
	if n.nats == 1 {
		return 1, [2]byte{192, 168}
	}
	return n.nats, [2]byte{10, byte(18 + n.nats)}
}

// Public is the address under which hosts behind the NAT appear, unless they have a public one of their own.
func (t *NAT) Public() netip.Addr { return t.public.Addr() }

// LAN covers the private addresses behind the NAT.
func (t *NAT) LAN() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{t.lan[0], t.lan[1]}), 16)
}

// lan6 covers the IPv6 addresses behind the NAT: a /48 out of RFC 3849's documentation range.
func (t *NAT) lan6() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0x10, byte(t.number)}), 48)
}

// Router is the NAT itself as a host, for programs that run on it.
func (t *NAT) Router() *Host {
	return &Host{net: t.net, ns: t.ns, name: t.name, addr: t.public, public: t.public.Addr()}
}

// Forget drops every mapping, as a NAT does that starts anew.
func (t *NAT) Forget() error {
	if err := t.ns.handle.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		return fmt.Errorf("forget the mappings of NAT %s: %w", t.name, err)
	}
	return nil
}

// ForgetUDP drops the mappings of UDP alone: what was let in because of earlier flows is not any more, and connections stay.
func (t *NAT) ForgetUDP() error {
	filter := &netlink.ConntrackFilter{}
	err := filter.AddProtocol(unix.IPPROTO_UDP)
	if err == nil {
		_, err = t.ns.handle.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, filter)
	}
	if err != nil {
		return fmt.Errorf("forget the UDP mappings of NAT %s: %w", t.name, err)
	}
	return nil
}

// attach connects a host to the private side and gives its addresses.
func (t *NAT) attach(ns *namespace, opts HostOptions) (address, error) {
	t.hosts++
	near, far, err := t.subnet()
	if err != nil {
		return address{}, err
	}
	if t.public.v6.IsValid() {
		net := t.lan6().Addr().As16()
		net[7], net[15] = byte(t.hosts), 1
		near.v6 = netip.PrefixFrom(netip.AddrFrom16(net), 64)
		net[15] = 10
		far.v6 = netip.PrefixFrom(netip.AddrFrom16(net), 64)
	}
	inside := end{ns: t.ns, name: fmt.Sprintf("lan%d", t.hosts), addr: near}
	host := end{ns: ns, name: "eth0", addr: far, gateway: near}
	if err := vethPair(inside, host, Link{MTU: opts.MTU}.mtu()); err != nil {
		return address{}, err
	}
	if opts.Proxy && t.kind.Is(OnlyProxy) {
		return far, t.rule(func(r *rules) { r.exempt(far.Addr()) })
	}
	if t.hosts > 1 || t.kind.first == nil {
		return far, nil
	}
	return far, t.rule(func(r *rules) { t.kind.first(r, far.Addr()) })
}

// subnet gives the IPv4 network of the link to the next host: private, or public for the first host of an open router.
func (t *NAT) subnet() (near, far address, err error) {
	if !t.kind.public || t.hosts > 1 {
		base := [4]byte{t.lan[0], t.lan[1], byte(t.hosts), 0}
		return address{v4: netip.PrefixFrom(offset(base, 1), 24)}, address{v4: netip.PrefixFrom(offset(base, 10), 24)}, nil
	}
	_, near.v4, far.v4, err = t.net.nextPublic()
	if err != nil {
		return near, far, err
	}
	return near, far, t.net.router.route(near.v4.Masked(), t.public.Addr())
}
