package agent

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	gatherEvery = 20 * time.Second // well under the 30 s after which careless NATs forget a UDP mapping
	stunTimeout = 5 * time.Second
	maxSTUN     = 4 // servers asked, of those that a coordinator names
)

// gatherer knows where the gateway may be reached. Asking the STUN servers again and again also keeps the NAT's mapping open.
type gatherer struct {
	port      uint16
	public    netip.AddrPort
	mapped    func() (wire.Candidate, bool) // the port that a router forwards
	fallback  string                        // host of a STUN server that names none
	reflexive func(context.Context, netip.AddrPort) (netip.AddrPort, error)
	resolve   func(context.Context, string) ([]netip.Addr, error)
	host      func(uint16) ([]wire.Candidate, error)
	refresh   func() error // beside each round: the machine's own addresses
	changed   func([]wire.Candidate)
	log       *slog.Logger
	kick      chan struct{} // capacity 1: gather now

	mu      sync.Mutex
	servers []string
	seen    map[string]netip.AddrPort // by server and address family, the last that was heard
	now     []wire.Candidate
}

func newGatherer(port uint16, o *Options, log *slog.Logger) *gatherer {
	return &gatherer{
		port: port, public: o.PublicAddress, fallback: o.stunFallback(), log: log,
		resolve: func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		},
		host:   func(port uint16) ([]wire.Candidate, error) { return nat.HostCandidates(port, nat.SkipVirtual) },
		mapped: func() (wire.Candidate, bool) { return wire.Candidate{}, false },
		kick:   make(chan struct{}, 1), seen: map[string]netip.AddrPort{},
	}
}

// current gives the candidates as last gathered.
func (g *gatherer) current() []wire.Candidate {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.now
}

// setServers takes the STUN servers of a welcome and asks them at once.
func (g *gatherer) setServers(servers []string) {
	g.mu.Lock()
	g.servers = slices.Clone(servers[:min(len(servers), maxSTUN)])
	g.mu.Unlock()
	g.again()
}

// again has the candidates gathered now. It does not wait.
func (g *gatherer) again() {
	select {
	case g.kick <- struct{}{}:
	default:
	}
}

// run gathers until ctx ends.
func (g *gatherer) run(ctx context.Context) {
	tick := time.NewTicker(gatherEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-g.kick:
		case <-ctx.Done():
			return
		}
		if err := g.refresh(); err != nil {
			g.log.Warn("the machine's addresses cannot be read; the last ones stay in force", "err", err)
		}
		g.tell(ctx) // what is known without asking anybody
		g.ask(ctx)
		g.tell(ctx)
	}
}

// tell tells of candidates that have changed.
func (g *gatherer) tell(ctx context.Context) {
	if ctx.Err() == nil && g.update() {
		g.changed(g.current())
	}
}

// ask asks all servers at once.
func (g *gatherer) ask(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, stunTimeout)
	defer cancel()
	g.mu.Lock()
	servers := g.servers
	g.mu.Unlock()
	var wg sync.WaitGroup
	for _, s := range servers {
		for _, addr := range g.lookup(ctx, s) {
			wg.Go(func() {
				seen, err := g.reflexive(ctx, addr)
				if err != nil {
					g.log.Debug("a STUN server did not answer", "addr", addr, "err", err)
					return
				}
				g.mu.Lock()
				defer g.mu.Unlock()
				g.seen[s+family(addr.Addr())] = netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port())
			})
		}
	}
	wg.Wait()
}

// lookup gives at most one address of each family for a server.
func (g *gatherer) lookup(ctx context.Context, server string) []netip.AddrPort {
	host, text, err := net.SplitHostPort(server)
	port, perr := strconv.ParseUint(text, 10, 16)
	if err != nil || perr != nil || port == 0 {
		g.log.Warn("the coordinator names a STUN server that is not host:port", "addr", server)
		return nil
	}
	if host == "" {
		host = g.fallback
	}
	addrs, err := g.resolve(ctx, host)
	if err != nil {
		g.log.Warn("a STUN server's name does not resolve", "addr", server, "err", err)
		return nil
	}
	var out []netip.AddrPort
	for _, a := range addrs {
		a = a.Unmap()
		if !slices.ContainsFunc(out, func(o netip.AddrPort) bool { return o.Addr().Is4() == a.Is4() }) {
			out = append(out, netip.AddrPortFrom(a, uint16(port)))
		}
	}
	return out
}

func family(a netip.Addr) string {
	if a.Is4() {
		return " 4"
	}
	return " 6"
}

// update puts the candidates together and reports whether they differ from the last ones.
func (g *gatherer) update() bool {
	next, err := g.host(g.port)
	if err != nil {
		g.log.Warn("the interfaces cannot be listed", "err", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.public.IsValid() {
		next = slices.Insert(next, 0, wire.Candidate{Kind: wire.Public, Addr: g.public})
	}
	if c, ok := g.mapped(); ok {
		next = append(next, c)
	}
	for _, s := range g.servers {
		for _, f := range []string{" 4", " 6"} {
			if seen, ok := g.seen[s+f]; ok {
				next = append(next, wire.Candidate{Kind: wire.Reflexive, Addr: seen})
			}
		}
	}
	next = distinct(next)
	if slices.Equal(next, g.now) {
		return false
	}
	g.now = next
	return true
}

// distinct keeps the first candidate at each address, at most [wire.MaxCandidates]: a host without a NAT sees its own address at
// the STUN server, which stays a host candidate. Interfaces beyond the limit are left out, never what was configured or reflexive.
func distinct(in []wire.Candidate) []wire.Candidate {
	out := make([]wire.Candidate, 0, len(in))
	for _, c := range in {
		if !slices.ContainsFunc(out, func(o wire.Candidate) bool { return o.Addr == c.Addr }) {
			out = append(out, c)
		}
	}
	over := len(out) - wire.MaxCandidates
	return slices.DeleteFunc(out, func(c wire.Candidate) bool {
		over--
		return over >= 0 && c.Kind == wire.Host
	})
}
