// Package host is what a tunnel needs from the operating system: the TUN device, its addresses and its routes. All of it
// hangs on the device's file descriptor, so that it is gone when the process is, however that dies. For the same reason
// there are no routing rules, no routes over other interfaces and no changes to existing routes: nothing would undo them
// after a kill.
package host

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"syscall"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/culvertnet/culvert/internal/problem"
)

// DefaultMTU leaves room for WireGuard's own headers over IPv6 on a path of 1,500 bytes.
const DefaultMTU = 1420

// Options configure an [Interface].
type Options struct {
	Name string // of the network interface, at most 15 bytes; default "culvert0", the next free number where taken
	MTU  int    // bytes, 1280 (RFC 8200, section 5) to 65535; default 1420
	// User is whose tunnel this is, by user id: other ordinary users of the host can send nothing into it, and where another user's
	// tunnel leads to the same places, each user's programs get their own. 0 is everybody's.
	User   int
	Logger *slog.Logger // default: none
}

// Validate fills in the defaults and refuses what cannot work, with the code usage.
func (o *Options) Validate() error {
	if err := checkName(o.Name); err != nil {
		return problem.Wrap(err, problem.Usage, fmt.Sprintf("%q cannot name a network interface: %v", o.Name, err),
			"use up to 15 letters, digits, dots, dashes and underscores")
	}
	if o.MTU == 0 {
		o.MTU = DefaultMTU
	}
	if o.MTU < 1280 || o.MTU > 65535 {
		return problem.New(problem.Usage, fmt.Sprintf("an MTU of %d cannot be used", o.MTU), "use 1280 to 65535 bytes, or leave it out")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

func checkName(name string) error {
	if len(name) > 15 {
		return errors.New("it is longer than 15 bytes")
	}
	if name == "." || name == ".." {
		return errors.New("it is reserved")
	}
	const allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_"
	if strings.Trim(name, allowed) != "" {
		return errors.New("it has other characters")
	}
	return nil
}

// Interface is a network interface with addresses and routes: a TUN device, unless it was adopted. Its methods are safe for concurrent use.
type Interface struct {
	link *link
}

// Open makes the device and brings it up, without address or route. Code needs-privilege without CAP_NET_ADMIN, unsupported
// off Linux or where there is no /dev/net/tun, usage for a name that is taken.
func Open(opts Options) (*Interface, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	l, err := openLink(opts)
	if err != nil {
		return nil, err
	}
	return &Interface{link: l}, nil
}

// Adopt takes over an interface that somebody else has made and whose name opts give, and brings it up. Its packets are none of our
// business, so it has no [Interface.Device], and opts.MTU is not used.
func Adopt(opts Options) (*Interface, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	l, err := adoptLink(opts)
	if err != nil {
		return nil, err
	}
	return &Interface{link: l}, nil
}

// Device is the packet side, for the tunnel. Closing it closes the interface, and waits for its event goroutines whether
// or not anybody reads the events.
func (i *Interface) Device() tun.Device { return i.link.device() }

// Name is the interface's name.
func (i *Interface) Name() string { return i.link.name }

// Close removes the interface with its addresses and routes. Further calls do nothing.
func (i *Interface) Close() error { return i.link.close() }

// SetAddresses replaces the interface's addresses. Where the host has IPv6 switched off, addresses of IPv6 are skipped, which
// is logged and shown by [Interface.Skipped].
func (i *Interface) SetAddresses(addrs []netip.Addr) error { return i.link.setAddresses(addrs) }

// SetMTU bounds the packets that the host sends into the interface, in bytes. Below 1280 the kernel takes the interface's IPv6
// addresses and routes away; they have to be set anew once there is room again.
func (i *Interface) SetMTU(mtu int) error { return i.link.setMTU(mtu) }

// Skipped gives the addresses of the last [Interface.SetAddresses] that the host cannot take because it has IPv6 switched off.
func (i *Interface) Skipped() []netip.Addr { return i.link.skippedAddresses() }

// Yield is a part of what is granted that stays with a link of the host's own.
type Yield struct {
	Prefix netip.Prefix
	Link   string // the name of the interface; "" where the host routes this one address elsewhere
}

// String says what stays where, as in "172.17.0.0/16 to docker0".
func (y Yield) String() string {
	if y.Link == "" {
		return y.Prefix.String()
	}
	return y.Prefix.String() + " to " + y.Link
}

// SetRoutes makes exactly these destinations go into the tunnel, less keep (what must stay outside: the tunnel's own peers,
// the coordinator) and less the subnets that are directly connected. It returns what was left out for that reason.
//
// A prefix that the host routes elsewhere already, 0.0.0.0/0 above all, is installed as its two halves: being longer, they
// win over the existing route without replacing it. New routes are added before old ones go, so that traffic for the tunnel
// never passes outside in between.
func (i *Interface) SetRoutes(want []netip.Prefix, keep []netip.Addr) (left []Yield, err error) {
	return i.link.setRoutes(want, keep)
}

// Shared gives what of the last [Interface.SetRoutes] another tunnel of the host led to before, whose programs are those of this one as well:
// by the route alone nobody gets here.
func (i *Interface) Shared() []netip.Prefix { return i.link.sharedRoutes() }

// Lead has single addresses lead here, for as long as the routes of [Interface.SetRoutes] hold them, whoever else leads there with a wider
// route. What is directly connected stays outside.
func (i *Interface) Lead(addrs ...netip.Addr) error { return i.link.lead(addrs) }

// Bound is a [net.Dialer.Control] that has connections go through this interface where another tunnel of the host leads to the same place.
func (i *Interface) Bound(network, address string, c syscall.RawConn) error {
	return i.link.bound(network, address, c)
}

// Established takes stock of the host's TCP connections that are established from the interface's addresses, and gives what resets
// these and no others. Where the kernel cannot (CONFIG_INET_DIAG_DESTROY), reset says so.
func (i *Interface) Established() (reset func() error, err error) { return i.link.established() }

// Privileged reports whether Open can work here: the process may make network devices, and there is a TUN driver.
func Privileged() bool { return privileged() }
