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
	found     func(wire.Mapping, []nat.Observation) // what the NAT does, and what was seen of it
	refresh   func() error                          // beside each round: the machine's own addresses
	relays    *relays
	changed   func([]wire.Candidate, wire.Mapping)
	log       *slog.Logger
	kick      chan struct{} // capacity 1: gather now

	mu      sync.Mutex
	servers []string
	seen    map[string]netip.AddrPort // by server and address family, the last that was heard
	round   []nat.Observation         // of the servers that answered in this round
	now     []wire.Candidate
	mapping wire.Mapping
	told    wire.Mapping // as [gatherer.changed] was last told
	doubt   wire.Mapping // what the last round said, where it said otherwise
}

func newGatherer(port uint16, o *Options, log *slog.Logger) *gatherer {
	return &gatherer{
		port: port, public: o.PublicAddress, fallback: o.stunFallback(), log: log,
		resolve: func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		},
		host:   func(port uint16) ([]wire.Candidate, error) { return nat.HostCandidates(port, nat.SkipVirtual) },
		mapped: func() (wire.Candidate, bool) { return wire.Candidate{}, false },
		found:  func(wire.Mapping, []nat.Observation) {},
		kick:   make(chan struct{}, 1), seen: map[string]netip.AddrPort{},
	}
}

// current gives candidates and mapping as last gathered.
func (g *gatherer) current() ([]wire.Candidate, wire.Mapping) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.now, g.mapping
}

// setServers takes the STUN servers of a welcome and asks them at once.
func (g *gatherer) setServers(servers []string) {
	g.mu.Lock()
	g.servers = slices.Clone(servers[:min(len(servers), maxSTUN)])
	g.mu.Unlock()
	g.again()
}

// moved forgets what was seen from where the machine was before, and gathers anew.
func (g *gatherer) moved() {
	g.mu.Lock()
	clear(g.seen)
	g.mapping, g.doubt = wire.MappingUnknown, wire.MappingUnknown
	g.found(g.mapping, nil)
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
		var wg sync.WaitGroup
		wg.Go(func() { g.relays.refresh(ctx) })
		g.ask(ctx)
		wg.Wait()
		g.classify()
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
	g.round = nil
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
				seen = netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port())
				g.seen[s+family(addr.Addr())] = seen
				g.round = append(g.round, nat.Observation{Server: addr, Mapped: seen})
			})
		}
	}
	wg.Wait()
}

// classify finds out how the NAT maps our socket. A mapping that changes between two questions looks like one that depends on
// the destination, so another opinion than before has to come twice.
func (g *gatherer) classify() {
	fromRelays := g.relays.observations()
	g.mu.Lock()
	defer g.mu.Unlock()
	var own []netip.AddrPort
	for _, c := range g.now {
		if c.Kind == wire.Host {
			own = append(own, c.Addr)
		}
	}
	seen := append(fromRelays, g.round...)
	said := nat.Classify(seen, own).Mapping
	if g.mapping == wire.MappingUnknown || said == g.doubt {
		g.mapping = said
	}
	g.doubt = said
	g.found(g.mapping, seen)
}

// lookup gives at most one address of each family for a server.
func (g *gatherer) lookup(ctx context.Context, server string) []netip.AddrPort {
	host, text, err := net.SplitHostPort(server)
	port, perr := strconv.ParseUint(text, 10, 16)
	if err != nil || perr != nil || port == 0 {
		g.log.Warn("the coordinator names a STUN server or relay that is not host:port", "addr", server)
		return nil
	}
	if host == "" {
		host = g.fallback
	}
	addrs, err := g.resolve(ctx, host)
	if err != nil {
		g.log.Warn("the name of a STUN server or relay does not resolve", "addr", server, "err", err)
		return nil
	}
	var out []netip.AddrPort
	for _, a := range addrs {
		a = a.Unmap()
		if !saneUnicast(a) && !a.IsLoopback() {
			continue // a coordinator cannot aim questions at cloud metadata or at groups of hosts
		}
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

// update puts the candidates together and reports whether they, or the mapping, differ from what was last told.
func (g *gatherer) update() bool {
	next, err := g.host(g.port)
	if err != nil {
		g.log.Warn("the interfaces cannot be listed", "err", err)
	}
	fromRelays := g.relays.observations()
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.public.IsValid() {
		next = slices.Insert(next, 0, wire.Candidate{Kind: wire.Public, Addr: g.public})
	}
	if c, ok := g.mapped(); ok {
		next = append(next, c)
	}
	next = distinct(append(next, g.reflexives(fromRelays)...))
	if slices.Equal(next, g.now) && g.mapping == g.told {
		return false
	}
	g.now, g.told = next, g.mapping
	return true
}

// reflexives are where STUN servers and relays see us. Behind a hard NAT each sees another port, none of which is of use to
// anybody else: one for each address is enough to say where we are. g.mu is held.
func (g *gatherer) reflexives(fromRelays []nat.Observation) []wire.Candidate {
	var seen []netip.AddrPort
	for _, s := range g.servers {
		for _, f := range []string{" 4", " 6"} {
			if addr, ok := g.seen[s+f]; ok {
				seen = append(seen, addr)
			}
		}
	}
	for _, o := range fromRelays {
		seen = append(seen, o.Mapped)
	}
	var out []wire.Candidate
	for _, addr := range seen {
		same := func(c wire.Candidate) bool { return c.Addr.Addr() == addr.Addr() }
		if g.mapping != wire.MappingHard || !slices.ContainsFunc(out, same) {
			out = append(out, wire.Candidate{Kind: wire.Reflexive, Addr: addr})
		}
	}
	return out
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
