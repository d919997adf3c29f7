// Package proxy is the rootless way into the tunnel: SOCKS5 (RFC 1928), HTTP CONNECT (RFC 9110, section 9.3.6) and plain
// HTTP by absolute URI (RFC 9112, section 3.2.2) on one loopback port. The first byte of a connection tells them apart:
// SOCKS5 begins with 5, HTTP with a letter.
//
// Whoever can connect to a loopback port is not necessarily who started the tunnel, so on Linux every connection's owner
// is looked up and others are refused. Other systems do not tell; there any local user gets through.
package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

// Bounds that no option changes.
const (
	maxHeader    = 64 << 10         // a request's header, in bytes
	greetTimeout = 10 * time.Second // from connecting to having said what is wanted
	maxConns     = 4096             // open at a time; further ones are closed at once
)

// Options configure a [Server].
type Options struct {
	Listen   string // default "127.0.0.1:0"; refused unless loopback
	Forwards []Forward
	// NoProxy serves the forwards alone.
	NoProxy bool
	// Dial opens a connection inside the tunnel; address is "IP:port".
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Inside says whether an address goes into the tunnel. What does not is dialled directly, so that a job may point all its
	// traffic here.
	Inside func(netip.Addr) bool
	// Lookup gives the address of a host name that belongs to the tunnel; ok is false for others, which the system resolves.
	// Optional.
	Lookup func(ctx context.Context, host string) (addr netip.Addr, ok bool, err error)
	// Within gives the addresses of a forward's target, "host:port", that lead into the tunnel, at least one. Its errors are *problem.Error.
	// A forward leads nowhere else. Needed with Forwards.
	Within func(ctx context.Context, target string) ([]netip.AddrPort, error)
	// Explain says why a destination inside the tunnel was refused, where the gateway knows better than a reset: asked is the "host:port"
	// that the program said, target an address of it. Optional.
	Explain func(ctx context.Context, asked string, target netip.AddrPort) error
	// Other gives the proxy of another tunnel to which a host belongs, a name or an address. Optional.
	Other  func(ctx context.Context, host string) (netip.AddrPort, bool)
	Users  []int         // who may connect, by user id; default the process's own
	Idle   time.Duration // a connection without a byte for so long is closed; default 2 h
	Logger *slog.Logger

	// lookup resolves a name; the system's resolver unless a test says otherwise.
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)
}

// Validate fills defaults and refuses what cannot work.
func (o *Options) Validate() error {
	if o.Listen == "" {
		o.Listen = "127.0.0.1:0"
	}
	addr, err := netip.ParseAddrPort(o.Listen)
	if err != nil || !addr.Addr().IsLoopback() {
		return problem.Wrap(err, problem.Usage, fmt.Sprintf("the proxy listens on loopback only, not on %q", o.Listen),
			"give --proxy-listen an address such as 127.0.0.1:1080")
	}
	for _, f := range o.Forwards {
		if !f.Listen.Addr().IsLoopback() {
			return problem.New(problem.Usage, fmt.Sprintf("a forward listens on loopback only, not on %s", f.Listen),
				"write --forward 5432:db.internal:5432")
		}
	}
	if o.Dial == nil || o.Inside == nil {
		return errors.New("a proxy needs Dial and Inside")
	}
	if o.Within == nil && len(o.Forwards) > 0 {
		return errors.New("forwards need Within")
	}
	if o.Users == nil {
		o.Users = []int{os.Geteuid()}
	}
	if o.Idle == 0 {
		o.Idle = 2 * time.Hour
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.lookup == nil {
		o.lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	return nil
}

// Server is a proxy that serves processes of its own user alone.
type Server struct {
	opts    Options
	addr    netip.AddrPort // invalid without a proxy
	web     *http.Server
	handoff *handoff // connections that turned out to speak HTTP
	onward  *http.Transport
	ctx     context.Context
	cancel  context.CancelFunc
	wait    sync.WaitGroup

	listeners []net.Listener

	mu    sync.Mutex
	conns map[net.Conn]struct{} // both sides of everything open; nil once closed
}

// Listen starts serving.
func Listen(opts Options) (*Server, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	s := &Server{opts: opts, conns: make(map[net.Conn]struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.serveHTTP()
	if err := s.open(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// open opens every port before the first is served.
func (s *Server) open() error {
	serve := []func(net.Conn){}
	if !s.opts.NoProxy {
		l, err := net.Listen("tcp", s.opts.Listen)
		if err != nil {
			return problem.Wrap(err, problem.Usage, fmt.Sprintf("the proxy cannot listen on %s: %s", s.opts.Listen, problem.Reason(err)),
				"choose a free port with --proxy-listen, or leave it out")
		}
		s.listeners, serve = append(s.listeners, l), append(serve, s.serve)
		s.addr = l.Addr().(*net.TCPAddr).AddrPort()
	}
	for _, f := range s.opts.Forwards {
		l, err := net.Listen("tcp", f.Listen.String())
		if err != nil {
			return problem.Wrap(err, problem.Usage, fmt.Sprintf("cannot listen on %s to forward to %s: %v", f.Listen, f.Target, problem.Reason(err)),
				"choose a free port for --forward")
		}
		s.listeners, serve = append(s.listeners, l), append(serve, func(conn net.Conn) { s.forward(conn, f.Target) })
	}
	for i, l := range s.listeners {
		s.wait.Go(func() { s.accept(l, serve[i]) })
	}
	return nil
}

// Addr is the proxy's bound address.
func (s *Server) Addr() netip.AddrPort { return s.addr }

// Close ends all connections and waits.
func (s *Server) Close() error {
	s.cancel()
	var err error
	for _, l := range s.listeners {
		err = errors.Join(err, l.Close())
	}
	s.handoff.Close()
	_ = s.web.Close()
	s.mu.Lock()
	for conn := range s.conns {
		_ = conn.Close()
	}
	s.conns = nil
	s.mu.Unlock()
	s.wait.Wait()
	s.onward.CloseIdleConnections()
	return err
}

// enter makes Close wait for a handler of the HTTP server, which itself does not. It says no when closing; else the
// handler calls s.wait.Done.
func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns == nil {
		return false
	}
	s.wait.Add(1)
	return true
}

// Environ gives the variables that point programs at the proxy (upper and lower case). What runs on the same host stays
// outside the proxy, and an inherited NO_PROXY does not bypass it.
func Environ(addr netip.AddrPort) []string {
	web, socks := "http://"+addr.String(), "socks5h://"+addr.String()
	local := "localhost,127.0.0.1,::1"
	return []string{
		"HTTP_PROXY=" + web, "http_proxy=" + web,
		"HTTPS_PROXY=" + web, "https_proxy=" + web,
		"ALL_PROXY=" + socks, "all_proxy=" + socks,
		"NO_PROXY=" + local, "no_proxy=" + local,
	}
}

func (s *Server) accept(l net.Listener, serve func(net.Conn)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			if s.ctx.Err() != nil {
				return
			}
			s.opts.Logger.Warn("the proxy cannot accept", "err", err)
			select {
			case <-time.After(50 * time.Millisecond): // out of file descriptors, say
			case <-s.ctx.Done():
			}
			continue
		}
		if !s.track(conn) {
			_ = conn.Close()
			continue
		}
		s.wait.Go(func() { serve(conn) })
	}
}

// track remembers a connection so that Close can end it. It says no when there are too many, or when closing.
func (s *Server) track(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns == nil || len(s.conns) >= 2*maxConns {
		return false
	}
	s.conns[conn] = struct{}{}
	return true
}

func (s *Server) untrack(conn net.Conn) {
	_ = conn.Close()
	s.mu.Lock()
	delete(s.conns, conn)
	s.mu.Unlock()
}

// serve finds out who speaks what. A connection that speaks HTTP is the HTTP server's from then on.
func (s *Server) serve(conn net.Conn) {
	if err := permitted(conn, s.opts.Users); err != nil {
		s.opts.Logger.Warn("refused a proxy connection", "addr", conn.RemoteAddr(), "err", err)
		s.untrack(conn)
		return
	}
	_ = conn.SetDeadline(time.Now().Add(greetTimeout))
	buffered := bufio.NewReaderSize(conn, 4096)
	first, err := buffered.Peek(1)
	if err != nil {
		s.untrack(conn)
		return
	}
	client := &peeked{Conn: conn, r: buffered}
	if first[0] != socksVersion {
		_ = conn.SetDeadline(time.Time{}) // the HTTP server sets its own
		s.handoff.give(&tracked{peeked: client, server: s})
		return
	}
	defer s.untrack(conn)
	if err := s.serveSOCKS(client); err != nil {
		s.opts.Logger.Debug("a SOCKS connection failed", "err", err)
	}
}

// peeked is a connection of which the first bytes have been read already.
type peeked struct {
	net.Conn
	r *bufio.Reader
}

// Read gives the bytes read ahead first.
func (p *peeked) Read(b []byte) (int, error) { return p.r.Read(b) }

// CloseWrite ends our half (TCP FIN).
func (p *peeked) CloseWrite() error { return closeWrite(p.Conn) }

// tracked is a connection that the server forgets when the HTTP server closes it.
type tracked struct {
	*peeked
	server *Server
}

// Close closes the connection and forgets it.
func (t *tracked) Close() error {
	t.server.untrack(t.Conn)
	return nil
}
