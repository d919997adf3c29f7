//go:build linux

package e2e

import (
	"encoding/json"
	"testing"

	"github.com/culvertnet/culvert/internal/stage"
)

// Two jobs at once on one machine, whose tunnels lead to the same places: each comes up, speaks with its gateway through its own tunnel, and
// the end of one is not the end of the other.
func TestTwoTunnelsOnOneHost(t *testing.T) {
	s := setup(t, stage.Options{})
	before := snapshot(t, s.Runner)
	job := newJob(t, s, stage.JobOptions{})
	sent := func(name string) uint64 {
		var status struct {
			TX uint64 `json:"tx_bytes"`
		}
		must(t, json.Unmarshal([]byte(culvert(t, job, 0, "status", "--name", name, "--json").Stdout), &status))
		return status.TX
	}
	for _, name := range []string{"first", "second"} {
		culvert(t, job, 0, "up", "--mode", "tun", "--name", name, "--wait-for", s.Target(stage.PortHTTP))
	}
	first, second := sent("first"), sent("second")
	for range 5 {
		culvert(t, job, 0, "check", "--name", "second", s.Target(stage.PortHTTP))
	}
	if first, second = sent("first")-first, sent("second")-second; second <= first {
		t.Errorf("what the second tunnel asks its gateway: %d bytes went through it, %d through the first", second, first)
	}
	serves := func() {
		t.Helper()
		if got, err := get(t, s, "http://"+s.Target(stage.PortHTTP)+"/"); err != nil || got != stage.Greeting {
			t.Errorf("the service answers %q, %v", got, err)
		}
	}
	serves()
	culvert(t, job, 0, "down", "--name", "first")
	serves()
	culvert(t, job, 0, "check", "--name", "second", s.Target(stage.PortHTTP))
	culvert(t, job, 0, "down", "--name", "second")
	unchanged(t, s.Runner, before)
}
