package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"log/slog"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/load"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// loadCmd measures what a coordinator carries.
type loadCmd struct {
	Coordinator    []string      `required:"" placeholder:"URL" help:"The coordinator; several for a cluster, over which jobs and gateways are spread."`
	URL            string        `name:"url" placeholder:"URL" help:"Its public URL, where that is another one."`
	Issuer         string        `required:"" placeholder:"URL" help:"The issuer that is played; the coordinator must list it."`
	IssuerListen   string        `placeholder:"ADDR" help:"Where the issuer is served, if not at its URL's host and port."`
	JWKSFile       string        `name:"jwks-file" placeholder:"FILE" help:"Write the issuer's keys to this file instead, which the coordinator reads."`
	Network        string        `default:"load" help:"The network that jobs join and gateways serve."`
	EnrolTokenFile string        `placeholder:"FILE" help:"The gateways' enrolment secret; else they use the issuer, with the subject culvert-load."`
	OwnerID        string        `name:"owner-id" default:"1" help:"The jobs' repository_owner_id."`
	Repository     string        `default:"load/jobs" help:"The jobs' repository."`
	Gateways       int           `default:"20" help:"How many gateways."`
	Sessions       int           `default:"0" help:"Live sessions, which renew, before anything is measured."`
	Burst          int           `default:"0" help:"Joins at once."`
	Rate           float64       `default:"100" help:"Joins a second; 0 for none."`
	Duration       time.Duration `default:"30s" help:"How long."`
	RenewEvery     time.Duration `default:"5m" help:"How often a session renews."`
	Hold           time.Duration `default:"0s" help:"How long a session lasts until its job ends it; 0 leaves it to run out."`
	Timeout        time.Duration `default:"20s" help:"How long one join may take."`
	Retry          bool          `help:"Try a join again that fails for now, as clients do, instead of counting it as an error."`
	CA             string        `name:"ca" type:"existingfile" placeholder:"FILE" help:"Certificates of authorities to believe besides the system's."`
	InsecureHTTP   bool          `name:"insecure-http" help:"Take plain HTTP beyond loopback."`
	IDs            string        `name:"ids" placeholder:"FILE" help:"Write the id of every session that was joined to this file, to hold them against the audit log."`
	JSON           bool          `name:"json" help:"Print JSON."`
	LogLevel       slog.Level    `default:"info" help:"debug, info, warn or error."`
}

// Run prints the report and fails if anything went wrong.
func (c *loadCmd) Run() error {
	opts, err := c.options()
	if err != nil {
		return err
	}
	debug.SetGCPercent(400) // the processor is for what is measured, and what lives here is small
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	ctx, opts.Enough = endsEarly(ctx)
	if c.IDs != "" {
		f, err := os.Create(c.IDs)
		if err != nil {
			return problem.Wrap(err, problem.Usage, "the file for ids cannot be written", "give --ids a path that can be written to")
		}
		defer f.Close()
		opts.IDs = f
	}
	report, err := load.Run(ctx, opts)
	if err != nil {
		return err
	}
	if c.JSON {
		err = config.WriteJSON(os.Stdout, report)
	} else {
		err = report.WriteText(os.Stdout)
	}
	if n := report.Failed(); err == nil && n > 0 {
		err = problem.New(problem.Failed, fmt.Sprintf("%d things went wrong", n), "the report says which; the coordinator's limits may be in the way")
	}
	return err
}

// endsEarly has a first interrupt close enough, so that what was measured by then is reported, and a second one end ctx.
func endsEarly(ctx context.Context) (context.Context, <-chan struct{}) {
	ctx, cancel := context.WithCancel(ctx)
	enough, interrupts := make(chan struct{}), make(chan os.Signal, 2)
	signal.Notify(interrupts, os.Interrupt)
	go func() { // as long as the program
		<-interrupts
		close(enough)
		<-interrupts
		cancel()
	}()
	return ctx, enough
}

func (c *loadCmd) options() (load.Options, error) {
	o := load.Options{
		Coordinators: c.Coordinator, URL: strings.TrimRight(c.URL, "/"), Issuer: c.Issuer, IssuerListen: c.IssuerListen, JWKSFile: c.JWKSFile, Network: c.Network,
		OwnerID: c.OwnerID, Repository: c.Repository, Gateways: c.Gateways, Sessions: c.Sessions, Burst: c.Burst, Rate: c.Rate, Duration: c.Duration,
		RenewEvery: c.RenewEvery, Hold: c.Hold, Timeout: c.Timeout, Retry: c.Retry, InsecureHTTP: c.InsecureHTTP, Logger: logger("text", c.LogLevel),
	}
	if c.EnrolTokenFile != "" {
		secret, err := os.ReadFile(c.EnrolTokenFile)
		if err != nil {
			return o, problem.Wrap(err, problem.Usage, "the enrolment secret cannot be read", "give --enrol-token-file a readable file")
		}
		o.EnrolSecret = wire.Secret(strings.TrimSpace(string(secret)))
	}
	if c.CA == "" {
		return o, nil
	}
	pem, err := os.ReadFile(c.CA)
	if err != nil {
		return o, problem.Wrap(err, problem.Usage, "the certificates cannot be read", "give --ca a readable file")
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool()
	}
	if !roots.AppendCertsFromPEM(pem) {
		return o, problem.New(problem.Usage, "there is no certificate in "+c.CA, "give --ca a file in PEM form")
	}
	o.TLS = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}
	return o, nil
}
