package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

// handoff is a listener that hands out connections accepted elsewhere.
type handoff struct {
	addr  net.Addr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newHandoff(addr net.Addr) *handoff {
	return &handoff{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

func (h *handoff) give(conn net.Conn) {
	select {
	case h.conns <- conn:
	case <-h.done:
		_ = conn.Close()
	}
}

// Accept waits for the next connection.
func (h *handoff) Accept() (net.Conn, error) {
	select {
	case conn := <-h.conns:
		return conn, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept.
func (h *handoff) Close() error {
	h.once.Do(func() { close(h.done) })
	return nil
}

// Addr is loopback: the listeners that really accept are there.
func (h *handoff) Addr() net.Addr { return h.addr }

// serveHTTP starts the HTTP server behind the handoff.
func (s *Server) serveHTTP() {
	s.handoff = newHandoff(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	s.onward = &http.Transport{
		DialContext:        func(ctx context.Context, _, addr string) (net.Conn, error) { return s.dial(ctx, addr) },
		IdleConnTimeout:    30 * time.Second,
		DisableCompression: true, // pass on what the target says
	}
	forward := &httputil.ReverseProxy{
		Rewrite:       func(*httputil.ProxyRequest) {}, // as it came, less the hop-by-hop headers
		Transport:     s.onward,
		FlushInterval: -1,
		ErrorLog:      slog.NewLogLogger(s.opts.Logger.Handler(), slog.LevelDebug),
		ErrorHandler:  brokeOff,
	}
	s.web = &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.serveRequest(w, r, forward)
		}),
		ReadHeaderTimeout: greetTimeout,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return s.ctx },
		ErrorLog:          slog.NewLogLogger(s.opts.Logger.Handler(), slog.LevelDebug),
	}
	s.wait.Go(func() { _ = s.web.Serve(s.handoff) }) // ends with ErrServerClosed
}

func (s *Server) serveRequest(w http.ResponseWriter, r *http.Request, forward http.Handler) {
	if !s.enter() {
		return
	}
	defer s.wait.Done()
	switch {
	case r.Method == http.MethodConnect:
		s.connect(w, r)
	case r.URL.Scheme == "http" && r.URL.Host != "":
		forward.ServeHTTP(w, r)
	default:
		refuse(w, problem.New(problem.BadRequest, "this is a proxy: it takes CONNECT, and http:// URLs in absolute form",
			"point the program's proxy setting here, not its requests"))
	}
}

// connect serves HTTP CONNECT (RFC 9110, section 9.3.6).
func (s *Server) connect(w http.ResponseWriter, r *http.Request) {
	remote, err := s.dial(s.ctx, r.Host) // the request's own context ends when the program has said all it had to say
	if err != nil {
		refuse(w, err)
		return
	}
	if !s.track(remote) {
		_ = remote.Close()
		refuse(w, problem.New(problem.RateLimited, "the proxy has too many connections open", "close some"))
		return
	}
	defer s.untrack(remote)
	conn, rw, err := w.(http.Hijacker).Hijack()
	if err != nil {
		refuse(w, fmt.Errorf("take over the connection: %w", err))
		return
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Time{})
	if _, err := conn.Write([]byte("HTTP/1.1 200 Connection established\r\n\r\n")); err != nil {
		return
	}
	splice(ahead(conn, rw.Reader), remote, s.opts.Idle)
}

// ahead puts back what the HTTP server read beyond the request.
func ahead(conn net.Conn, r *bufio.Reader) net.Conn {
	if r.Buffered() == 0 {
		return conn
	}
	return &peeked{Conn: conn, r: r}
}

// brokeOff answers a request whose target did not answer it.
func brokeOff(w http.ResponseWriter, r *http.Request, err error) {
	if _, ok := errors.AsType[*problem.Error](err); !ok {
		err = problem.Wrap(err, problem.FlowUnreachable, fmt.Sprintf("%s was reached, but gave no answer in HTTP: %v", r.URL.Host, err),
			"check what runs there")
	}
	refuse(w, err)
}

// refuse answers with the error in plain text, 403 where the grant does not cover the target and 502 otherwise.
func refuse(w http.ResponseWriter, err error) {
	p := problem.From(err)
	status := http.StatusBadGateway
	switch p.Code {
	case problem.FlowDenied:
		status = http.StatusForbidden
	case problem.BadRequest:
		status = http.StatusBadRequest
	case problem.Timeout:
		status = http.StatusGatewayTimeout
	case problem.RateLimited:
		status = http.StatusServiceUnavailable
	}
	w.Header().Set("Culvert-Problem", string(p.Code))
	http.Error(w, "culvert: "+p.Error(), status)
}
