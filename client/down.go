package main

import (
	"context"
	"fmt"
	"time"

	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/client/uapi"
	"github.com/culvertnet/culvert/internal/problem"
)

// downCommand ends the tunnel.
type downCommand struct{}

func (*downCommand) run(ctx context.Context, env environment, flags common) error {
	var failed []error
	for _, name := range flags.names() {
		if err := endTunnel(ctx, name); err != nil {
			failed = append(failed, err)
			continue
		}
		if flags.JSON {
			print(env.stdout, map[string]string{"state": string(control.Ended)})
			continue
		}
		fmt.Fprintln(env.stdout, "down")
	}
	if len(failed) > 0 {
		return failed[0]
	}
	return nil
}

// endTunnel ends the tunnel of one name.
func endTunnel(ctx context.Context, name string) error {
	client, err := control.NewClient(name)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := client.Down(ctx); err != nil {
		if problem.CodeOf(err) == problem.NotUp {
			uapi.Sweep(uapi.Dir) // where it was killed
			next := "there is nothing to end, unless another user started it"
			if others := control.Tunnels(ctx, name); len(others) > 0 {
				next = "others run; name the one that you mean: --name " + others[0].Name
			}
			return problem.Wrap(err, problem.NotUp, problem.From(err).Message, next)
		}
		return err
	}
	return nil
}
