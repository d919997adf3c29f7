package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"time"

	foreign "golang.org/x/net/proxy"

	"github.com/culvertnet/culvert/internal/eyeballs"
	"github.com/culvertnet/culvert/internal/problem"
)

const dialTimeout = 30 * time.Second

// dial opens a connection to "host:port". A name is resolved by the gateway if it is granted, else by the
// system; each of its addresses goes into the tunnel or around it on its own merit. The error is always a *problem.Error.
func (s *Server) dial(ctx context.Context, target string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	host, portText, err := net.SplitHostPort(target)
	if err != nil {
		return nil, problem.Wrap(err, problem.BadRequest, fmt.Sprintf("%q is not host:port", target), "")
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil || port == 0 {
		return nil, problem.Wrap(err, problem.BadRequest, fmt.Sprintf("%q is not a port", portText), "")
	}
	if s.opts.Other != nil {
		if other, ok := s.opts.Other(ctx, host); ok {
			return s.through(ctx, other, target)
		}
	}
	addrs, err := s.resolve(ctx, host)
	if err != nil {
		return nil, err
	}
	targets := make([]netip.AddrPort, len(addrs))
	for i, addr := range addrs {
		targets[i] = netip.AddrPortFrom(addr, uint16(port))
	}
	return s.dialFirst(ctx, target, targets, s.dialOne)
}

// dialWithin opens a connection to "host:port" through the tunnel, or none at all. The error is always a *problem.Error.
func (s *Server) dialWithin(ctx context.Context, target string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	targets, err := s.opts.Within(ctx, target)
	if err != nil {
		return nil, err
	}
	return s.dialFirst(ctx, target, targets, func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
		return s.opts.Dial(ctx, "tcp", addr.String())
	})
}

// dialFirst connects to the first of a target's addresses that answers.
func (s *Server) dialFirst(ctx context.Context, asked string, targets []netip.AddrPort,
	dial func(context.Context, netip.AddrPort) (net.Conn, error)) (net.Conn, error) {
	conn, err := eyeballs.Dial(ctx, targets, dial)
	if err != nil {
		return nil, s.explain(ctx, asked, targets, err)
	}
	return conn, nil
}

// through dials by another tunnel's proxy, which resolves the name.
func (s *Server) through(ctx context.Context, other netip.AddrPort, target string) (net.Conn, error) {
	d, err := foreign.SOCKS5("tcp", other.String(), nil, &net.Dialer{})
	if err != nil {
		return nil, problem.Wrap(err, problem.Failed, "another tunnel's proxy cannot be used", "")
	}
	conn, err := d.(foreign.ContextDialer).DialContext(ctx, "tcp", target)
	if err != nil {
		return nil, s.explain(ctx, target, nil, err)
	}
	return conn, nil
}

func (s *Server) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{addr.Unmap()}, nil
	}
	if s.opts.Lookup != nil {
		if addr, ok, err := s.opts.Lookup(ctx, host); ok {
			return []netip.Addr{addr}, err
		}
	}
	addrs, err := s.opts.lookup(ctx, host)
	if err != nil || len(addrs) == 0 {
		return nil, problem.Wrap(err, problem.FlowUnreachable, fmt.Sprintf("the name %q does not resolve", host),
			"names that the grant does not hold are resolved on this host; ask for a grant of this name, or use an address")
	}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	return addrs, nil
}

func (s *Server) dialOne(ctx context.Context, target netip.AddrPort) (net.Conn, error) {
	if s.opts.Inside(target.Addr()) {
		return s.opts.Dial(ctx, "tcp", target.String())
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", target.String())
}

// explain makes the error that the program behind the proxy gets to see.
func (s *Server) explain(ctx context.Context, asked string, targets []netip.AddrPort, err error) error {
	if p, ok := errors.AsType[*problem.Error](err); ok {
		return p
	}
	for _, target := range targets {
		if s.opts.Explain == nil || !refused(err) || !s.opts.Inside(target.Addr()) {
			continue
		}
		if p, ok := errors.AsType[*problem.Error](s.opts.Explain(ctx, asked, target)); ok {
			return p
		}
	}
	switch {
	case refused(err):
		return problem.Wrap(err, problem.FlowUnreachable, asked+" refused the connection", "ask `culvert check "+asked+"`")
	case ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded):
		return problem.Wrap(err, problem.Timeout, asked+" did not answer in time", "ask `culvert check "+asked+"`")
	default:
		return problem.Wrap(err, problem.FlowUnreachable, asked+" cannot be reached", "ask `culvert check "+asked+"`")
	}
}

// refused reports a reset in answer to our SYN, be it the kernel's word or the network stack's.
func refused(err error) bool {
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) {
		return true
	}
	return err != nil && (strings.Contains(err.Error(), "refused") || strings.Contains(err.Error(), "reset"))
}
