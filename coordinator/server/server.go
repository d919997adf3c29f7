// Package server is the running coordinator: listeners, state, STUN and reload around the API.
package server

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/coordinator/api"
	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/coordinator/certs"
	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/limit"
	"github.com/culvertnet/culvert/coordinator/session"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// Limits on a connection. Reading a body and a join have tighter ones of their own in package api; a hijacked WebSocket
// is free of all of them.
const (
	headerTimeout = 10 * time.Second
	readTimeout   = 30 * time.Second
	writeTimeout  = 45 * time.Second
	idleTimeout   = 2 * time.Minute
	maxStreams    = 100      // of one HTTP/2 connection
	maxHeader     = 32 << 10 // an identity token of 16 KiB travels in a header
)

// Options configure a [Server].
type Options struct {
	Config        *config.Config
	Reload        time.Duration // how often Config.File is looked at for changes; 0 never, [DefaultReload] is usual
	Logger        *slog.Logger
	Version       string        // of the program, for its metrics
	Drain         time.Duration // how long Run goes on serving after its context has ended, with /readyz failing
	HeaderTimeout time.Duration // for a request's header to arrive; default 10 s
	Stdout        io.Writer     // where audit records go besides the log, unless the configuration says otherwise; nil: nowhere
	API           api.Options   // limits and timings; what the server itself provides is filled in
}

// DefaultReload is how often a running coordinator looks whether its configuration file changed.
const DefaultReload = 2 * time.Second

// Server is one coordinator node.
//
//	New ──► Start ──► serving ──► Close: drain joins ──► end streams ──► STUN, state, verifiers
//	                     │
//	                     └──► Failed: a listener broke
type Server struct {
	opts Options
	log  *slog.Logger

	store    *state.Store
	sessions *session.Manager
	api      *api.API
	http     *http.Server
	listener net.Listener
	conns    *limit.Listener    // listener, within bounds
	relay    *relay.Server      // this node's own; nil where it has none
	stun     *nat.Server        // on the UDP port where the relay is not; nil without UDP
	probe    *nat.Server        // the second port; nil without one
	tickets  ed25519.PrivateKey // signs relay tickets
	certs    *certs.Files       // the certificate's; nil where it comes from a CA, or from nowhere
	acme     *certs.ACME        // nil where the certificate comes from files, or from nowhere
	watch    *watcher
	private  *private
	plain    *http.Server // answers HTTP-01 challenges; nil where there is no listener for them
	fatal    chan error   // buffered

	audit      *audit.Log
	auditStore *state.Log
	auditFile  *copyFile // nil where no file is written
	started    bool      // its start is on record; written by Start alone
	metrics    *metrics

	mu         sync.Mutex // guards what a reload replaces
	config     *config.Config
	jobs       *claims.Verifier // verifies jobs
	identities *claims.Verifier // verifies gateways; its issuers never admit jobs; nil where they all use secrets

	stop context.CancelFunc
	wg   sync.WaitGroup
}

// New checks opts. It opens nothing yet.
func New(opts Options) (*Server, error) {
	if opts.Config == nil {
		return nil, errors.New("a server needs a configuration")
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.HeaderTimeout <= 0 {
		opts.HeaderTimeout = headerTimeout
	}
	return &Server{opts: opts, log: opts.Logger, config: opts.Config, fatal: make(chan error, 1), metrics: newMetrics()}, nil
}

// Start opens state and listeners and serves. After an error nothing is left open.
func (s *Server) Start(ctx context.Context) (err error) {
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = stop
	defer func() {
		if err != nil {
			s.abandon()
		}
	}()
	if err := s.openVerifiers(); err != nil {
		return err
	}
	if err := s.openState(ctx); err != nil {
		return err
	}
	if err := s.listen(ctx); err != nil {
		return err
	}
	if err := s.build(); err != nil {
		return err
	}
	if err := s.recordStart(ctx); err != nil {
		return err
	}
	if err := s.openPrivate(ctx); err != nil {
		return err
	}
	s.metrics.loaded.SetToCurrentTime()
	jobs := s.jobs                                 // a reload may replace it
	s.wg.Go(func() { _ = jobs.Prefetch(run) })     // failures are logged there; the first token tries again
	s.wg.Go(func() { s.sessions.Reevaluate(run) }) // the rules may have changed while we were away
	s.wg.Go(func() { s.expireLoop(run) })
	s.wg.Go(func() { s.sessions.Expire(run) })
	s.wg.Go(func() { s.watchdog(run) })
	if err := s.openACME(ctx, run); err != nil {
		return err
	}
	s.wg.Go(s.serve)
	s.log.Info("coordinator serves", "url", s.config.URL, "addr", s.Addr().String(), "stun", s.stunAt(),
		"relays", len(s.relays()), "networks", s.config.NetworkNames(), "rules", len(s.config.Rules))
	if s.opts.Reload > 0 && s.config.File != "" {
		s.watch = newWatcher(s.config.File)
		s.wg.Go(func() { s.reloadLoop(run) })
	}
	return nil
}

func (s *Server) openVerifiers() (err error) {
	if s.jobs, err = verifier(s.config.Issuers, s.config, s.log); err != nil {
		return fmt.Errorf("set up the jobs' issuers: %w", err)
	}
	if s.identities, err = identities(s.config, s.log); err != nil {
		return fmt.Errorf("set up the gateways' issuers: %w", err)
	}
	return nil
}

func verifier(issuers []claims.Issuer, c *config.Config, log *slog.Logger) (*claims.Verifier, error) {
	return claims.New(claims.Options{Issuers: issuers, InsecureHTTP: c.InsecureHTTP, Logger: log})
}

// identities makes the verifier of gateways' identities, nil where no gateway has one.
func identities(c *config.Config, log *slog.Logger) (*claims.Verifier, error) {
	issuers := c.GatewayIssuers()
	if len(issuers) == 0 {
		return nil, nil
	}
	return verifier(issuers, c, log)
}

// noIdentities stands where no gateway is known by a workload identity.
type noIdentities struct{}

// Verify refuses every token.
func (noIdentities) Verify(context.Context, string, string) (*claims.Claims, error) {
	return nil, problem.New(problem.TokenIssuer, "no issuer of gateways' identities is configured",
		"use an enrolment secret, or add the issuer to the network's `gateways`")
}

// asIdentities gives what the API takes.
func asIdentities(v *claims.Verifier) api.Identities {
	if v == nil {
		return noIdentities{}
	}
	return v
}

func (s *Server) openState(ctx context.Context) (err error) {
	c := s.config.State
	s.store, err = state.Open(ctx, state.Options{Dir: c.Dir, NATS: c.NATS, Credentials: c.Credentials, Elections: c.Elections, Logger: s.log})
	if err != nil && problem.CodeOf(err) == problem.Failed {
		return problem.Wrap(err, problem.Failed, fmt.Sprintf("cannot open the state: %v", err),
			"check that the folder is writable and that the disk has room")
	}
	if err != nil {
		return err
	}
	if s.tickets, err = s.store.TicketKey(ctx); err != nil {
		return err
	}
	return s.openAudit(ctx)
}

func (s *Server) listen(ctx context.Context) (err error) {
	lc := net.ListenConfig{KeepAlive: -1} // whose connections are kept says who bounds them
	if s.listener, err = lc.Listen(ctx, "tcp", s.config.Listen); err != nil {
		return problem.Wrap(err, problem.BadConfig, fmt.Sprintf("cannot listen on TCP %s: %v", s.config.Listen, problem.Reason(err)), problem.PortNext(err))
	}
	return s.openUDP(ctx)
}

// relays are those that clients and gateways are told of.
func (s *Server) relays() []wire.Relay { return s.config.ListedRelays(s.STUNAddr()) }

func (s *Server) sessionRules() session.Rules {
	return session.Rules{Config: s.config, Verifier: s.jobs, Relays: s.relays()}
}

func (s *Server) apiRules() api.Rules {
	return api.Rules{
		Config: s.config, Identities: asIdentities(s.identities), STUN: s.config.ListedSTUN(s.ports()...), Relays: s.relays(),
	}
}

func sessionLimits(l config.Limits) session.Limits {
	return session.Limits{Owner: l.Owner, Repository: l.Repository, Total: l.Total}
}

// build puts sessions, API and HTTP server together.
func (s *Server) build() (err error) {
	s.sessions, err = session.New(session.Options{Store: s.store, Rules: s.sessionRules(), TicketKey: s.tickets, Audit: s.audit, Limits: sessionLimits(s.config.Limits), Logger: s.log})
	if err != nil {
		return err
	}
	o := s.opts.API
	o.Sessions, o.Store, o.Audit, o.Metrics, o.Logger = s.sessions, s.store, s.audit, s.metrics.api, s.log
	o.Rules, o.TicketKey = s.apiRules(), base64.RawURLEncoding.EncodeToString(s.tickets.Public().(ed25519.PublicKey))
	o.Standing = s.sessions.Standing
	if s.relay != nil {
		o.Relay = s.relay
	}
	o.TrustedProxies = s.config.TrustedProxies
	l := s.config.Limits
	if l.Address > 0 {
		o.Rate, o.Burst = rate.Limit(l.Address), max(int(l.Address*10), 1)
	}
	if s.api, err = api.New(o); err != nil {
		return err
	}
	s.conns = limit.NewListener(s.listener, limit.ConnOptions{
		Open: l.Connections, OpenAddr: l.AddressConnections, Rate: l.ConnectionRate, Trusted: s.config.TrustedProxies,
	})
	s.http = &http.Server{
		Handler: s.api, ReadHeaderTimeout: s.opts.HeaderTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout,
		IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader, HTTP2: &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // strangers' broken handshakes
	}
	return s.certificate()
}

func (s *Server) serve() {
	var err error
	if s.http.TLSConfig != nil {
		err = s.http.ServeTLS(s.conns, "", "")
	} else {
		err = s.http.Serve(s.conns)
	}
	if !errors.Is(err, http.ErrServerClosed) {
		s.fatal <- fmt.Errorf("serve HTTP: %w", err)
	}
}

// Addr is the HTTP listener's address.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// Failed tells of the first thing that broke for good.
func (s *Server) Failed() <-chan error { return s.fatal }

// Close stops gracefully: no new joins, those in progress finish, gateways are told that we go away, then everything is
// closed and waited for. When ctx ends first, joins in progress are cut.
func (s *Server) Close(ctx context.Context) error {
	s.api.Drain()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = fmt.Errorf("joins in progress were cut: %w", errors.Join(err, s.http.Close()))
	}
	s.api.Close()
	s.stop()
	err = errors.Join(err, s.private.close(), s.closeChallenges())
	s.wg.Wait()
	return errors.Join(err, s.closeAll())
}

// abandon closes what a failed Start had opened.
func (s *Server) abandon() {
	s.stop()
	if s.listener != nil {
		_ = s.listener.Close()
	}
	_ = s.private.close()
	_ = s.closeChallenges()
	s.wg.Wait()
	_ = s.closeAll()
}

func (s *Server) closeAll() error {
	var errs []error
	add := func(what string, c io.Closer) {
		if err := c.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close %s: %w", what, err))
		}
	}
	if s.stun != nil {
		add("STUN", s.stun)
	}
	if s.relay != nil {
		add("the relay", s.relay)
	}
	if s.probe != nil {
		add("the second STUN port", s.probe)
	}
	if err := s.closeLog(); err != nil {
		errs = append(errs, fmt.Errorf("close the audit log: %w", err))
	}
	if s.store != nil {
		add("the state", s.store)
	}
	if s.jobs != nil {
		add("the jobs' verifier", s.jobs)
	}
	if s.identities != nil {
		add("the gateways' verifier", s.identities)
	}
	return errors.Join(errs...)
}

// Run starts the server, serves until ctx ends or something breaks, and closes within grace.
func (s *Server) Run(ctx context.Context, grace time.Duration) error {
	if err := s.Start(ctx); err != nil {
		return err
	}
	var err error
	s.notify(daemon.SdNotifyReady)
	select {
	case <-ctx.Done():
		s.notify(daemon.SdNotifyStopping)
		s.log.Info("coordinator stops", "drain", s.opts.Drain, "grace", grace)
		err = s.drain()
	case err = <-s.Failed():
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	return errors.Join(err, s.Close(ctx))
}
