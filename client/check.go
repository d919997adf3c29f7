package main

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
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
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tunnels, err := asked(ctx, flags.all(ctx))
	if err != nil {
		return err
	}
	all := checkResults{Results: []wire.ReachResult{}}
	for _, target := range c.Target {
		result, err := ask(ctx, tunnels, target)
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

// tunnel is one of those whose gateways are asked.
type tunnel struct {
	name  string
	claim control.Claim // nothing where the tunnel does not say
	check func(ctx context.Context, target string) (wire.ReachResult, error)
}

// asked are the tunnels of these names.
func asked(ctx context.Context, names []string) ([]tunnel, error) {
	tunnels := make([]tunnel, len(names))
	for i, name := range names {
		client, err := control.NewClient(name)
		if err != nil {
			return nil, err
		}
		tunnels[i] = tunnel{name: name, check: client.Check}
		if len(names) > 1 {
			tunnels[i].claim, _ = client.Claim(ctx)
		}
	}
	return tunnels, nil
}

// ask asks the gateway of the network to which a target belongs. Where it belongs to none, all say why not.
func ask(ctx context.Context, tunnels []tunnel, target string) (wire.ReachResult, error) {
	host, _, _ := net.SplitHostPort(target) // checked before
	nearest := slices.MaxFunc(tunnels, func(a, b tunnel) int { return a.claim.Closeness(host) - b.claim.Closeness(host) })
	if nearest.claim.Closeness(host) > 0 || len(tunnels) == 1 {
		return nearest.check(ctx, target)
	}
	var all wire.ReachResult
	var reasons []string
	for i, t := range tunnels {
		r, err := t.check(ctx, target)
		if err != nil {
			return r, err
		}
		if i == 0 || all.Verdict == wire.FlowDenied && r.Verdict != wire.FlowDenied { // two names for one network, say
			all = r
		}
		reasons = append(reasons, fmt.Sprintf("%s by tunnel %s: %s", r.Verdict, t.name, r.Reason))
	}
	if all.Verdict == wire.FlowDenied {
		all.Reason = strings.Join(reasons, "; ")
	}
	return all, nil
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
	if r.Next != "" {
		text += "\n  next: " + r.Next
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
