package egress

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/eyeballs"
)

const (
	// maxAddresses of one name are tried.
	maxAddresses = 8
	// avoidFor is how long an address that was left comes after all others.
	avoidFor = time.Minute
)

// Dialer opens connections to names that may have several addresses, of one family or of two: it tries them beside each other, each a
// moment after the one before (RFC 8305), so that one that does not answer costs that moment. [net.Dialer] does so for two families alone. It is safe
// for concurrent use.
type Dialer struct {
	net.Dialer // for one address; its Timeout is for all of them together

	// Lookup finds a name's addresses, the best first; nil asks the system.
	Lookup func(ctx context.Context, host string) ([]netip.Addr, error)

	dial dialFunc // nil: the one of net.Dialer

	mu    sync.Mutex
	avoid map[netip.AddrPort]time.Time // until when
}

// Avoid has an address tried after all others for a minute: what is behind it answers, but cannot serve.
func (d *Dialer) Avoid(addr netip.AddrPort) {
	addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.avoid == nil || len(d.avoid) >= 8*maxAddresses {
		d.avoid = map[netip.AddrPort]time.Time{}
	}
	d.avoid[addr] = time.Now().Add(avoidFor)
}

// DialContext connects to "host:port" by TCP.
func (d *Dialer) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	host, service, err := net.SplitHostPort(addr)
	if err != nil {
		return d.one(ctx, network, addr)
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return d.one(ctx, network, addr)
	}
	if d.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d.Timeout)
		defer cancel()
	}
	port, err := net.DefaultResolver.LookupPort(ctx, network, service)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err}
	}
	found, err := d.resolve(ctx, host)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err}
	}
	if len(found) == 0 {
		return nil, &net.OpError{Op: "dial", Net: network, Err: &net.DNSError{Err: "no address", Name: host, IsNotFound: true}}
	}
	return d.race(ctx, network, d.order(found, uint16(port)))
}

func (d *Dialer) one(ctx context.Context, network, addr string) (net.Conn, error) {
	if d.dial != nil {
		return d.dial(ctx, network, addr)
	}
	return d.Dialer.DialContext(ctx, network, addr)
}

func (d *Dialer) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	if d.Lookup != nil {
		return d.Lookup(ctx, host)
	}
	resolver := cmp.Or(d.Resolver, net.DefaultResolver)
	return resolver.LookupNetIP(ctx, "ip", host)
}

// order gives the addresses in the order in which they are tried: families in turn, and those to be avoided last.
func (d *Dialer) order(found []netip.Addr, port uint16) []netip.AddrPort {
	for i := range found {
		found[i] = found[i].Unmap()
	}
	var list, last []netip.AddrPort
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	for _, a := range eyeballs.Interleave(found) {
		to := netip.AddrPortFrom(a, port)
		switch {
		case slices.Contains(list, to) || slices.Contains(last, to):
		case now.Before(d.avoid[to]):
			last = append(last, to)
		default:
			list = append(list, to)
		}
	}
	list = append(list, last...)
	return list[:min(len(list), maxAddresses)]
}

// race gives the first connection that stands. The error is the first that was met.
func (d *Dialer) race(ctx context.Context, network string, list []netip.AddrPort) (net.Conn, error) {
	if len(list) == 1 {
		return d.one(ctx, network, list[0].String())
	}
	conn, err := eyeballs.Dial(ctx, list, func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
		return d.one(ctx, network, to.String())
	})
	if several, ok := err.(interface{ Unwrap() []error }); ok {
		err = several.Unwrap()[0]
	}
	if op := (*net.OpError)(nil); err != nil && !errors.As(err, &op) {
		err = &net.OpError{Op: "dial", Net: network, Addr: net.TCPAddrFromAddrPort(list[0]), Err: err}
	}
	return conn, err
}
