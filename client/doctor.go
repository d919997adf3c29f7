package main

import (
	"context"
	"net/url"
	"time"

	"github.com/culvertnet/culvert/internal/doctor"
	"github.com/culvertnet/culvert/internal/netcheck"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/requirements"
)

// doctorCommand tests what a runner needs of its network.
type doctorCommand struct {
	Coordinator  string        `env:"CULVERT_COORDINATOR" placeholder:"URL" help:"The coordinator's URL. Without it there is little to test."`
	Release      bool          `env:"CULVERT_RELEASE" default:"true" negatable:"" help:"Test where the action gets the client from."`
	Timeout      time.Duration `env:"CULVERT_TIMEOUT" default:"5s" help:"How long one test may take."`
	InsecureHTTP bool          `name:"insecure-http" env:"CULVERT_INSECURE_HTTP" help:"Allow plain http:// to a coordinator that is not on loopback."`
}

func (c *doctorCommand) run(ctx context.Context, env environment, flags common) error {
	facts := requirements.Facts{Releases: c.Release}
	if c.Coordinator != "" {
		base, err := netcheck.ParseURL(c.Coordinator, c.InsecureHTTP)
		if err != nil {
			return err
		}
		facts.Coordinator = base
	}
	if u, err := url.Parse(env.getenv("ACTIONS_ID_TOKEN_REQUEST_URL")); err == nil && u.Hostname() != "" {
		facts.TokenURL = u
	}
	report := doctor.Run(ctx, doctor.Options{
		Party: requirements.Runner, Facts: facts, InsecureHTTP: c.InsecureHTTP, Timeout: c.Timeout,
	})
	if ctx.Err() != nil {
		return problem.Wrap(context.Cause(ctx), problem.Cancelled, "the tests were interrupted", "")
	}
	if flags.JSON {
		print(env.stdout, report)
	} else if err := report.WriteText(env.stdout); err != nil {
		return err
	}
	if !report.OK {
		return exit(problem.ExitFailed)
	}
	return nil
}
