// Package agent is a job's side of one session: join, tunnel, renew, rejoin, leave.
//
// Everything that can happen at the same time does: the token, the connection to the coordinator, the tunnel and the
// reflexive address are all under way before the first of them is there, and path checks start on the first line of the
// coordinator's answer.
package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/client/control"
	granted "github.com/culvertnet/culvert/client/names"
	"github.com/culvertnet/culvert/client/proxy"
	"github.com/culvertnet/culvert/client/uapi"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// Mode is how programs get into the tunnel.
type Mode string

// The modes.
const (
	ModeTUN    Mode = "tun"    // a network interface with routes; needs CAP_NET_ADMIN
	ModeKernel Mode = "kernel" // the same, but the kernel speaks WireGuard; needs CAP_SYS_ADMIN too
	ModeProxy  Mode = "proxy"  // SOCKS5 and HTTP on loopback; needs nothing
)

// TokenSource asks the issuer for a token with this audience.
type TokenSource interface {
	Token(ctx context.Context, audience string) (wire.Secret, error)
}

// Options configure an [Agent].
type Options struct {
	Coordinator  string        // URL; part of every token's audience
	Network      string        // may be empty where the coordinator has one network
	Mode         Mode          // default proxy
	Pins         []wire.Key    // the only gateways to talk to; empty trusts the coordinator to name them
	WaitFor      []string      // "host:port", each to answer a TCP connect before the tunnel counts as up
	Timeout      time.Duration // until the tunnel is up; default 60 s
	InsecureHTTP bool          // allow http:// to a coordinator that is not on loopback
	ProxyListen  string        // in mode proxy; default a free port of 127.0.0.1
	ProxyUsers   []int         // who may use the proxy and the forwards, by user id; default the process's own
	Forwards     []proxy.Forward
	Name         string    // of the tunnel, by which others of the user know it; "" where it has no control socket
	Job          string    // whose tunnel it is, see [control.Claim]
	User         int       // whose interface it is, see [host.Options]; 0 for everybody's
	Client       string    // program, version and platform, for the coordinator's log
	Started      time.Time // what timings count from; default now
	Logger       *slog.Logger

	// Tokens makes the source of tokens; requests go through the given client.
	Tokens func(*http.Client) (TokenSource, error)
	// OnReady is called once, when the tunnel is usable.
	OnReady func(Ready)

	// Reserved are hosts that the runner itself needs, such as a GitHub server of one's own: their names never go into the tunnel.
	Reserved []string
	// Direct are destinations that stay outside the tunnel whatever is granted: addresses, CIDRs, host names, and [DirectGitHub].
	Direct []string

	startNames startNames                                                   // a test's own; default is the system's
	openLink   func(Mode, *slog.Logger) (link, error)                       // a test's own link; default is the real one
	lookup     func(ctx context.Context, host string) ([]netip.Addr, error) // a test's own names; default is the system's
	resolvers  func() []netip.Addr                                          // a test's own DNS servers of the host; default is the system's
	tools      string                                                       // where tools for WireGuard find the tunnel; "" with a test's own link
	url        *url.URL
}

// Ready is what `culvert up` reports.
type Ready struct {
	Session string       `json:"session"`
	Network string       `json:"network"`
	Address string       `json:"address"` // the session's first overlay address
	Gateway string       `json:"gateway"`
	Path    control.Path `json:"path"`
	Proxy   string       `json:"proxy,omitempty"` // "IP:port" in mode proxy
	// LeftOut is what is granted and stays with a link of this host's own, as in "172.17.0.0/16 to docker0".
	LeftOut []string `json:"left_out,omitempty"`
	Mode    Mode     `json:"mode"`
	Timings Timings  `json:"timings"`
}

// Timings tells how long after the start each thing was there, in milliseconds. They overlap.
type Timings struct {
	Token     float64 `json:"token_ms"`
	Connect   float64 `json:"connect_ms"`   // connected to the coordinator, TLS included
	Join      float64 `json:"join_ms"`      // the coordinator's first word
	Path      float64 `json:"path_ms"`      // a path to the gateway was validated
	Handshake float64 `json:"handshake_ms"` // WireGuard's
	Usable    float64 `json:"usable_ms"`    // bytes have flowed both ways
	Total     float64 `json:"total_ms"`     // and every --wait-for has answered
}

// Validate fills defaults and refuses what cannot work. Errors are *problem.Error.
func (o *Options) Validate() error {
	if o.Mode == "" {
		o.Mode = ModeProxy
	}
	if o.Timeout <= 0 {
		o.Timeout = time.Minute
	}
	if o.Started.IsZero() {
		o.Started = time.Now()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.OnReady == nil {
		o.OnReady = func(Ready) {}
	}
	if o.startNames == nil {
		o.startNames = systemNames
	}
	if o.openLink == nil {
		user := o.User
		o.openLink = func(mode Mode, log *slog.Logger) (link, error) { return openLink(mode, user, log) }
		o.tools = uapi.Dir
	}
	if o.lookup == nil {
		o.lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	if o.resolvers == nil {
		o.resolvers = granted.SystemServers
	}
	if o.Tokens == nil {
		return errors.New("an agent needs a source of tokens")
	}
	for _, target := range o.WaitFor {
		if err := CheckTarget(target); err != nil {
			return err
		}
	}
	return o.parseURL()
}

func (o *Options) parseURL() error {
	const next = "give --coordinator (or CULVERT_COORDINATOR) its URL, such as https://culvert.example.com"
	u, err := url.Parse(o.Coordinator)
	switch {
	case o.Coordinator == "":
		return problem.New(problem.Usage, "no coordinator is named", next)
	case err != nil:
		return problem.New(problem.Usage, "the coordinator's URL does not parse", next)
	case u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || (u.Scheme != "https" && u.Scheme != "http"):
		return problem.New(problem.Usage, fmt.Sprintf("%q is not a coordinator's URL", u.Redacted()), next)
	case u.Scheme == "http" && !o.InsecureHTTP && !loopback(u.Hostname()):
		return problem.New(problem.Usage, "plain http would show the job's token to everybody on the way",
			"use https, or say --insecure-http if you mean it")
	}
	o.Coordinator = strings.TrimRight(o.Coordinator, "/")
	o.url, err = url.Parse(o.Coordinator)
	return err
}

func loopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || (err == nil && addr.Unmap().IsLoopback())
}

// CheckTarget refuses what is not "host:port".
func CheckTarget(target string) error {
	host, port, err := net.SplitHostPort(target)
	if err == nil && host != "" {
		if n, perr := net.LookupPort("tcp", port); perr == nil && n > 0 {
			return nil
		}
	}
	return problem.New(problem.Usage, fmt.Sprintf("%q is not HOST:PORT", target), "write it like 10.20.0.5:5432")
}

// Agent holds one session after the other until its context ends.
type Agent struct {
	opts    Options
	log     *slog.Logger
	tokens  TokenSource
	api     *coordinator
	direct  *outside
	aside   *aside
	granted *granted.Resolver

	stop context.CancelFunc
	done chan struct{} // closed when Run has returned
	wait sync.WaitGroup

	mu      sync.Mutex // guards what follows
	link    link
	tunnel  *tunnel.Tunnel
	shown   *uapi.Server // nil where no tool sees the tunnel
	proxy   *proxy.Server
	session *session // nil before the first and between two
	state   control.State
	since   time.Time
	rejoins int
	history []control.Event
	problem *problem.Error
	marks   marks
	// unreached is why there is no connection to the coordinator; guarded by marks.mu.
	unreached error
	routes    routes

	resolving resolving
	others    others
	disputed  atomic.Bool // another tunnel of the same programs leads to the range of service addresses, too
}

// New makes an agent. It asks nothing of the network yet, but says at once when no token can be had.
func New(opts Options) (*Agent, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	a := &Agent{
		opts:   opts,
		log:    opts.Logger,
		direct: newOutside(),
		done:   make(chan struct{}),
		stop:   func() {},
		state:  control.Joining,
		since:  time.Now(),
		marks:  marks{started: opts.Started},
	}
	client := a.direct.client()
	a.api = &coordinator{base: opts.Coordinator, http: client, avoid: a.direct.dialer.Avoid}
	var err error
	if a.tokens, err = opts.Tokens(client); err != nil {
		return nil, err
	}
	if a.aside, err = newAside(opts.Direct, opts.Reserved); err != nil {
		return nil, err
	}
	a.direct.onNew = func(addr netip.Addr) { a.keepOutside(addr) }
	a.granted = a.newNames()
	return a, nil
}

// Run joins and holds the session until ctx ends or Down is called, and then leaves. It returns nil in that case, and a
// *problem.Error when the session could not be had, or is over for good. It is called once.
func (a *Agent) Run(ctx context.Context) error {
	defer close(a.done)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	a.mu.Lock()
	a.stop = stop
	a.mu.Unlock()
	err := a.run(ctx)
	if ctx.Err() != nil && a.wasUp() {
		err = nil
	}
	a.close(err)
	return err
}

func (a *Agent) run(ctx context.Context) error {
	// The system's authorities are hundreds of files. Read now, they are there when the first certificate comes.
	a.wait.Go(func() { _, _ = x509.SystemCertPool() })
	if err := a.startProxy(); err != nil {
		return err
	}
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	a.wait.Go(func() { a.keepAside(ctx) })
	joining, cancel := context.WithTimeoutCause(ctx, a.opts.Timeout, errGaveUp)
	s, err := a.establish(joining, demands{a.opts.WaitFor, a.opts.Forwards})
	cancel()
	if err != nil {
		return err
	}
	if err := a.clash(ctx); err != nil {
		return err
	}
	a.ready(s)
	return a.hold(ctx, s)
}

// hold keeps a session alive, and takes a new one when it is lost.
func (a *Agent) hold(ctx context.Context, s *session) error {
	var pause backoff
	for {
		began := time.Now()
		why, err := s.keep(ctx)
		if err != nil {
			return err
		}
		a.note(control.Rejoining, "lost the session: "+why)
		a.log.Warn("lost the session, joining again", "session", s.ID, "reason", why)
		a.cut()
		a.discard(s)
		if time.Since(began) > time.Minute {
			pause = backoff{}
		} else if pause.wait(ctx) != nil { // a session that is lost at once is not asked for again at once
			return ctx.Err()
		}
		if s, err = a.establish(ctx, demands{}); err != nil {
			return endedByPolicy(err)
		}
		a.mu.Lock()
		a.rejoins++
		a.mu.Unlock()
		a.note(control.Up, "up again as session "+s.ID)
		gw, _ := s.at()
		a.log.Info("joined again", "session", s.ID, "gateway", gw.Name)
	}
}

// endedByPolicy says what it means that a job which was let in before no longer is.
func endedByPolicy(err error) error {
	p := problem.From(err)
	if p.Code != problem.Denied {
		return err
	}
	out := *p
	out.Message = "policy has ended the session: " + p.Message
	return &out
}

// cut resets the connections through a session that is lost: the next one has another address, and they would hang.
func (a *Agent) cut() {
	reset, err := a.openedLink().Established()
	if err == nil {
		err = reset()
	}
	if err != nil {
		a.log.Warn("open connections may hang", "err", err)
	}
}

// Down ends the session and returns when everything is closed, or ctx ended.
func (a *Agent) Down(ctx context.Context) error {
	a.mu.Lock()
	stop := a.stop
	a.mu.Unlock()
	stop()
	select {
	case <-a.done:
		return nil
	case <-ctx.Done():
		return problem.Wrap(ctx.Err(), problem.Timeout, "the tunnel did not close in time", "end its process")
	}
}

// close leaves the session and takes everything down, in parallel; the coordinator's word is waited for 2 s at most.
func (a *Agent) close(err error) {
	a.note(control.Closing, "closing")
	a.mu.Lock()
	s, tun, link, server, shown := a.session, a.tunnel, a.link, a.proxy, a.shown
	a.session = nil
	a.mu.Unlock()
	if shown != nil {
		_ = shown.Close()
	}
	if server != nil {
		_ = server.Close()
	}
	a.closeNames()
	if s != nil {
		a.discard(s)
	}
	switch {
	case tun != nil:
		_ = tun.Close() // closes the link's device too
	case link != nil:
		_ = link.Close()
	}
	a.wait.Wait()
	a.api.http.CloseIdleConnections()
	if err != nil {
		a.fail(err)
	}
	a.note(control.Ended, "ended")
}

func (a *Agent) startProxy() error {
	if a.opts.Mode != ModeProxy && len(a.opts.Forwards) == 0 {
		return nil
	}
	server, err := proxy.Listen(proxy.Options{
		Listen:   a.opts.ProxyListen,
		Forwards: a.opts.Forwards,
		NoProxy:  a.opts.Mode != ModeProxy,
		Dial:     a.dialInside,
		Inside:   a.inside,
		Lookup:   a.lookupInside,
		Within:   a.within,
		Explain:  a.explain,
		Other:    a.elsewhere,
		Users:    a.opts.ProxyUsers,
		Logger:   a.log,
	})
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.proxy = server
	a.mu.Unlock()
	return nil
}

func (a *Agent) ready(s *session) {
	gw, peer := s.at()
	a.mu.Lock()
	a.marks.set(&a.marks.total)
	r := Ready{
		Session: s.ID,
		Network: s.Network,
		Address: s.Addresses[0].String(),
		Gateway: gw.Name,
		Path:    describe(peer.Status().Path),
		Mode:    a.opts.Mode,
		Timings: a.marks.timings(),
	}
	if a.opts.Mode == ModeProxy && a.proxy != nil {
		r.Proxy = a.proxy.Addr().String()
	}
	a.mu.Unlock()
	a.routes.mu.Lock()
	r.LeftOut = texts(a.routes.left)
	a.routes.mu.Unlock()
	a.note(control.Up, "up")
	a.log.Info("up", "session", s.ID, "network", s.Network, "gateway", gw.Name, "addr", r.Path.Remote)
	a.opts.OnReady(r)
}
