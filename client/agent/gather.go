package agent

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	stunPort  = "3478"          // RFC 8489, section 7
	stunLimit = 3 * time.Second // how long answers are waited for
	maxSTUN   = 4               // servers asked at most
)

// gatherer finds out where this job may be reached, what its NAT does and which relays are near: at the start, with nothing
// waiting for anything else, and again whenever this host's network changes.
type gatherer struct {
	agent    *Agent
	names    *hosts
	news     chan struct{}  // has a token when there is something to take
	first    chan struct{}  // closed with the first reflexive address
	extra    chan wire.Info // what the coordinator says of itself, once
	informed chan struct{}  // closed once info is there
	info     wire.Info

	mu      sync.Mutex
	found   []wire.Candidate
	taken   int               // of found
	seen    []nat.Observation // in this round
	own     []netip.AddrPort  // our socket's addresses on this host
	mapping wire.Mapping
	told    wire.Mapping // as last taken
	once    sync.Once
}

func newGatherer(a *Agent, names *hosts) *gatherer {
	return &gatherer{
		agent:    a,
		names:    names,
		news:     make(chan struct{}, 1),
		first:    make(chan struct{}),
		extra:    make(chan wire.Info, 1),
		informed: make(chan struct{}),
	}
}

// run gathers until ctx ends.
func (g *gatherer) run(ctx context.Context, t *tunnel.Tunnel) {
	ctx, cancel := context.WithCancel(ctx)
	var wait sync.WaitGroup
	defer wait.Wait()
	defer cancel()
	changes := nat.Watch(ctx, nat.WatchOptions{Skip: g.skip, Logger: g.agent.log})
	wait.Go(func() { g.relays(ctx, t) })
	g.round(ctx, t, false)
	for range changes {
		g.agent.log.Info("this host's network has changed")
		g.agent.api.http.CloseIdleConnections() // they may lead nowhere now
		t.Refresh()
		g.reset()
		t.SetNAT(wire.MappingUnknown, nil)
		g.round(ctx, t, true)
	}
}

// skip leaves our own interface out, and those that lead nowhere.
func (g *gatherer) skip(iface string) bool {
	return iface == g.agent.openedLink().Name() || nat.SkipVirtual(iface)
}

// reset forgets what was found where this host was before.
func (g *gatherer) reset() {
	g.names.forget()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.found, g.taken, g.seen, g.own, g.mapping, g.told = nil, 0, nil, nil, wire.MappingUnknown, wire.MappingUnknown
}

// round asks everybody once, and again takes what relays say that have been asked before. It starts with the coordinator's own
// host, at the usual port, rather than wait to be told.
func (g *gatherer) round(ctx context.Context, t *tunnel.Tunnel, again bool) {
	ctx, cancel := context.WithTimeout(ctx, stunLimit)
	defer cancel()
	hosts, err := nat.HostCandidates(t.Port(), g.skip)
	if err != nil {
		g.agent.log.Warn("cannot list this host's addresses", "err", err)
	}
	g.add(hosts...)
	var wait sync.WaitGroup
	defer wait.Wait()
	asked := map[string]bool{}
	ask := func(server string) {
		if server = g.names.whole(server); !asked[server] && len(asked) < maxSTUN {
			asked[server] = true
			wait.Go(func() { g.ask(ctx, t, server) })
		}
	}
	ask(":" + stunPort)
	select {
	case <-g.informed:
		for _, server := range g.info.STUN {
			ask(server)
		}
		for _, r := range g.info.Relays {
			if again {
				wait.Go(func() { g.hear(ctx, t, r.Name) })
			}
		}
	case <-ctx.Done():
	}
}

// ask gets the reflexive address that one server sees, over IPv4 and IPv6 where it has both.
func (g *gatherer) ask(ctx context.Context, t *tunnel.Tunnel, server string) {
	addrs, err := g.names.lookup(ctx, server)
	if err != nil {
		g.agent.log.Debug("a STUN server's name does not resolve", "addr", server, "err", err)
		return
	}
	var wait sync.WaitGroup
	for _, addr := range addrs {
		wait.Go(func() {
			mapped, err := t.Reflexive(ctx, addr)
			if err != nil {
				g.agent.log.Debug("a STUN server did not answer", "addr", server, "err", err)
				return
			}
			g.observe(t, nat.Observation{Server: addr, Mapped: mapped})
		})
	}
	wait.Wait()
}

// hear takes what a relay sees of us, once it answers over UDP.
func (g *gatherer) hear(ctx context.Context, t *tunnel.Tunnel, relay string) {
	r, err := t.Relay(ctx, relay)
	if err != nil || !r.Mapped.IsValid() {
		g.agent.log.Debug("a relay did not answer over UDP", "relay", relay, "err", err)
		return
	}
	i := slices.IndexFunc(r.UDP, func(a netip.AddrPort) bool { return a.Addr().Is4() == r.Mapped.Addr().Is4() })
	if i >= 0 {
		g.observe(t, nat.Observation{Server: r.UDP[i], Mapped: r.Mapped, RTT: r.RTT})
	}
}

// observe takes what one server sees of us. Behind a hard NAT each sees another port, none of which is of use to anybody else:
// one for each address says where we are.
func (g *gatherer) observe(t *tunnel.Tunnel, o nat.Observation) {
	g.mu.Lock()
	g.seen = append(g.seen, o)
	g.mapping = nat.Classify(g.seen, g.own).Mapping
	t.SetNAT(g.mapping, g.seen)
	hard := g.mapping == wire.MappingHard
	known := slices.ContainsFunc(g.found, func(c wire.Candidate) bool {
		return c.Kind == wire.Reflexive && c.Addr.Addr() == o.Mapped.Addr()
	})
	g.mu.Unlock()
	if !hard || !known {
		g.add(wire.Candidate{Kind: wire.Reflexive, Addr: o.Mapped})
	}
	g.mu.Lock()
	g.ring()
	g.mu.Unlock()
	g.once.Do(func() { close(g.first) })
}

// add notes candidates unless they are known by address.
func (g *gatherer) add(candidates ...wire.Candidate) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range candidates {
		if c.Kind == wire.Host {
			g.own = append(g.own, c.Addr)
		}
		known := slices.ContainsFunc(g.found, func(o wire.Candidate) bool { return o.Addr == c.Addr })
		if len(g.found) < wire.MaxCandidates && !known {
			g.found = append(g.found, c)
		}
	}
	g.ring()
}

// ring says that there is something to take, if there is. g.mu is held.
func (g *gatherer) ring() {
	if len(g.found) == g.taken && g.mapping == g.told {
		return
	}
	select {
	case g.news <- struct{}{}:
	default:
	}
}

// take gives what has been found since it was last called.
func (g *gatherer) take() (wire.Update, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.news:
	default:
	}
	u := wire.Update{Candidates: slices.Clone(g.found[g.taken:])}
	if g.mapping != g.told {
		u.Mapping = g.mapping
	}
	g.taken, g.told = len(g.found), g.mapping
	return u, len(u.Candidates) > 0 || u.Mapping != wire.MappingUnknown
}

// all gives everything that is known.
func (g *gatherer) all() wire.Update {
	g.mu.Lock()
	defer g.mu.Unlock()
	return wire.Update{Candidates: slices.Clone(g.found), Mapping: g.mapping}
}

// untake has everything told again.
func (g *gatherer) untake() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.taken, g.told = 0, wire.MappingUnknown
	g.ring()
}

// await waits up to limit for a first reflexive address.
func (g *gatherer) await(ctx context.Context, limit time.Duration) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-g.first:
	case <-timer.C:
	case <-ctx.Done():
	}
}
