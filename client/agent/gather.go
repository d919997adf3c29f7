package agent

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	stunPort  = "3478"          // RFC 8489, section 7
	stunLimit = 3 * time.Second // how long an answer is waited for
	maxSTUN   = 4               // servers asked at most
)

// gatherer collects our own candidates: the host's at once, what STUN servers see as they answer.
type gatherer struct {
	agent *Agent
	news  chan struct{} // has a token when there is something to take
	first chan struct{} // closed with the first reflexive address
	done  chan struct{} // closed when nothing more will come
	extra chan []string // servers that the coordinator names

	mu    sync.Mutex
	found []wire.Candidate
	taken int
	once  sync.Once
}

func newGatherer(a *Agent) *gatherer {
	return &gatherer{
		agent: a,
		news:  make(chan struct{}, 1),
		first: make(chan struct{}),
		done:  make(chan struct{}),
		extra: make(chan []string, 1),
	}
}

// run gathers until every server has answered or had its time. It starts with the coordinator's own host, at the usual
// port, rather than wait to be told.
func (g *gatherer) run(ctx context.Context, t *tunnel.Tunnel, coordinator string) {
	defer close(g.done)
	ctx, cancel := context.WithTimeout(ctx, stunLimit)
	defer cancel()
	l := g.agent.openedLink()
	hosts, err := nat.HostCandidates(t.Port(), func(iface string) bool { return iface == l.Name() || nat.SkipVirtual(iface) })
	if err != nil {
		g.agent.log.Warn("cannot list this host's addresses", "err", err)
	}
	g.add(hosts...)
	var wait sync.WaitGroup
	defer wait.Wait()
	asked := map[string]bool{}
	ask := func(server string) {
		if host, port, err := net.SplitHostPort(server); err == nil && host == "" {
			server = net.JoinHostPort(coordinator, port)
		}
		if !asked[server] && len(asked) < maxSTUN {
			asked[server] = true
			wait.Go(func() { g.ask(ctx, t, server) })
		}
	}
	ask(net.JoinHostPort(coordinator, stunPort))
	select {
	case servers := <-g.extra:
		for _, server := range servers {
			ask(server)
		}
	case <-ctx.Done():
	}
}

// ask gets the reflexive address that one server sees, over IPv4 and IPv6 where it has both.
func (g *gatherer) ask(ctx context.Context, t *tunnel.Tunnel, server string) {
	host, port, err := net.SplitHostPort(server)
	if err != nil {
		g.agent.log.Warn("the coordinator names a STUN server that is not host:port", "addr", server)
		return
	}
	number, err := net.LookupPort("udp", port)
	if err != nil {
		return
	}
	addrs, err := g.agent.opts.lookup(ctx, host)
	if err != nil {
		g.agent.log.Debug("a STUN server's name does not resolve", "addr", server, "err", err)
		return
	}
	var wait sync.WaitGroup
	seen := map[bool]bool{}
	for _, addr := range addrs {
		addr = addr.Unmap()
		if seen[addr.Is4()] {
			continue
		}
		seen[addr.Is4()] = true
		g.agent.direct.add(addr)
		wait.Go(func() {
			mapped, err := t.Reflexive(ctx, netip.AddrPortFrom(addr, uint16(number)))
			if err != nil {
				g.agent.log.Debug("a STUN server did not answer", "addr", server, "err", err)
				return
			}
			g.add(wire.Candidate{Kind: wire.Reflexive, Addr: mapped})
			g.once.Do(func() { close(g.first) })
		})
	}
	wait.Wait()
}

// more names further servers. It is called at most once.
func (g *gatherer) more(servers []string) {
	clean := make([]string, 0, len(servers))
	for _, server := range servers {
		clean = append(clean, strings.TrimSpace(server))
	}
	g.extra <- clean
}

// add notes candidates unless they are known by address.
func (g *gatherer) add(candidates ...wire.Candidate) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range candidates {
		if len(g.found) < wire.MaxCandidates && !g.known(c.Addr) {
			g.found = append(g.found, c)
		}
	}
	if len(g.found) > g.taken {
		select {
		case g.news <- struct{}{}:
		default:
		}
	}
}

func (g *gatherer) known(addr netip.AddrPort) bool {
	for _, c := range g.found {
		if c.Addr == addr {
			return true
		}
	}
	return false
}

// take gives what has been found since it was last called.
func (g *gatherer) take() []wire.Candidate {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.news:
	default:
	}
	fresh := g.found[g.taken:]
	g.taken = len(g.found)
	return fresh
}

// await waits up to limit for a first reflexive address.
func (g *gatherer) await(ctx context.Context, limit time.Duration) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-g.first:
	case <-g.done:
	case <-timer.C:
	case <-ctx.Done():
	}
}

func (g *gatherer) isDone() bool {
	select {
	case <-g.done:
		return true
	default:
		return false
	}
}
