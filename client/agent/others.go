package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/client/host"
	"github.com/culvertnet/culvert/internal/problem"
)

// others are the tunnels of the same user that run beside this one: a job may join several networks.
type others struct {
	mu     sync.Mutex
	asked  time.Time
	claims []control.Claim
}

// askAgain is how long what other tunnels have said counts.
const askAgain = 2 * time.Second

func (a *Agent) otherTunnels(ctx context.Context) []control.Claim {
	if a.opts.Name == "" {
		return nil
	}
	a.others.mu.Lock()
	defer a.others.mu.Unlock()
	if time.Since(a.others.asked) >= askAgain {
		a.others.claims, a.others.asked = control.Tunnels(ctx, a.opts.Name), time.Now()
	}
	return a.others.claims
}

// Claim is what this tunnel has of its host.
func (a *Agent) Claim() control.Claim {
	a.mu.Lock()
	s := a.session
	c := control.Claim{Name: a.opts.Name, Job: a.opts.Job, Coordinator: a.opts.Coordinator}
	if a.link != nil {
		c.Interface = a.link.Name()
	}
	if a.opts.Mode == ModeProxy && a.proxy != nil {
		c.Proxy = a.proxy.Addr()
	}
	a.mu.Unlock()
	if s == nil {
		return c
	}
	gw, _ := s.at()
	c.Network = s.Network
	a.routes.mu.Lock()
	c.Routes = slices.Clone(a.routes.want[min(len(gw.Addresses), len(a.routes.want)):])
	a.routes.mu.Unlock()
	if n := gw.Names; n != nil {
		c.Routes = host.Without(c.Routes, n.Services)
		c.Names = append(c.Names, n.Exact...)
		for _, suffix := range n.Suffixes {
			c.Names = append(c.Names, "*."+suffix)
		}
	}
	return c
}

// clash refuses a network that has the same as another one which the job has joined already: programs could not say which they mean.
func (a *Agent) clash(ctx context.Context) error {
	own := a.Claim()
	if own.Interface == "" {
		return nil // programs choose a proxy
	}
	for _, other := range a.otherTunnels(ctx) {
		if other.Interface == "" || other.Network == own.Network && other.Coordinator == own.Coordinator {
			continue
		}
		if both := inBoth(own, other); len(both) > 0 {
			return problem.New(problem.Overlap, fmt.Sprintf("network %q and network %q, which tunnel %q has joined, both grant %s",
				own.Network, other.Network, other.Name, strings.Join(both, ", ")),
				"have one of the two rules grant something else, keep addresses out of one network with direct (--direct), or use mode proxy for one of them")
		}
		if narrow := nested(own.Routes, other.Routes); len(narrow) > 0 {
			a.log.Warn("networks overlap: what is narrower goes to the network that grants it", "routes", narrow, "network", own.Network, "other", other.Network)
		}
	}
	return nil
}

// inBoth lists the names and prefixes that two tunnels have alike.
func inBoth(a, b control.Claim) []string {
	var both []string
	for _, name := range a.Names {
		if covers(b, name) {
			both = append(both, name)
		}
	}
	for _, name := range b.Names {
		if covers(a, name) && !slices.Contains(both, name) {
			both = append(both, name)
		}
	}
	for _, p := range a.Routes {
		if slices.Contains(b.Routes, p) {
			both = append(both, p.String())
		}
	}
	const shown = 8
	if more := len(both) - shown; more > 0 {
		both = append(both[:shown], fmt.Sprintf("and %d more", more))
	}
	return both
}

// covers reports whether a granted name, or all below one, is granted there as well.
func covers(c control.Claim, name string) bool {
	below, wild := strings.CutPrefix(name, "*")
	if !wild {
		return c.Covers(name)
	}
	return slices.ContainsFunc(c.Names, func(other string) bool {
		return strings.HasPrefix(other, "*") && strings.HasSuffix(below, strings.TrimPrefix(other, "*"))
	})
}

// nested lists the prefixes of each that lie in wider ones of the other.
func nested(a, b []netip.Prefix) []netip.Prefix {
	var narrow []netip.Prefix
	for _, p := range a {
		for _, q := range b {
			switch {
			case !p.Overlaps(q):
			case p.Bits() > q.Bits():
				narrow = append(narrow, p)
			default:
				narrow = append(narrow, q)
			}
		}
	}
	return narrow
}

// elsewhere gives the proxy of another tunnel of the same job to which a host belongs that is not this one's: with several networks in mode
// proxy, any of their proxies leads to all.
func (a *Agent) elsewhere(ctx context.Context, host string) (netip.AddrPort, bool) {
	if a.granted.Covers(host) {
		return netip.AddrPort{}, false
	}
	if addr, err := netip.ParseAddr(host); err == nil && a.inside(addr) {
		return netip.AddrPort{}, false
	}
	for _, other := range a.otherTunnels(ctx) {
		if other.Job == a.opts.Job && other.Proxy.Addr().IsLoopback() && other.Covers(host) {
			return other.Proxy, true
		}
	}
	return netip.AddrPort{}, false
}

// leadNames has the addresses of granted names lead into this tunnel where another network of the job has the same range of service
// addresses. What is below a wildcard follows as it is looked up.
func (a *Agent) leadNames(ctx context.Context, s *session) {
	gw, _ := s.at()
	n, l := gw.Names, a.openedLink()
	if n == nil {
		return
	}
	shared := l.Shared()
	disputed := slices.ContainsFunc(n.Services, func(p netip.Prefix) bool { return slices.Contains(shared, p) })
	a.disputed.Store(disputed)
	if !disputed {
		return
	}
	var group sync.WaitGroup
	slots := make(chan struct{}, 16)
	for _, name := range n.Exact {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			if addr, err := a.granted.Lookup(ctx, name); err == nil {
				a.lead(append(mirrors(addr, n.Services), addr)...)
			}
		})
	}
	group.Wait()
}

// mirrors gives the addresses of IPv6 that end in an IPv4 address of the same service.
func mirrors(four netip.Addr, services []netip.Prefix) []netip.Addr {
	var six []netip.Addr
	for _, p := range services {
		if !four.Is4() || !p.Addr().Is6() {
			continue
		}
		b, v := p.Addr().As16(), four.As4()
		copy(b[12:], v[:])
		if addr := netip.AddrFrom16(b); p.Contains(addr) {
			six = append(six, addr)
		}
	}
	return six
}

// lead has addresses that the gateway has given to names lead into this tunnel.
func (a *Agent) lead(addrs ...netip.Addr) {
	if err := a.openedLink().Lead(addrs...); err != nil {
		a.log.Warn("a granted name leads into another tunnel", "addr", addrs, "err", err)
	}
}

// onAddress hears of an address that the gateway gives to a name under a wildcard, before the program that asked does.
func (a *Agent) onAddress(addr netip.Addr) {
	if a.disputed.Load() {
		a.lead(addr)
	}
}
