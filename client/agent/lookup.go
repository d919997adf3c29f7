package agent

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/culvertnet/culvert/internal/problem"
)

// hosts looks up the hosts of STUN servers and relays, each once for as long as this host's network stays the same, so that
// whoever asks for a relay twice means the same one.
type hosts struct {
	agent *Agent
	ctx   context.Context // of looking up: whoever asks first may be the first to lose patience
	tasks *sync.WaitGroup

	mu    sync.Mutex
	hosts map[string]*answers
}

// answers are a host's addresses, once done is closed.
type answers struct {
	done  chan struct{}
	addrs []netip.Addr // at most one of each family
	err   error
}

func newHosts(ctx context.Context, tasks *sync.WaitGroup, a *Agent) *hosts {
	return &hosts{agent: a, ctx: ctx, tasks: tasks, hosts: map[string]*answers{}}
}

// forget has everything looked up anew.
func (n *hosts) forget() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.hosts)
}

// whole puts the coordinator's host where a server names none.
func (n *hosts) whole(server string) string {
	server = strings.TrimSpace(server)
	if host, port, err := net.SplitHostPort(server); err == nil && host == "" {
		return net.JoinHostPort(n.agent.opts.url.Hostname(), port)
	}
	return server
}

// lookup gives at most one address of each family for "host:port", and keeps routes from covering them.
func (n *hosts) lookup(ctx context.Context, server string) ([]netip.AddrPort, error) {
	host, service, err := net.SplitHostPort(n.whole(server))
	if err != nil {
		return nil, problem.Wrap(err, problem.Incompatible, "the coordinator names a server that is not host:port", "check its configuration")
	}
	port, err := net.LookupPort("udp", service)
	if err != nil || port == 0 {
		return nil, problem.Wrap(err, problem.Incompatible, "the coordinator names a server without a port", "check its configuration")
	}
	addrs, err := n.host(ctx, host)
	out := make([]netip.AddrPort, 0, len(addrs))
	for _, a := range addrs {
		n.agent.direct.add(a)
		out = append(out, netip.AddrPortFrom(a, uint16(port)))
	}
	return out, err
}

func (n *hosts) host(ctx context.Context, host string) ([]netip.Addr, error) {
	n.mu.Lock()
	a := n.hosts[host]
	if a == nil {
		a = &answers{done: make(chan struct{})}
		n.hosts[host] = a
		n.tasks.Go(func() {
			defer close(a.done)
			a.addrs, a.err = n.resolve(host)
		})
	}
	n.mu.Unlock()
	select {
	case <-a.done:
		return a.addrs, a.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// resolve asks the system. What cannot be a server's address is left out.
func (n *hosts) resolve(host string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(n.ctx, stunLimit)
	defer cancel()
	all, err := n.agent.opts.lookup(ctx, host)
	var out []netip.Addr
	for _, a := range all {
		a = a.Unmap()
		taken := slices.ContainsFunc(out, func(o netip.Addr) bool { return o.Is4() == a.Is4() })
		if !taken && (unicast(a) || a.IsLoopback()) {
			out = append(out, a)
		}
	}
	return out, err
}
