//go:build unix

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// HostOptions describe a host. The zero value is a host on the internet with a plain link.
type HostOptions struct {
	Behind *NAT // private, behind this NAT; nil puts it on the internet
	Link   Link // towards the internet; not with Behind
	IPv6   bool // an IPv6 address as well; behind a NAT it is the NAT that decides
	// MTU of the link to a host behind a NAT, default 1500. The NAT says what does not fit, as routers are to (RFC 1191).
	MTU   uint16
	Proxy bool // may reach TCP port 443 of the internet where the NAT is [OnlyProxy]
	// Flat is the host's address in a flat lab; default a loopback address of its own.
	Flat netip.Addr
}

// address is what an interface has: IPv4, and IPv6 where it is wanted.
type address struct {
	v4, v6 netip.Prefix
}

// Addr is the IPv4 address.
func (a address) Addr() netip.Addr { return a.v4.Addr() }

// all lists the addresses with their prefixes.
func (a address) all() []netip.Prefix {
	if a.v6.IsValid() {
		return []netip.Prefix{a.v4, a.v6}
	}
	return []netip.Prefix{a.v4}
}

// Host is one computer of the lab.
type Host struct {
	net    *Net
	ns     *namespace // nil: this machine itself
	name   string
	addr   address
	public netip.Addr
}

// Host adds a host.
func (n *Net) Host(name string, opts HostOptions) (*Host, error) {
	h := &Host{net: n, name: name}
	if opts.Behind != nil && opts.Link != (Link{}) {
		return nil, fmt.Errorf("build host %s: behind a NAT it is the NAT that has a link", name)
	}
	if n.Flat() {
		h.public = opts.Flat
		if !h.public.IsValid() {
			h.public = n.nextLoopback()
		}
		h.addr.v4 = netip.PrefixFrom(h.public, h.public.BitLen())
		return h, nil
	}
	if err := h.build(opts); err != nil {
		return nil, fmt.Errorf("build host %s: %w", name, err)
	}
	return h, nil
}

func (h *Host) build(opts HostOptions) (err error) {
	if h.ns, err = h.net.space(false); err != nil {
		return err
	}
	if opts.Behind == nil {
		h.addr, err = h.net.attach(h.ns, "eth0", opts.Link, opts.IPv6)
		h.public = h.addr.Addr()
		return err
	}
	if h.addr, err = opts.Behind.attach(h.ns, opts); err != nil {
		return err
	}
	if h.public = h.addr.Addr(); h.public.IsPrivate() {
		h.public = opts.Behind.Public()
	}
	return nil
}

// MachineAddr is an IPv4 address of this machine beyond loopback, invalid where it has none. Programs treat it as they
// treat any host's, which is more than can be said of loopback.
func MachineAddr() netip.Addr {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return netip.Addr{}
	}
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err == nil && p.Addr().Is4() && p.Addr().IsGlobalUnicast() {
			return p.Addr()
		}
	}
	return netip.Addr{}
}

// Name is the host's name.
func (h *Host) Name() string { return h.name }

// Addr is the host's address on its own interface eth0.
func (h *Host) Addr() netip.Addr { return h.addr.Addr() }

// AllowPing lets every user of the host open ping sockets, as distributions do by default (icmp(7), ping_group_range).
func (h *Host) AllowPing() error {
	if h.ns == nil {
		return nil
	}
	if h.ns.sysctl("net/ipv4/ping_group_range", "0 65534") == nil {
		return nil
	}
	return h.ns.sysctl("net/ipv4/ping_group_range", "0 0") // there is one user only, inside [Enter]
}

// Addr6 is its IPv6 address there, invalid where it has none.
func (h *Host) Addr6() netip.Addr { return h.addr.v6.Addr() }

// Public is the address under which the internet sees the host: its own, or that of the NAT in front of it.
func (h *Host) Public() netip.Addr { return h.public }

// Namespace is a file that stands for the host's network namespace while this process runs, "" in a flat lab.
func (h *Host) Namespace() string {
	if h.ns == nil {
		return ""
	}
	return h.ns.path()
}

// Do runs f on the caller's goroutine inside the host. Sockets that f opens stay there; goroutines that f starts do not, so
// what dials on goroutines of its own (an http.Client, say) takes [Host.Dial].
func (h *Host) Do(f func() error) error {
	if h.ns == nil {
		return f()
	}
	return h.ns.do(f)
}

// Dial connects from the host. address is "IP:port": names are not resolved.
func (h *Host) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("dial from host %s: %w", h.name, err)
	}
	err = h.Do(func() error {
		var d net.Dialer
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens on the host, TCP.
func (h *Host) Listen(address string) (l net.Listener, err error) {
	err = h.Do(func() error { l, err = net.Listen("tcp", address); return err })
	return l, err
}

// ListenPacket listens on the host, UDP.
func (h *Host) ListenPacket(address string) (c net.PacketConn, err error) {
	err = h.Do(func() error { c, err = net.ListenPacket("udp", address); return err })
	return c, err
}

// Client is an HTTP client on the host that keeps no connection. It knows no proxy.
func (h *Host) Client(timeout time.Duration) *http.Client {
	return &http.Client{Timeout: timeout, Transport: &http.Transport{DialContext: h.Dial, DisableKeepAlives: true}}
}

// Mapped asks server, a UDP service that answers with the address it saw (see [Host.ServeMirror]), from conn.
func Mapped(conn net.PacketConn, server netip.AddrPort, timeout time.Duration) (netip.AddrPort, error) {
	buf := make([]byte, 64)
	deadline := time.Now().Add(timeout)
	if err := conn.SetReadDeadline(deadline); err != nil {
		return netip.AddrPort{}, err
	}
	if _, err := conn.WriteTo([]byte("who am I?"), net.UDPAddrFromAddrPort(server)); err != nil {
		return netip.AddrPort{}, err
	}
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return netip.AddrPort{}, err
		}
		if unmapped(from) == server {
			return netip.ParseAddrPort(string(buf[:n]))
		}
	}
}

// ServeMirror answers every datagram to address with the address it came from, as text, until stop is called.
func (h *Host) ServeMirror(address string) (at netip.AddrPort, stop func(), err error) {
	return h.serveUDP(address, func(_ []byte, from net.Addr) []byte { return []byte(unmapped(from).String()) })
}

// ServeEcho answers every datagram to address with itself, until stop is called.
func (h *Host) ServeEcho(address string) (at netip.AddrPort, stop func(), err error) {
	return h.serveUDP(address, func(b []byte, _ net.Addr) []byte { return b })
}

func (h *Host) serveUDP(address string, answer func([]byte, net.Addr) []byte) (netip.AddrPort, func(), error) {
	conn, err := h.ListenPacket(address)
	if err != nil {
		return netip.AddrPort{}, nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 64<<10)
		for {
			n, from, err := conn.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = conn.WriteTo(answer(buf[:n], from), from)
			}
		}
	}()
	return unmapped(conn.LocalAddr()), func() { conn.Close(); <-done }, nil
}

// unmapped is a UDP address as a plain IPv4 address where a dual-stack socket shows it as IPv6.
func unmapped(addr net.Addr) netip.AddrPort {
	at := addr.(*net.UDPAddr).AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}
