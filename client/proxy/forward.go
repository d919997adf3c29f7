package proxy

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/culvertnet/culvert/internal/problem"
)

// Forward is a loopback port that leads to one target, for programs that know no proxy.
type Forward struct {
	Listen netip.AddrPort // on loopback
	Target string         // "host:port"
}

// ParseForward reads "PORT:HOST:PORT" or "IP:PORT:HOST:PORT"; addresses of IPv6 stand in brackets. Errors are *problem.Error.
func ParseForward(text string) (Forward, error) {
	bad := problem.New(problem.Usage, fmt.Sprintf("%q is no forward", text), "write it like 5432:db.internal:5432")
	local, rest, found := strings.Cut(text, ":")
	if strings.HasPrefix(text, "[") {
		local, rest, found = strings.Cut(text, "]:")
		local = strings.TrimPrefix(local, "[")
	}
	f := Forward{Target: rest}
	addr, err := netip.ParseAddr(local)
	if err == nil {
		local, f.Target, found = strings.Cut(rest, ":")
	} else {
		addr = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	port, err := strconv.ParseUint(local, 10, 16)
	if err != nil || port == 0 || !found {
		return Forward{}, bad
	}
	f.Listen = netip.AddrPortFrom(addr, uint16(port))
	host, service, err := net.SplitHostPort(f.Target)
	if n, perr := strconv.ParseUint(service, 10, 16); err != nil || perr != nil || n == 0 || host == "" {
		return Forward{}, bad
	}
	if !addr.IsLoopback() {
		return Forward{}, problem.New(problem.Usage, fmt.Sprintf("a forward listens on loopback only, not on %s", addr),
			"write it like 5432:db.internal:5432")
	}
	return f, nil
}

// forward carries one connection to a target, through the tunnel or not at all. What cannot be reached shows as a connection that is reset
// at once, and in the log.
func (s *Server) forward(conn net.Conn, target string) {
	defer s.untrack(conn)
	if err := permitted(conn, s.opts.Users); err != nil {
		s.opts.Logger.Warn("refused a connection to a forward", "addr", conn.RemoteAddr(), "err", err)
		return
	}
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	onward, err := s.dialWithin(ctx, target)
	if err != nil {
		s.opts.Logger.Warn("cannot forward a connection", "target", target, "code", problem.CodeOf(err), "err", err)
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // an end in good order would look like a service that has nothing to say
		}
		return
	}
	if !s.track(onward) {
		_ = onward.Close()
		return
	}
	defer s.untrack(onward)
	splice(conn, onward, s.opts.Idle)
}
