package main

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/culvertnet/culvert/client/agent"
	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// checkCommand asks the gateway about targets.
type checkCommand struct {
	Target []string `arg:"" name:"HOST:PORT" help:"TCP targets to ask about."`
}

// checkResults is what check prints with --json.
type checkResults struct {
	Results []wire.ReachResult `json:"results"`
}

func (c *checkCommand) run(ctx context.Context, env environment, flags common) error {
	for _, target := range c.Target {
		if err := agent.CheckTarget(target); err != nil {
			return err
		}
	}
	var clients []*control.Client
	for _, name := range flags.names() {
		client, err := control.NewClient(name)
		if err != nil {
			return err
		}
		clients = append(clients, client)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	all := checkResults{Results: []wire.ReachResult{}}
	for _, target := range c.Target {
		result, err := granting(ctx, clients, target).Check(ctx, target)
		if err != nil && len(c.Target) > 1 && problem.CodeOf(err) == problem.FlowUnreachable { // its name; the others may have answers
			result, err = wire.ReachResult{Target: target, Verdict: wire.Unreachable, Reason: problem.From(err).Message}, nil
		}
		if err != nil {
			return err
		}
		all.Results = append(all.Results, result)
		if !flags.JSON {
			fmt.Fprintln(env.stdout, resultText(result))
		}
	}
	if flags.JSON {
		print(env.stdout, all)
	}
	if code := worst(all.Results); code != problem.ExitDone {
		return exit(code)
	}
	return nil
}

// granting picks the tunnel to whose network a target belongs, or the first where it belongs to none: that one's gateway says why not.
func granting(ctx context.Context, clients []*control.Client, target string) *control.Client {
	host, _, _ := net.SplitHostPort(target) // checked before
	for _, client := range clients[1:] {
		if claim, err := client.Claim(ctx); err == nil && claim.Covers(host) {
			return client
		}
	}
	return clients[0]
}

// resultText writes one result as people read it.
func resultText(r wire.ReachResult) string {
	text := fmt.Sprintf("%s: %s", r.Target, r.Verdict)
	if r.Rule != "" {
		text += fmt.Sprintf(" (rule %q)", r.Rule)
	}
	if r.Verdict == wire.Reachable {
		return fmt.Sprintf("%s, %s from the gateway", text, time.Duration(r.RTT).Round(100*time.Microsecond))
	}
	if r.Reason != "" {
		text += ": " + r.Reason
	}
	return text
}

// worst gives the exit code: denied outweighs unreachable.
func worst(results []wire.ReachResult) int {
	code := problem.ExitDone
	for _, r := range results {
		switch r.Verdict {
		case wire.Reachable:
		case wire.FlowDenied:
			return problem.FlowDenied.Exit()
		default:
			code = problem.FlowUnreachable.Exit()
		}
	}
	return code
}
