package egress

import (
	"cmp"
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// attemptDelay is after how long without an answer the next address is tried as well (RFC 8305, section 5).
	attemptDelay = 250 * time.Millisecond
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

// order gives the addresses in the order in which they are tried: families in turn, beginning with that of the system's first choice (RFC 8305, section 4),
// and those to be avoided last.
func (d *Dialer) order(found []netip.Addr, port uint16) []netip.AddrPort {
	var families [2][]netip.AddrPort
	for _, a := range found {
		a = a.Unmap()
		i := 0
		if a.Is4() != found[0].Unmap().Is4() {
			i = 1
		}
		if to := netip.AddrPortFrom(a, port); !slices.Contains(families[i], to) {
			families[i] = append(families[i], to)
		}
	}
	var list, last []netip.AddrPort
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	for i := range max(len(families[0]), len(families[1])) {
		for _, f := range families {
			switch {
			case i >= len(f):
			case now.Before(d.avoid[f[i]]):
				last = append(last, f[i])
			default:
				list = append(list, f[i])
			}
		}
	}
	list = append(list, last...)
	return list[:min(len(list), maxAddresses)]
}

// race gives the first connection that stands, and waits until the other tries have ended. The error is that of the first address.
func (d *Dialer) race(ctx context.Context, network string, list []netip.AddrPort) (won net.Conn, first error) {
	ctx, cancel := context.WithCancel(ctx)
	var trying sync.WaitGroup
	defer trying.Wait()
	defer cancel()
	type outcome struct {
		conn net.Conn
		err  error
		n    int
	}
	outcomes, over := make(chan outcome), make(chan struct{})
	defer close(over)
	next := time.NewTimer(0)
	defer next.Stop()
	for begun, failed := 0, 0; failed < len(list); {
		select {
		case <-next.C:
			n := begun
			if begun++; begun < len(list) {
				next.Reset(attemptDelay)
			}
			trying.Go(func() {
				conn, err := d.one(ctx, network, list[n].String())
				select {
				case outcomes <- outcome{conn, err, n}:
				case <-over:
					if conn != nil {
						_ = conn.Close()
					}
				}
			})
		case o := <-outcomes:
			if o.err == nil {
				return o.conn, nil
			}
			if failed++; o.n == 0 || first == nil {
				first = o.err
			}
			if begun < len(list) {
				next.Reset(0)
			}
		}
	}
	return nil, first
}
