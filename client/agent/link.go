package agent

import (
	"context"
	"log/slog"
	"net"
	"net/netip"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/culvertnet/culvert/client/host"
	"github.com/culvertnet/culvert/internal/netstack"
)

// link is where packets leave and enter this host: an interface of the kernel's or a network stack in the process.
type link interface {
	Device() tun.Device
	// Name of the interface; "" without one.
	Name() string
	SetAddresses([]netip.Addr) error
	// SetMTU bounds the packets that go into the tunnel, in bytes.
	SetMTU(mtu int) error
	// SetRoutes makes want go into the tunnel, less keep; it tells what else was left out.
	SetRoutes(want []netip.Prefix, keep []netip.Addr) (left []netip.Prefix, err error)
	// Established takes stock of the connections through the tunnel and gives what resets these and no others.
	Established() (reset func() error, err error)
	// DialContext opens a connection to "IP:port" through the tunnel.
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

func openLink(mode Mode, log *slog.Logger) (link, error) {
	if mode == ModeTUN {
		i, err := host.Open(host.Options{})
		if err != nil {
			return nil, err
		}
		return &kernelLink{Interface: i}, nil
	}
	d, err := netstack.New(netstack.Options{Logger: log})
	if err != nil {
		return nil, err
	}
	return &stackLink{device: d}, nil
}

// kernelLink is an interface; the kernel's routes lead into it.
type kernelLink struct {
	*host.Interface
	dialer net.Dialer
}

// DialContext dials as any program would: the routes lead into the tunnel.
func (l *kernelLink) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return l.dialer.DialContext(ctx, network, address)
}

// stackLink is a network stack; what goes into it is decided by whoever dials.
type stackLink struct {
	device *netstack.Device
}

// Device is the packet side.
func (l *stackLink) Device() tun.Device { return l.device }

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
func (l *stackLink) SetRoutes([]netip.Prefix, []netip.Addr) ([]netip.Prefix, error) { return nil, nil }

// Established is about the stack's connections.
func (l *stackLink) Established() (func() error, error) {
	reset := l.device.Established()
	return func() error { reset(); return nil }, nil
}

// DialContext dials from the stack.
func (l *stackLink) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return l.device.DialContext(ctx, network, address)
}
