package server

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// private serves operators: over a socket in the state's folder, which only the coordinator's user may open, and over TCP
// where the configuration says so. Over TCP, profiles and the audit log take a secret; without one they are not there.
//
//	            socket   TCP           TCP with the secret
//	/metrics      ✓       ✓                  ✓
//	/healthz      ✓       ✓                  ✓
//	/readyz       ✓       ✓                  ✓
//	/v1/audit…    ✓       –                  ✓
//	/debug/pprof  ✓       –                  ✓
type private struct {
	servers []*http.Server
	tcp     net.Listener
	secret  atomic.Pointer[[sha256.Size]byte] // its hash; zero: there is none
}

// maxSocketName is how long a socket's path may be on Linux (sockaddr_un); other systems take 104.
const maxSocketName = 104

// openPrivate opens both listeners, and serves.
func (s *Server) openPrivate(ctx context.Context) error {
	s.private = &private{}
	s.private.secret.Store(&s.config.Private.SecretSHA256)
	open, closed := s.privatePages()
	if name := s.config.Socket(); name != "" {
		if err := s.serveSocket(ctx, name, closed); err != nil {
			return err
		}
	}
	if addr := s.config.Private.Listen; addr != "" {
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", addr)
		if err != nil {
			return problem.Wrap(err, problem.BadConfig, fmt.Sprintf("cannot listen on TCP %s for operators: %v", addr, problem.Reason(err)), problem.PortNext(err))
		}
		s.private.tcp = l
		s.servePrivate(l, s.private.guarded(open, closed))
	}
	return nil
}

// serveSocket listens on a socket, over one that a process which died has left.
func (s *Server) serveSocket(ctx context.Context, name string, h http.Handler) error {
	if len(name) >= maxSocketName {
		s.log.Warn("no socket for operators: its path is too long", "path", name, "max", maxSocketName-1)
		return nil
	}
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) { // the folder's lock is ours
		return fmt.Errorf("remove an old socket: %w", err)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", name)
	if err != nil {
		return problem.Wrap(err, problem.BadConfig, fmt.Sprintf("cannot listen on the socket %s: %v", name, problem.Reason(err)), "check that the state's folder is writable")
	}
	if err := os.Chmod(name, 0o600); err != nil { // its folder lets nobody else in before that
		_ = l.Close()
		return fmt.Errorf("close the socket to other users: %w", err)
	}
	s.servePrivate(l, h)
	return nil
}

func (s *Server) servePrivate(l net.Listener, h http.Handler) {
	srv := &http.Server{Handler: h, ReadHeaderTimeout: headerTimeout, ReadTimeout: readTimeout, WriteTimeout: 2 * time.Minute, IdleTimeout: idleTimeout, MaxHeaderBytes: 8 << 10}
	s.private.servers = append(s.private.servers, srv)
	s.wg.Go(func() {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("the private listener broke", "addr", l.Addr().String(), "err", err)
		}
	})
}

// privatePages gives what anybody who reaches the listener may see, and all of it.
func (s *Server) privatePages() (open, closed http.Handler) {
	registry := prometheus.NewRegistry()
	s.register(registry)
	pages := func(mux *http.ServeMux) *http.ServeMux {
		mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 5 * time.Second}))
		mux.Handle("GET /healthz", s.api)
		mux.Handle("GET /readyz", s.api)
		return mux
	}
	all := pages(http.NewServeMux())
	log := s.audit.Reader().Handler()
	all.Handle("GET /v1/audit", log)
	all.Handle("GET /v1/audit/", log)
	all.HandleFunc("GET /debug/pprof/", pprof.Index)
	all.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	all.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	all.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	all.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return pages(http.NewServeMux()), all
}

// guarded shows all to whoever has the secret.
func (p *private) guarded(open, closed http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		scheme, secret, _ := strings.Cut(r.Header.Get("Authorization"), " ")
		sum, want := sha256.Sum256([]byte(secret)), *p.secret.Load()
		switch {
		case want != [sha256.Size]byte{} && strings.EqualFold(scheme, wire.SchemeBearer) && subtle.ConstantTimeCompare(sum[:], want[:]) == 1:
			closed.ServeHTTP(w, r)
		case strings.HasPrefix(r.URL.Path, "/v1/") || strings.HasPrefix(r.URL.Path, "/debug/"):
			w.Header().Set("WWW-Authenticate", "Bearer")
			problem.Write(w, problem.New(problem.Unauthorized, "this takes the private listener's secret", "send it as a bearer token, or ask over the socket in the state's folder"))
		default:
			open.ServeHTTP(w, r)
		}
	})
}

// close ends both listeners. Readers that follow the log are cut.
func (p *private) close() error {
	if p == nil {
		return nil
	}
	var errs []error
	for _, srv := range p.servers {
		errs = append(errs, srv.Close())
	}
	return errors.Join(errs...)
}
