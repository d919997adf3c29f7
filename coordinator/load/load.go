// Package load plays gateways and jobs against a coordinator, with real signed tokens at a rate that is asked for, so that an
// operator can size a machine. It signs with an issuer of its own, which the coordinator must have been told to trust: never
// point it at a coordinator that guards anything.
package load

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// Options say what is played.
type Options struct {
	Coordinators []string        // base URLs to dial; jobs and gateways are spread over them
	URL          string          // the coordinators' public URL, for the tokens' audience; default the first of Coordinators
	Issuer       string          // the tokens' iss
	IssuerListen string          // TCP address on which the issuer is served; default host and port of Issuer
	JWKSFile     string          // where the issuer's keys are written instead of serving them
	Network      string          // that jobs join and gateways serve
	EnrolSecret  wire.Secret     // of the gateways; default: identity tokens of the issuer, with [Subject]
	OwnerID      string          // repository_owner_id of the jobs; default "1"
	Repository   string          // default "load/jobs"
	Gateways     int             // default 20
	Sessions     int             // that live, and renew, before anything is measured
	Burst        int             // joins at once
	Rate         float64         // joins a second, for Duration
	Duration     time.Duration   // default 30 s
	RenewEvery   time.Duration   // default 5 min
	Hold         time.Duration   // how long a session lasts until its job ends it; 0: it is left to run out
	Timeout      time.Duration   // of one join, its retries included; default 20 s
	Retry        bool            // a join that fails for now is tried again, as clients do; else it is an error
	TLS          *tls.Config     // nil: the system's roots
	InsecureHTTP bool            // take plain HTTP beyond loopback
	Enough       <-chan struct{} // once it is closed, no further joins begin at the rate; nil: only Duration ends that
	IDs          io.Writer       // gets the id of every session that was joined, one a line, to hold them against an audit log; nil: nothing
	Logger       *slog.Logger    // nil: none
}

// Subject is the sub of the gateways' identity tokens.
const Subject = "culvert-load"

// Bounds of what may be asked for.
const (
	maxGateways = 1000
	maxSessions = 2_000_000
	maxRate     = 100_000
)

// Validate fills defaults and refuses what cannot be played, with code usage.
func (o *Options) Validate() error {
	usage := func(what, next string) error { return problem.New(problem.Usage, what, next) }
	if len(o.Coordinators) == 0 {
		return usage("no coordinator is given", "give --coordinator URL")
	}
	for _, c := range o.Coordinators {
		if err := o.checkURL(c); err != nil {
			return err
		}
	}
	if err := o.checkURL(o.Issuer); err != nil {
		return err
	}
	o.defaults()
	switch {
	case o.Network == "":
		return usage("no network is given", "give --network NAME")
	case o.Gateways > maxGateways || o.Sessions > maxSessions || o.Sessions < 0 || o.Burst > maxSessions || o.Burst < 0:
		return usage(fmt.Sprintf("at most %d gateways and %d sessions can be played", maxGateways, maxSessions), "ask for less, on several machines")
	case o.Rate < 0 || o.Rate > maxRate:
		return usage(fmt.Sprintf("the rate must be between 0 and %d joins a second", maxRate), "ask for less, on several machines")
	case o.RenewEvery < time.Second:
		return usage("sessions cannot renew more often than every second", "give a longer --renew-every")
	}
	return nil
}

func (o *Options) defaults() {
	if o.URL == "" {
		o.URL = strings.TrimRight(o.Coordinators[0], "/")
	}
	if u, err := url.Parse(o.Issuer); err == nil && o.IssuerListen == "" && o.JWKSFile == "" {
		o.IssuerListen = u.Host
		if u.Port() == "" {
			o.IssuerListen = net.JoinHostPort(u.Hostname(), map[string]string{"https": "443", "http": "80"}[u.Scheme])
		}
	}
	if o.OwnerID == "" {
		o.OwnerID = "1"
	}
	if o.Repository == "" {
		o.Repository = "load/jobs"
	}
	if o.Gateways <= 0 {
		o.Gateways = 20
	}
	if o.Duration <= 0 {
		o.Duration = 30 * time.Second
	}
	if o.RenewEvery == 0 {
		o.RenewEvery = 5 * time.Minute
	}
	if o.Timeout <= 0 {
		o.Timeout = 20 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
}

// checkURL takes https, and http to loopback or where it is allowed.
func (o *Options) checkURL(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return problem.New(problem.Usage, fmt.Sprintf("%q is no URL", s), "write it as https://host")
	}
	ip := net.ParseIP(u.Hostname())
	if u.Scheme == "http" && !o.InsecureHTTP && u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return problem.New(problem.Usage, fmt.Sprintf("%s is plain HTTP", s), "use https, or say --insecure-http")
	}
	return nil
}

// player is one run.
type player struct {
	opts     Options
	log      *slog.Logger
	issuer   *issuer
	verifier *claims.Verifier // the gateways'
	gateways []*gateway
	jobs     *jobs
	live     *live
}

// Run plays what opts ask for and reports on it. An error says that it could not be played; what went wrong with single joins
// is in the report.
func Run(ctx context.Context, opts Options) (Report, error) {
	if err := opts.Validate(); err != nil {
		return Report{}, err
	}
	p := &player{opts: opts, log: opts.Logger}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop, err := p.open(ctx)
	if err != nil {
		return Report{}, err
	}
	defer stop()
	if err := p.warmUp(ctx); err != nil {
		return Report{}, err
	}
	return p.play(ctx)
}

// open starts the issuer and the gateways; stop ends them and waits.
func (p *player) open(ctx context.Context) (stop func(), err error) {
	var stops []func()
	closeAll := func() {
		for _, f := range slices.Backward(stops) {
			f()
		}
	}
	defer func() {
		if err != nil {
			closeAll()
		}
	}()
	if p.jobs, err = newJobs(p.opts); err != nil {
		return nil, err
	}
	if p.issuer, err = newIssuer(p.opts); err != nil {
		return nil, err
	}
	closeIssuer, err := p.issuer.publish(ctx)
	if err != nil {
		return nil, err
	}
	stops = append(stops, closeIssuer)
	if err := p.reach(ctx); err != nil {
		return nil, err
	}
	p.verifier, err = claims.New(claims.Options{
		Issuers: []claims.Issuer{{URL: p.opts.Issuer, JWKSFile: p.opts.JWKSFile}}, InsecureHTTP: p.opts.InsecureHTTP, Logger: p.log,
	})
	if err != nil {
		return nil, fmt.Errorf("set up the gateways' verifier: %w", err)
	}
	stops = append(stops, func() { _ = p.verifier.Close() })
	if err := p.verifier.Prefetch(ctx); err != nil {
		return nil, fmt.Errorf("the gateways cannot get the keys of the issuer that is played: %w", err)
	}
	p.live = newLive(p.opts.RenewEvery, p.opts.IDs)
	closeGateways, err := p.openGateways(ctx)
	if err == nil {
		stops = append(stops, closeGateways)
	}
	return closeAll, err
}

// warmUpFor is above the minute in which a coordinator fetches an issuer's keys only once: it may know those of an earlier run.
const warmUpFor = 75 * time.Second

// warmUp joins one job, again and again until the coordinator has the keys and sees the gateways.
func (p *player) warmUp(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, warmUpFor)
	defer cancel()
	for n := 0; ; n++ {
		t, err := p.issuer.job()
		if err != nil {
			return err
		}
		s, err := p.jobs.join(limited, n, t)
		if err == nil {
			p.live.add(s, time.Now().Add(p.opts.RenewEvery))
			return nil
		}
		switch code := problem.CodeOf(err); {
		case ctx.Err() != nil: // said below
		case code == problem.TokenUnknownKey || code == problem.NoGateway || problem.Temporary(err):
			p.log.Info("waiting for the coordinator to know issuer and gateways", "code", code)
		default:
			return fmt.Errorf("the first join: %w", err)
		}
		select {
		case <-ctx.Done():
			return interrupted("the first join", err)
		case <-limited.Done():
			return fmt.Errorf("the first join, tried for %v: %w", warmUpFor, err)
		case <-time.After(500 * time.Millisecond):
		}
	}
}
