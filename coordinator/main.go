// Command culvert-coordinator proves who a CI job is, decides what it may reach and brings it together with a gateway.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/server"
	"github.com/culvertnet/culvert/internal/problem"
)

// version is set by the linker.
var version = "dev"

type cli struct {
	Serve   serveCmd   `cmd:"" help:"Run a coordinator until SIGTERM or SIGINT; SIGHUP reads the configuration again."`
	Relay   relayCmd   `cmd:"" help:"Run a relay by itself until SIGTERM or SIGINT; SIGHUP reads the configuration again."`
	Check   checkCmd   `cmd:"" help:"Check a configuration file: every error and warning, with line, column and what to do."`
	Explain explainCmd `cmd:"" help:"Show how a configuration judges a job."`
	Audit   auditCmd   `cmd:"" help:"Read and verify the audit log."`
	Suggest suggestCmd `cmd:"" help:"Write the smallest allow list that covers what jobs did."`
	Policy  policyCmd  `cmd:"" help:"Hold the rules against cases."`
	Load    loadCmd    `cmd:"" help:"Play gateways and jobs against a coordinator, to size its machine."`
	Schema  schemaCmd  `cmd:"" help:"Print the JSON Schema of a file, for editors."`
	Doctor  doctorCmd  `cmd:"" help:"Test every name and port that a coordinator needs, and print the table for a firewall team."`
	Health  healthCmd  `cmd:"" help:"Ask the coordinator on this machine how it is."`
	Version versionCmd `cmd:"" help:"Print the version."`
}

type serveCmd struct {
	Config    string        `required:"" placeholder:"FILE" help:"The configuration, culvert.yaml."`
	Drain     time.Duration `default:"0s" help:"How long to go on serving joins when stopping, with /readyz failing, until a load balancer has noticed."`
	Grace     time.Duration `default:"30s" help:"How long joins in progress may take after that."`
	LogFormat string        `enum:"json,text" default:"json" help:"Logs on stderr: json or text."`
	LogLevel  slog.Level    `default:"info" help:"debug, info, warn or error."`
}

func (c *serveCmd) Run() error {
	cfg, err := config.Load(c.Config)
	if err != nil {
		return err
	}
	var tasks sync.WaitGroup
	defer tasks.Wait()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	tasks.Go(func() { keepLean(ctx) })
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	s, err := server.New(server.Options{
		Config: cfg, Reload: server.DefaultReload, Logger: logger(c.LogFormat, c.LogLevel), Stdout: os.Stdout, Version: version, Drain: c.Drain,
	})
	if err != nil {
		return err
	}
	return s.Run(ctx, c.Grace)
}

func logger(format string, level slog.Level) *slog.Logger {
	opts := &slog.HandlerOptions{Level: level, ReplaceAttr: problem.LogAttr}
	if format == "text" {
		return slog.New(slog.NewTextHandler(os.Stderr, opts))
	}
	return slog.New(slog.NewJSONHandler(os.Stderr, opts))
}

type versionCmd struct{}

func (versionCmd) Run() error {
	_, err := fmt.Printf("culvert-coordinator %s %s/%s %s\n", version, runtime.GOOS, runtime.GOARCH, runtime.Version())
	return err
}

func main() { os.Exit(run()) }
