package main

import (
	"context"
	"time"

	"github.com/culvertnet/culvert/internal/netcheck"
	"github.com/culvertnet/culvert/internal/problem"
)

// netcheckCommand says what the network here is.
type netcheckCommand struct {
	Coordinator  string        `env:"CULVERT_COORDINATOR" placeholder:"URL" help:"The coordinator's URL."`
	Timeout      time.Duration `env:"CULVERT_TIMEOUT" default:"3s" help:"How long to wait for answers over UDP."`
	InsecureHTTP bool          `name:"insecure-http" env:"CULVERT_INSECURE_HTTP" help:"Allow plain http:// to a coordinator that is not on loopback."`
}

func (c *netcheckCommand) run(ctx context.Context, env environment, flags common) error {
	report, err := netcheck.Run(ctx, netcheck.Options{Coordinator: c.Coordinator, InsecureHTTP: c.InsecureHTTP, UDPTimeout: c.Timeout})
	if err != nil {
		return err
	}
	if flags.JSON {
		print(env.stdout, report)
	} else if err := report.WriteText(env.stdout); err != nil {
		return err
	}
	if !report.Tunnel.Possible {
		return exit(problem.ExitFailed)
	}
	return nil
}
