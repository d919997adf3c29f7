// Package relayd is a relay that runs by itself: listeners, metrics and reload around package relay. It needs no state and
// knows of coordinators their public keys alone.
package relayd

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/go-chi/chi/v5/middleware"

	"github.com/culvertnet/culvert/coordinator/certs"
	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/limit"
	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// Limits on a connection until it is a WebSocket.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = time.Minute
	maxHeader     = 16 << 10
)

// Options configure a [Server].
type Options struct {
	Config *config.Standalone
	Reload time.Duration // how often Config.File is looked at for changes; 0 never, [DefaultReload] is usual
	Logger *slog.Logger
}

// DefaultReload is how often a running relay looks whether its configuration file changed.
const DefaultReload = 2 * time.Second

// Server is one relay.
//
//	New ──► Start ──► serving ──► Close: no new WebSockets, those that are open are told, everything waited for
//	                     │
//	                     └──► Failed: a listener broke
type Server struct {
	opts   Options
	config *config.Standalone // the one in force; changed by the reload loop alone
	log    *slog.Logger

	certs   *certs.Files // nil for plain HTTP
	relay   *relay.Server
	probe   *nat.Server
	web     *page
	metrics *page // nil where there are none
	fatal   chan error

	stop context.CancelFunc
	wg   sync.WaitGroup
}

// New checks opts. It opens nothing yet.
func New(opts Options) (*Server, error) {
	if opts.Config == nil {
		return nil, errors.New("a relay needs a configuration")
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	return &Server{opts: opts, config: opts.Config, log: opts.Logger.With("relay", opts.Config.Relay.Name), fatal: make(chan error, 2)}, nil
}

// Start opens the listeners and serves. After an error nothing is left open.
func (s *Server) Start(ctx context.Context) (err error) {
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = stop
	defer func() {
		if err != nil {
			_ = s.Close(ctx)
		}
	}()
	if err := s.openUDP(run); err != nil {
		return err
	}
	if err := s.openWeb(ctx); err != nil {
		return err
	}
	if s.config.Metrics != "" {
		if s.metrics, err = s.open(ctx, s.config.Metrics, s.metricsHandler(), nil); err != nil {
			return err
		}
	}
	if s.opts.Reload > 0 && s.config.File != "" {
		w := &watcher{file: s.config.File}
		w.changed()
		s.wg.Go(func() { s.reloadLoop(run, w) })
	}
	s.log.Info("relay serves", "addr", s.Addr().String(), "udp", s.UDPAddr().String(), "coordinators", len(s.config.TicketKeys))
	return nil
}

func (s *Server) openUDP(ctx context.Context) (err error) {
	c := s.config
	s.relay, err = relay.New(ctx, relay.Options{
		UDP: c.UDP, Keys: c.TicketKeys, Rate: c.Relay.BytesPerSecond(), FlowQueue: c.Relay.QueueBytes(),
		Sessions: c.Relay.Sessions, Links: c.WebSockets, Logger: s.log,
		Remote: func(r *http.Request) netip.Addr { return middleware.GetClientIPAddr(r.Context()) },
	})
	if err != nil {
		return problem.Wrap(err, problem.BadConfig, fmt.Sprintf("cannot listen on UDP %s: %v", c.UDP, problem.Reason(err)), problem.PortNext(err))
	}
	if c.Probe == "" {
		return nil
	}
	s.probe, err = nat.Listen(ctx, nat.ServerOptions{Addr: c.Probe, Logger: s.log})
	switch {
	case err == nil:
	case c.ProbeChosen:
		return problem.Wrap(err, problem.BadConfig, fmt.Sprintf("cannot listen on UDP %s: %v", c.Probe, problem.Reason(err)), "give probe another address, or set probe: off")
	default:
		s.log.Warn("no second STUN port", "addr", c.Probe, "err", err)
	}
	return nil
}

func (s *Server) openWeb(ctx context.Context) (err error) {
	var secure *tls.Config
	if s.config.TLS != nil {
		files, err := certs.Load(s.config.TLS.Cert, s.config.TLS.Key, s.log)
		if err != nil {
			return err
		}
		s.certs = files
		secure = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: files.Get, NextProtos: []string{"http/1.1"}}
	}
	mux := http.NewServeMux()
	mux.Handle(wire.PathRelay, s.relay)
	mux.HandleFunc("GET /healthz", healthz)
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		problem.Write(w, problem.New(problem.NotFound, "there is nothing at this path", "a relay serves "+wire.PathRelay))
	})
	s.web, err = s.open(ctx, s.config.Listen, s.clientIP()(mux), secure)
	return err
}

func healthz(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") }

// clientIP finds out who asks: the TCP peer, or through trusted proxies whom they name.
func (s *Server) clientIP() func(http.Handler) http.Handler {
	if len(s.config.TrustedProxies) == 0 {
		return middleware.ClientIPFromRemoteAddr
	}
	trusted := make([]string, 0, len(s.config.TrustedProxies))
	for _, p := range s.config.TrustedProxies {
		trusted = append(trusted, p.String())
	}
	return middleware.ClientIPFromXFF(trusted...)
}

// page is one HTTP server and its listener.
type page struct {
	server   *http.Server
	listener *limit.Listener
}

// bounds says how many connections strangers may open before any of them is a WebSocket: as at a coordinator, and more where more
// WebSockets are to be held.
func bounds(c *config.Standalone) limit.ConnOptions {
	links := cmp.Or(c.WebSockets, relay.DefaultLinks)
	return limit.ConnOptions{
		Open: max(limit.DefaultConns, links+links/2), OpenAddr: max(limit.DefaultAddrConns, links/4), Trusted: c.TrustedProxies,
	}
}

// open serves a handler, with TLS unless secure is nil.
func (s *Server) open(ctx context.Context, addr string, h http.Handler, secure *tls.Config) (*page, error) {
	var lc net.ListenConfig
	tcp, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, problem.Wrap(err, problem.BadConfig, fmt.Sprintf("cannot listen on TCP %s: %v", addr, problem.Reason(err)), problem.PortNext(err))
	}
	p := &page{listener: limit.NewListener(tcp, bounds(s.config)), server: &http.Server{
		Handler: h, TLSConfig: secure, MaxHeaderBytes: maxHeader,
		ReadHeaderTimeout: headerTimeout, ReadTimeout: headerTimeout, WriteTimeout: headerTimeout, IdleTimeout: idleTimeout,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // strangers' broken handshakes
	}}
	s.wg.Go(func() {
		serve := p.server.Serve
		if secure != nil {
			serve = func(l net.Listener) error { return p.server.ServeTLS(l, "", "") }
		}
		if err := serve(p.listener); !errors.Is(err, http.ErrServerClosed) {
			s.fatal <- fmt.Errorf("serve HTTP on %s: %w", addr, err)
		}
	})
	return p, nil
}

// Addr is the address for WebSockets.
func (s *Server) Addr() net.Addr { return s.web.listener.Addr() }

// UDPAddr is the address for STUN and relaying, not valid where there is none.
func (s *Server) UDPAddr() netip.AddrPort { return s.relay.Addr() }

// MetricsAddr is the address for metrics, nil where there is none.
func (s *Server) MetricsAddr() net.Addr {
	if s.metrics == nil {
		return nil
	}
	return s.metrics.listener.Addr()
}

// Failed tells of the first thing that broke for good.
func (s *Server) Failed() <-chan error { return s.fatal }

// Close stops: no new WebSockets, then those that are open are told and everything is closed and waited for. Sides go on
// over another relay or a direct path.
func (s *Server) Close(ctx context.Context) error {
	var errs []error
	for _, p := range []*page{s.web, s.metrics} {
		if p == nil {
			continue
		}
		if err := p.server.Shutdown(ctx); err != nil {
			errs = append(errs, err, p.server.Close())
		}
	}
	s.stop()
	if s.relay != nil {
		errs = append(errs, s.relay.Close())
	}
	if s.probe != nil {
		errs = append(errs, s.probe.Close())
	}
	s.wg.Wait()
	return errors.Join(errs...)
}

// Run starts the server, serves until ctx ends or something breaks, and closes within grace.
func (s *Server) Run(ctx context.Context, grace time.Duration) error {
	if err := s.Start(ctx); err != nil {
		return err
	}
	var err error
	select {
	case <-ctx.Done():
		s.log.Info("relay stops", "sessions", s.relay.Stats().Sessions)
	case err = <-s.Failed():
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	return errors.Join(err, s.Close(ctx))
}
