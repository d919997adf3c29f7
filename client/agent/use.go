package agent

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/culvertnet/culvert/client/proxy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// dialFunc opens a connection to "IP:port".
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// patience is how long an echo request waits for the handshake once there is a path. Sent without one, it makes WireGuard
// start a handshake of its own, should the first have been lost.
const patience = 100 * time.Millisecond

// demands are what has to hold beyond bytes that flow before a tunnel counts as up. A session that takes the place of another has none.
type demands struct {
	waitFor  []string        // to answer
	forwards []proxy.Forward // to be granted
}

// use returns when the session carries bytes both ways and all demands are met.
func (s *session) use(ctx context.Context, d demands) error {
	group, ctx := errgroup.WithContext(ctx)
	limited, cancel := context.WithTimeout(ctx, pathLimit)
	defer cancel()
	shaken := make(chan struct{})
	group.Go(func() error {
		defer close(shaken)
		return s.shake(limited)
	})
	group.Go(func() error {
		s.shaking(limited, shaken)
		return s.echo(limited)
	})
	group.Go(func() error {
		s.agent.useNames(ctx, s.gateway)
		return nil
	})
	group.Go(func() error {
		<-shaken
		s.agent.leadNames(ctx, s)
		return nil
	})
	for _, target := range d.waitFor {
		group.Go(func() error {
			<-shaken
			return s.waitFor(ctx, target)
		})
	}
	group.Go(func() error {
		<-shaken
		return s.mayForward(ctx, d.forwards)
	})
	if err := group.Wait(); err != nil || len(s.agent.granted.Heard()) == 0 {
		return err
	}
	s.start(func(ctx context.Context) error { // what the job has remembered of an earlier session
		s.take(ctx)
		return nil
	})
	return nil
}

// shake waits for the first path and for WireGuard's handshake.
func (s *session) shake(ctx context.Context) error {
	if err := s.peer.WaitHandshake(ctx); err != nil {
		return s.noPath(err)
	}
	s.agent.marks.set(&s.agent.marks.handshake)
	return nil
}

// noPath says how far we got.
func (s *session) noPath(err error) error {
	select {
	case <-s.pathUp:
		return problem.Wrap(err, problem.NoPath, fmt.Sprintf("gateway %q was reached, but no bytes come back through the tunnel",
			s.gateway.Name), "look at the gateway's log; if it persists, a firewall may drop what is not STUN")
	default:
		return problem.Wrap(err, problem.NoPath, fmt.Sprintf("no path to gateway %q came up", s.gateway.Name),
			"check that outbound UDP is allowed on both sides")
	}
}

// shaking waits for the handshake, but not for long once there is a path.
func (s *session) shaking(ctx context.Context, shaken <-chan struct{}) {
	select {
	case <-shaken:
		return
	case <-s.pathUp:
	case <-ctx.Done():
		return
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-shaken:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// echo returns when a datagram has come back from the gateway's echo port.
func (s *session) echo(ctx context.Context) error {
	target := netip.AddrPortFrom(s.gateway.Addresses[0], wire.EchoPort)
	rtt := s.peer.Status().Path.RTT
	if err := echo(ctx, s.agent.link.DialContext, target, rtt+rtt/4); err != nil {
		return s.noPath(err)
	}
	s.agent.marks.set(&s.agent.marks.usable)
	return nil
}

// echo sends a datagram of its own to an echo server (RFC 862) at 0, 20, 60, 140 … ms until it comes back; the first answer is waited
// for as long as is usual on the path.
func echo(ctx context.Context, dial dialFunc, target netip.AddrPort, usual time.Duration) error {
	conn, err := dial(ctx, "udp", target.String())
	if err != nil {
		return fmt.Errorf("open a socket to the gateway's echo port: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	probe := make([]byte, 16)
	_, _ = rand.Read(probe) // never fails, see crypto/rand
	buf := make([]byte, wire.MaxEcho)
	for wait := max(20*time.Millisecond, min(usual, time.Second)); ctx.Err() == nil; wait = min(2*wait, time.Second) {
		_, _ = conn.Write(probe) // a port that is closed still shows as silence below
		_ = conn.SetReadDeadline(time.Now().Add(wait))
		for {
			n, err := conn.Read(buf)
			if err == nil && string(buf[:n]) == string(probe) {
				return nil
			}
			if err != nil && !refusedUDP(err) {
				break // the deadline
			}
		}
	}
	return context.Cause(ctx)
}

// refusedUDP reports an error that an earlier datagram brought back, after which reading may go on.
func refusedUDP(err error) bool {
	var timeout net.Error
	return !errors.Is(err, net.ErrClosed) && !(errors.As(err, &timeout) && timeout.Timeout()) && isRefused(err)
}

// waitFor returns when a target has answered a TCP connect through the tunnel. What the grant does not cover is not tried
// twice. The first tries are short: should the first packets of a new tunnel get lost, TCP itself would wait a second.
func (s *session) waitFor(ctx context.Context, target string) error {
	var pause backoff
	var before error // what the last whole try failed with; the one that is cut short has less to say
	for limit := 250 * time.Millisecond; ; limit = min(2*limit, 8*time.Second) {
		err := s.connect(ctx, target, limit)
		if err == nil || problem.CodeOf(err) == problem.FlowDenied {
			return err
		}
		s.agent.log.Debug("not there yet", "addr", target, "err", err)
		ended := context.Cause(ctx)
		if ended != nil {
			err = cmp.Or(before, err)
		}
		before = err
		if ended == nil && !errors.Is(err, context.DeadlineExceeded) {
			ended = pause.wait(ctx)
		}
		if ended == nil {
			continue
		}
		if p, ok := errors.AsType[*problem.Error](ended); ok {
			return p
		}
		return problem.Wrap(err, problem.NotUsable, fmt.Sprintf("the tunnel is up, but %s did not answer in time: %s", target,
			problem.From(err).Message), "check that it runs and that the gateway may reach it, or give it more time with --timeout")
	}
}

// connect tries every address of a target once.
func (s *session) connect(ctx context.Context, target string, limit time.Duration) error {
	targets, err := s.agent.resolve(ctx, target)
	if err != nil {
		return err
	}
	for _, addr := range targets {
		if !s.agent.inside(addr.Addr()) {
			err = s.agent.outsideOf(target, addr.Addr(), waiting)
			continue
		}
		if err = s.connectTo(ctx, target, addr, limit); err == nil {
			return nil
		}
	}
	return err
}

func (s *session) connectTo(ctx context.Context, target string, addr netip.AddrPort, limit time.Duration) error {
	trying, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	conn, err := s.agent.link.DialContext(trying, "tcp", addr.String())
	if err == nil {
		return conn.Close()
	}
	silent := trying.Err() != nil
	if silent && limit < 2*time.Second {
		return problem.Wrap(trying.Err(), problem.FlowUnreachable, fmt.Sprintf("%s does not answer", addr), "")
	}
	if told := s.explain(ctx, target, addr); told != nil {
		return told
	}
	what := "does not answer"
	if isRefused(err) {
		what = "refuses the connection"
	}
	return problem.Wrap(errors.Join(err, trying.Err()), problem.FlowUnreachable, fmt.Sprintf("%s %s", addr, what), "")
}

// resolveHere gives the addresses of "host:port", as this host knows them.
func (a *Agent) resolveHere(ctx context.Context, target string) ([]netip.AddrPort, error) {
	if addr, err := netip.ParseAddrPort(target); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())}, nil
	}
	if err := CheckTarget(target); err != nil {
		return nil, err
	}
	host, service, _ := net.SplitHostPort(target)
	port, err := net.DefaultResolver.LookupPort(ctx, "tcp", service)
	if err != nil {
		return nil, problem.Wrap(err, problem.Usage, fmt.Sprintf("%q is not a port", service), "write it like 10.20.0.5:5432")
	}
	addrs, err := a.opts.lookup(ctx, host)
	if err != nil || len(addrs) == 0 {
		return nil, problem.Wrap(err, problem.FlowUnreachable, fmt.Sprintf("the name %q does not resolve", host),
			"names that the grant does not hold are resolved on this host; ask for a grant of this name, or use an address")
	}
	targets := make([]netip.AddrPort, len(addrs))
	for i, addr := range addrs {
		targets[i] = netip.AddrPortFrom(addr.Unmap(), uint16(port))
	}
	return targets, nil
}
