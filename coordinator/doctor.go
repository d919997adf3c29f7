package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/doctor"
	"github.com/culvertnet/culvert/internal/netcheck"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/requirements"
)

// doctorCmd tests what a coordinator needs of its network. What comes in it can test only by asking itself, at the address
// that runners use.
type doctorCmd struct {
	Config  string        `required:"" placeholder:"FILE" help:"The configuration, culvert.yaml."`
	Timeout time.Duration `default:"5s" help:"How long one test may take."`
	JSON    bool          `name:"json" help:"Print JSON."`
}

// Run prints the table and fails unless everything that is required works.
func (c *doctorCmd) Run() error {
	cfg, err := config.Load(c.Config)
	if err != nil {
		return err
	}
	base, err := netcheck.ParseURL(cfg.URL, cfg.InsecureHTTP)
	if err != nil {
		return err
	}
	facts := requirements.Facts{Coordinator: base, NATS: cfg.State.NATS}
	if cfg.ACME != nil {
		facts.ACME = cfg.ACME.Directory
	}
	for _, issuers := range [][]claims.Issuer{cfg.Issuers, cfg.GatewayIssuers()} {
		for _, i := range issuers {
			if i.JWKSFile == "" {
				facts.Issuers = append(facts.Issuers, i.URL)
			}
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	report := doctor.Run(ctx, doctor.Options{Party: requirements.Coordinator, Facts: facts, InsecureHTTP: cfg.InsecureHTTP, Timeout: c.Timeout})
	if c.JSON {
		err = config.WriteJSON(os.Stdout, report)
	} else {
		err = report.WriteText(os.Stdout)
	}
	if err == nil && !report.OK {
		err = problem.New(problem.Unreachable, "not everything that a coordinator needs works from here",
			"start it if it does not run, and have the firewall let through what the table marks as failed")
	}
	return err
}
