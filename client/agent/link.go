package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/culvertnet/culvert/client/host"
	"github.com/culvertnet/culvert/client/kernel"
	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/tunnel"
)

// link is where packets leave and enter this host: an interface of the kernel's or a network stack in the process.
type link interface {
	// Device is the packet side, which closes the link when it is closed; nil where WireGuard gives one.
	Device() tun.Device
	// WireGuard is what speaks the protocol, and closes the link when it is closed; nil where the tunnel itself does.
	WireGuard() tunnel.Device
	Close() error
	// Name of the interface; "" without one.
	Name() string
	SetAddresses([]netip.Addr) error
	// SetMTU bounds the packets that go into the tunnel, in bytes.
	SetMTU(mtu int) error
	// SetRoutes makes want go into the tunnel, less keep; it tells what else was left out.
	SetRoutes(want []netip.Prefix, keep []netip.Addr) (left []host.Yield, err error)
	// Shared is what other tunnels that the same programs use lead to as well, and Lead has single addresses lead here all the same.
	Shared() []netip.Prefix
	Lead(...netip.Addr) error
	// Established takes stock of the connections through the tunnel and gives what resets these and no others.
	Established() (reset func() error, err error)
	// DialContext opens a connection to "IP:port" through the tunnel.
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// openLink makes the link of a mode; user is whose interface it is.
func openLink(mode Mode, user int, log *slog.Logger) (link, error) {
	switch mode {
	case ModeTUN:
		i, err := host.Open(host.Options{User: user, Logger: log})
		if err != nil {
			return nil, err
		}
		return newHostLink(i), nil
	case ModeKernel:
		return openKernel(user, log)
	}
	d, err := netstack.New(netstack.Options{Logger: log})
	if err != nil {
		return nil, err
	}
	return &stackLink{device: d}, nil
}

// hostLink is an interface; the kernel's routes lead into it.
type hostLink struct {
	*host.Interface
	dialer net.Dialer
}

func newHostLink(i *host.Interface) *hostLink {
	return &hostLink{Interface: i, dialer: net.Dialer{Control: i.Bound}}
}

// DialContext dials as any program would, the routes lead into the tunnel, but never into another one.
func (l *hostLink) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return l.dialer.DialContext(ctx, network, address)
}

// WireGuard is nil: the tunnel speaks it.
func (*hostLink) WireGuard() tunnel.Device { return nil }

// kernelLink is an interface behind which the kernel speaks WireGuard.
type kernelLink struct {
	*hostLink
	device *kernel.Device
}

func openKernel(user int, log *slog.Logger) (link, error) {
	d, err := kernel.Open(kernel.Options{})
	if err != nil {
		return nil, err
	}
	i, err := host.Adopt(host.Options{Name: d.Name(), User: user, Logger: log})
	if err != nil {
		_ = d.Close()
		return nil, err
	}
	return &kernelLink{newHostLink(i), d}, nil
}

// WireGuard is the kernel's.
func (l *kernelLink) WireGuard() tunnel.Device { return outer{l.device, l} }

// outer is the kernel's WireGuard with the interface in front of it.
type outer struct {
	tunnel.Device
	link *kernelLink
}

// Close closes both.
func (o outer) Close() error { return o.link.Close() }

// Close removes the interface, then what is behind it.
func (l *kernelLink) Close() error { return errors.Join(l.Interface.Close(), l.device.Close()) }

// SetAddresses sets the interface's, and leads there what WireGuard has for them.
func (l *kernelLink) SetAddresses(addrs []netip.Addr) error {
	return errors.Join(l.Interface.SetAddresses(addrs), l.device.SetAddresses(addrs))
}

// SetMTU bounds the packets on both sides of the cable.
func (l *kernelLink) SetMTU(mtu int) error {
	return errors.Join(l.Interface.SetMTU(mtu), l.device.SetMTU(mtu))
}

// stackLink is a network stack; what goes into it is decided by whoever dials.
type stackLink struct {
	device *netstack.Device
}

// Device is the packet side.
func (l *stackLink) Device() tun.Device { return l.device }

// WireGuard is nil: the tunnel speaks it.
func (*stackLink) WireGuard() tunnel.Device { return nil }

// Close ends the stack.
func (l *stackLink) Close() error { return l.device.Close() }

// Name is empty: there is no interface.
func (l *stackLink) Name() string { return "" }

// SetAddresses replaces the stack's addresses.
func (l *stackLink) SetAddresses(addrs []netip.Addr) error { return l.device.SetAddresses(addrs) }

// SetMTU bounds what the stack sends.
func (l *stackLink) SetMTU(mtu int) error {
	l.device.SetPathMTU(func(netip.Addr) int { return mtu })
	return nil
}

// SetRoutes has nothing to do: the agent itself asks what is inside.
func (l *stackLink) SetRoutes([]netip.Prefix, []netip.Addr) ([]host.Yield, error) { return nil, nil }

// Shared is nothing: no program sends here by itself.
func (l *stackLink) Shared() []netip.Prefix { return nil }

// Lead has nothing to do either.
func (l *stackLink) Lead(...netip.Addr) error { return nil }

// Established is about the stack's connections.
func (l *stackLink) Established() (func() error, error) {
	reset := l.device.Established()
	return func() error { reset(); return nil }, nil
}

// DialContext dials from the stack.
func (l *stackLink) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return l.device.DialContext(ctx, network, address)
}
