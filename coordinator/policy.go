package main

import (
	"fmt"
	"os"
	"time"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/problem"
)

type checkCmd struct {
	File          string `arg:"" help:"The configuration, culvert.yaml or a relay's relay.yaml."`
	GatewayPolicy bool   `help:"The file is a gateway's own policy: rules, targets and groups alone."`
	Strict        bool   `help:"Fail on warnings as well."`
	Files         bool   `default:"true" negatable:"" help:"Look for the files that it names, such as certificates and keys, and warn where this user cannot read one; --no-files where it is checked elsewhere."`
	JSON          bool   `name:"json" help:"Print the report as JSON."`
}

func (c *checkCmd) Run() error {
	var r config.Report
	if c.GatewayPolicy {
		r = config.CheckRules(c.File)
	} else {
		r = config.CheckReport(c.File, c.Files)
	}
	if c.JSON {
		if err := config.WriteJSON(os.Stdout, r); err != nil {
			return err
		}
	} else {
		r.WriteText(os.Stdout)
	}
	return r.Err(c.Strict)
}

type explainCmd struct {
	Config  string `required:"" placeholder:"FILE" help:"The configuration, culvert.yaml."`
	Claims  string `required:"" placeholder:"FILE" help:"The job's claims: a JSON object, as in a token's payload."`
	Network string `help:"The network that the job wants; default all."`
	All     bool   `help:"Show every rule, not only those that match or came closest."`
	JSON    bool   `name:"json" help:"Print the explanation as JSON."`
}

func (c *explainCmd) Run() error {
	cfg, err := config.Load(c.Config)
	if err != nil {
		return err
	}
	job, err := config.LoadClaims(c.Claims)
	if err != nil {
		return err
	}
	all, err := cfg.Explain(time.Now(), job, c.Network)
	if err != nil {
		return err
	}
	if c.JSON {
		if err := config.WriteJSON(os.Stdout, all); err != nil {
			return err
		}
		return config.Verdict(all)
	}
	for _, e := range all {
		e.WriteText(os.Stdout, c.All)
	}
	return config.Verdict(all)
}

type policyCmd struct {
	Test policyTestCmd `cmd:"" help:"Run a file of cases: claims, and what they should get."`
}

type policyTestCmd struct {
	Config string `required:"" placeholder:"FILE" help:"The configuration, culvert.yaml."`
	Cases  string `arg:"" help:"The cases: a YAML file."`
	JSON   bool   `name:"json" help:"Print the results as JSON."`
}

func (c *policyTestCmd) Run() error {
	cfg, err := config.Load(c.Config)
	if err != nil {
		return err
	}
	r, err := cfg.RunCases(c.Cases, time.Now())
	if err != nil {
		return err
	}
	if c.JSON {
		if err := config.WriteJSON(os.Stdout, r); err != nil {
			return err
		}
	} else {
		r.WriteText(os.Stdout)
	}
	return r.Err()
}

type schemaCmd struct {
	File string `arg:"" enum:"config,policy,cases,relay" default:"config" help:"Of which file: config (culvert.yaml), policy (a gateway's own, or an included one), cases, relay (relay.yaml)."`
}

func (c *schemaCmd) Run() error {
	text, ok := config.Schema(c.File)
	if !ok {
		return problem.New(problem.Usage, fmt.Sprintf("there is no schema of %q", c.File), "name config, policy, cases or relay")
	}
	_, err := os.Stdout.Write(text)
	return err
}
