package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/relayd"
)

type relayCmd struct {
	Config    string        `required:"" placeholder:"FILE" help:"The configuration, relay.yaml."`
	Grace     time.Duration `default:"10s" help:"How long requests in progress may take when stopping."`
	LogFormat string        `enum:"json,text" default:"json" help:"Logs on stderr: json or text."`
	LogLevel  slog.Level    `default:"info" help:"debug, info, warn or error."`
}

func (c *relayCmd) Run() error {
	cfg, err := config.LoadStandalone(c.Config)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	s, err := relayd.New(relayd.Options{Config: cfg, Reload: relayd.DefaultReload, Logger: logger(c.LogFormat, c.LogLevel)})
	if err != nil {
		return err
	}
	return s.Run(ctx, c.Grace)
}
