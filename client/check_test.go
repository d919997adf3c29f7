package main

import (
	"context"
	"net/netip"
	"testing"

	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/internal/wire"
)

// Of several tunnels the one is asked to whose network a target belongs; where it belongs to none, all are.
func TestWhichGatewayIsAsked(t *testing.T) {
	says := func(name string, verdict wire.Verdict, names []string, routes ...string) tunnel {
		claim := control.Claim{Name: name, Names: names}
		for _, r := range routes {
			claim.Routes = append(claim.Routes, netip.MustParsePrefix(r))
		}
		return tunnel{name, claim, func(_ context.Context, target string) (wire.ReachResult, error) {
			return wire.ReachResult{Target: target, Verdict: verdict, Reason: name + " says so"}, nil
		}}
	}
	corp := says("corp", wire.FlowDenied, []string{"*.corp"}, "10.0.0.0/8")
	lab := says("lab", wire.Reachable, []string{"lab.corp"}, "10.20.0.0/16")
	dark := says("dark", wire.FlowDenied, nil, "192.0.2.0/24")
	for _, c := range []struct {
		tunnels []tunnel
		target  string
		verdict wire.Verdict
		reason  string
	}{
		{[]tunnel{corp}, "203.0.113.1:80", wire.FlowDenied, "corp says so"},
		{[]tunnel{corp, lab}, "10.20.0.5:80", wire.Reachable, "lab says so"}, // the narrower route wins
		{[]tunnel{lab, corp}, "10.20.0.5:80", wire.Reachable, "lab says so"},
		{[]tunnel{lab, corp}, "10.21.0.5:80", wire.FlowDenied, "corp says so"},
		{[]tunnel{corp, lab}, "LAB.corp:80", wire.Reachable, "lab says so"},
		{[]tunnel{lab, corp}, "db.corp:80", wire.FlowDenied, "corp says so"},
		{[]tunnel{corp, dark}, "203.0.113.1:80", wire.FlowDenied, "denied by tunnel corp: corp says so; denied by tunnel dark: dark says so"},
		{[]tunnel{corp, lab}, "a-name-of-this-host:80", wire.Reachable, "lab says so"},
	} {
		got, err := ask(t.Context(), c.tunnels, c.target)
		if err != nil || got.Verdict != c.verdict || got.Reason != c.reason || got.Target != c.target {
			t.Errorf("%s: %+v, %v", c.target, got, err)
		}
	}
}
