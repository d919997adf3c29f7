package agent

import (
	"context"
<<<<<<< HEAD
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/culvertnet/culvert/internal/problem"
)

// names looks up the hosts of STUN servers and relays, each once for as long as this host's network stays the same, so that
// whoever asks for a relay twice means the same one.
type names struct {
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

func newNames(ctx context.Context, tasks *sync.WaitGroup, a *Agent) *names {
	return &names{agent: a, ctx: ctx, tasks: tasks, hosts: map[string]*answers{}}
}

// forget has everything looked up anew.
func (n *names) forget() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.hosts)
}

// whole puts the coordinator's host where a server names none.
func (n *names) whole(server string) string {
	server = strings.TrimSpace(server)
	if host, port, err := net.SplitHostPort(server); err == nil && host == "" {
		return net.JoinHostPort(n.agent.opts.url.Hostname(), port)
	}
	return server
}

// lookup gives at most one address of each family for "host:port", and keeps routes from covering them.
func (n *names) lookup(ctx context.Context, server string) ([]netip.AddrPort, error) {
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

func (n *names) host(ctx context.Context, host string) ([]netip.Addr, error) {
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
func (n *names) resolve(host string) ([]netip.Addr, error) {
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
=======
	"errors"
	"reflect"
	"sync"

	"github.com/culvertnet/culvert/client/names"
	"github.com/culvertnet/culvert/internal/wire"
)

// startNames makes a split resolver; see [names.Start].
type startNames func(context.Context, names.Options) (splitNames, error)

// splitNames is a split resolver in force; see [names.Split].
type splitNames interface {
	Methods() []string
	Refused() []string
	Close() error
}

func systemNames(ctx context.Context, opts names.Options) (splitNames, error) {
	split, err := names.Start(ctx, opts)
	if err != nil {
		return nil, err // not a nil *Split in an interface
	}
	return split, nil
}

// resolving is what the host resolves through the tunnel at present. It outlives sessions: while a new one is asked for, names
// stay where they are.
type resolving struct {
	mu    sync.Mutex
	split splitNames // nil: nothing
	names wire.Names
}

// useNames has this host resolve what the gateway grants by name. Where that does not work the tunnel is usable all the same,
// by address, so it is a warning.
func (a *Agent) useNames(ctx context.Context, gw wire.Gateway) {
	name := a.openedLink().Name()
	if name == "" {
		return // without an interface, the proxy resolves
	}
	a.resolving.mu.Lock()
	defer a.resolving.mu.Unlock()
	var want wire.Names
	if gw.Names != nil {
		want = *gw.Names
	}
	if reflect.DeepEqual(want, a.resolving.names) {
		return
	}
	a.dropNames()
	if len(want.Exact)+len(want.Suffixes) == 0 || len(want.Servers) == 0 {
		return
	}
	split, err := a.opts.startNames(ctx, names.Options{
		Interface: name, Names: want, Reserved: append([]string{a.opts.url.Hostname()}, a.opts.Reserved...), Logger: a.log,
	})
	if err != nil {
		if !errors.Is(err, context.Canceled) {
			a.log.Warn("granted names do not resolve on this host; `culvert exec` and addresses work", "err", err)
		}
		return
	}
	a.resolving.split, a.resolving.names = split, want
	if refused := split.Refused(); len(refused) > 0 {
		a.log.Warn("the gateway claims names that this runner needs itself, and does not get them", "names", refused)
	}
	a.log.Info("granted names resolve", "methods", split.Methods())
}

// dropNames takes the split resolver back; the caller holds the lock.
func (a *Agent) dropNames() {
	if a.resolving.split == nil {
		return
	}
	if err := a.resolving.split.Close(); err != nil {
		a.log.Warn("cannot take names back; they go with the interface", "err", err)
	}
	a.resolving.split, a.resolving.names = nil, wire.Names{}
}

func (a *Agent) closeNames() {
	a.resolving.mu.Lock()
	defer a.resolving.mu.Unlock()
	a.dropNames()
>>>>>>> main
}
