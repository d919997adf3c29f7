package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/culvertnet/culvert/client/proxy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	// forwardLimit bounds what up waits for the gateway's word on a forward. A denial comes at once; beyond that the target is
	// granted and slow, which is no reason to wait.
	forwardLimit = 2 * time.Second
	// forwardsAtOnce is how many forwards the gateway is asked about at a time; it takes 16 of a session.
	forwardsAtOnce = 8

	nextForward = "ask for a rule that allows it, or leave the forward out"
)

// advice is the next step for whoever names a target that does not lead into the tunnel.
type advice struct {
	outside string // where it stays outside, though it may be granted
	denied  string // where the grant does not cover it
}

var (
	forwarding = advice{"connect to it without a forward, which leads into the tunnel or nowhere", nextForward}
	waiting    = advice{
		"leave it out of --wait-for, which is about the tunnel alone; what stays outside needs none",
		"`culvert status` shows the routes of a session; ask for a rule that allows it, or leave it out of --wait-for",
	}
)

// within gives the addresses of "host:port" that lead into the tunnel, at least one: what a forward may connect to. Errors are
// *problem.Error, [problem.FlowDenied] where nothing of it is granted.
func (a *Agent) within(ctx context.Context, target string) ([]netip.AddrPort, error) {
	if !a.led() {
		return nil, problem.New(problem.NotUp, "the tunnel is not up yet", "wait for `culvert up` to return")
	}
	all, err := a.resolve(ctx, target)
	if unknown, ok := errors.AsType[*net.DNSError](err); ok && unknown.IsNotFound {
		return nil, problem.Wrap(err, problem.FlowDenied, fmt.Sprintf("the grant does not cover %s: it holds no such name, and this host knows none", target), nextForward)
	}
	if err != nil {
		return nil, err
	}
	targets := slices.DeleteFunc(slices.Clone(all), func(t netip.AddrPort) bool { return !a.inside(t.Addr()) })
	if len(targets) == 0 {
		return nil, a.outsideOf(target, all[0].Addr(), forwarding)
	}
	return targets, nil
}

// led reports whether anything goes into the tunnel yet.
func (a *Agent) led() bool {
	a.routes.mu.Lock()
	defer a.routes.mu.Unlock()
	return len(a.routes.want) > 0
}

// outsideOf says why a target's address does not lead into the tunnel.
func (a *Agent) outsideOf(target string, addr netip.Addr, next advice) error {
	if host, _, err := net.SplitHostPort(target); err == nil && host != addr.String() {
		target += " (" + addr.String() + ")"
	}
	a.routes.mu.Lock()
	left := yielded(a.routes.left, addr)
	a.routes.mu.Unlock()
	switch {
	case left:
		return problem.New(problem.FlowDenied, target+" is directly connected to this host, and stays outside the tunnel", next.outside)
	case a.aside.holds(addr) || a.aside != nil && contains(a.aside.prefixes, addr):
		return problem.New(problem.FlowDenied, target+" is kept outside the tunnel by --direct", next.outside)
	}
	return problem.New(problem.FlowDenied, "the grant does not cover "+target, next.denied)
}

// mayForward says which forward leads to a target that nothing grants. That a target does not answer is no error: its service may
// start later.
func (s *session) mayForward(ctx context.Context, forwards []proxy.Forward) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(forwardsAtOnce)
	for _, f := range forwards {
		group.Go(func() error {
			err := s.forwardable(ctx, f.Target)
			if err == nil {
				return nil
			}
			p := problem.From(err)
			return problem.Wrap(err, p.Code, fmt.Sprintf("--forward from %s leads nowhere: %s", f.Listen, p.Message), p.Next)
		})
	}
	return group.Wait()
}

// forwardable asks the gateway about the addresses of a target until one is not denied.
func (s *session) forwardable(ctx context.Context, target string) error {
	targets, err := s.agent.within(ctx, target)
	if err != nil {
		return err
	}
	var denied error
	for _, addr := range targets {
		limited, cancel := context.WithTimeout(ctx, forwardLimit)
		r, err := s.reach(limited, s.agent.namely(target, addr))
		cancel()
		if err != nil || r.Verdict != wire.FlowDenied {
			s.agent.log.Debug("the target of a forward", "target", target, "verdict", r.Verdict, "reason", r.Reason, "err", err)
			return nil
		}
		r.Target = target
		denied = verdict(r)
	}
	return denied
}
