package main

import (
	"context"
	"encoding/json"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/doctor"
	"github.com/culvertnet/culvert/internal/netcheck"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/requirements"
)

// doctorCmd tests what a gateway needs of its network. Its flags are those of run, so that a gateway's environment serves both.
type doctorCmd struct {
	Coordinator  string            `required:"" placeholder:"URL" help:"The coordinator's public URL."`
	Issuer       []string          `placeholder:"URL" help:"Issuer of jobs' tokens; default GitHub's."`
	JWKSFile     map[string]string `name:"jwks-file" placeholder:"URL=FILE" help:"Issuers whose keys are in a file, and need not be reached."`
	Timeout      time.Duration     `default:"5s" help:"How long one test may take."`
	InsecureHTTP bool              `name:"insecure-http" help:"Accept plain HTTP beyond loopback."`
	JSON         bool              `name:"json" help:"Print JSON."`
}

// Run prints the table and fails unless everything that is required works.
func (c *doctorCmd) Run() error {
	base, err := netcheck.ParseURL(c.Coordinator, c.InsecureHTTP)
	if err != nil {
		return err
	}
	facts := requirements.Facts{Coordinator: base}
	if len(c.Issuer) == 0 {
		c.Issuer = []string{claims.GitHub}
	}
	for _, url := range c.Issuer {
		if c.JWKSFile[url] == "" {
			facts.Issuers = append(facts.Issuers, url)
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	report := doctor.Run(ctx, doctor.Options{Party: requirements.Gateway, Facts: facts, InsecureHTTP: c.InsecureHTTP, Timeout: c.Timeout})
	if c.JSON {
		err = json.NewEncoder(os.Stdout).Encode(report)
	} else {
		err = report.WriteText(os.Stdout)
	}
	if err == nil && !report.OK {
		err = problem.New(problem.Unreachable, "not everything that a gateway needs can be reached from here",
			"have the firewall let through what the table marks as failed")
	}
	return err
}
