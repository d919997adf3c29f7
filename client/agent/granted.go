package agent

import (
	"context"
	"net"
	"net/netip"
	"strconv"

	granted "github.com/culvertnet/culvert/client/names"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// setNames takes the names that a gateway grants. They stay until the next gateway grants others, so that a name that was the
// tunnel's is not asked for outside while there is no session.
func (a *Agent) setNames(n *wire.Names) {
	if refused := a.granted.Set(n); len(refused) > 0 {
		a.log.Warn("some of the names that are granted are the runner's own, and stay outside the tunnel", "names", refused)
	}
}

// newNames makes what looks granted names up.
func (a *Agent) newNames() *granted.Resolver {
	r := granted.NewResolver(a.dialInside, append([]string{a.opts.url.Hostname()}, a.opts.Reserved...)...)
	r.OnAddress = a.onAddress
	return r
}

// lookupInside gives the address of a granted name; ok is false for other hosts, which this host knows.
func (a *Agent) lookupInside(ctx context.Context, host string) (addr netip.Addr, ok bool, err error) {
	if !a.granted.Covers(host) {
		return netip.Addr{}, false, nil
	}
	addr, err = a.granted.Lookup(ctx, host)
	return addr, true, err
}

// resolve gives the addresses of "host:port": a granted name's from the gateway, other names' from this host.
func (a *Agent) resolve(ctx context.Context, target string) ([]netip.AddrPort, error) {
	host, service, err := net.SplitHostPort(target)
	if err != nil || !a.granted.Covers(host) {
		return a.resolveHere(ctx, target)
	}
	port, err := net.DefaultResolver.LookupPort(ctx, "tcp", service)
	if err != nil {
		return nil, problem.Wrap(err, problem.Usage, service+" is not a port", "write it like db.internal:5432")
	}
	addr, err := a.granted.Lookup(ctx, host)
	if err != nil {
		return nil, err
	}
	return []netip.AddrPort{netip.AddrPortFrom(addr, uint16(port))}, nil
}

// asked is what the gateway is asked to try for "host:port": a granted name as it is, because only the gateway knows where it
// leads, and the addresses of any other host.
func (a *Agent) asked(ctx context.Context, target string) ([]string, error) {
	if host, service, err := net.SplitHostPort(target); err == nil && a.granted.Covers(host) {
		if port, err := net.DefaultResolver.LookupPort(ctx, "tcp", service); err == nil {
			return []string{net.JoinHostPort(host, strconv.Itoa(port))}, nil
		}
	}
	addrs, err := a.resolveHere(ctx, target)
	targets := make([]string, len(addrs))
	for i, addr := range addrs {
		targets[i] = addr.String()
	}
	return targets, err
}
