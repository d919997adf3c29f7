//go:build linux

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// neighbourEnv is a folder with the programs of the last release. `make neighbours` builds them from its tag and sets it.
const neighbourEnv = "CULVERT_E2E_NEIGHBOUR"

var threePrograms = []string{"culvert-coordinator", "culvert-gateway", "culvert"}

// neighbour is the path of a program of the last release.
func neighbour(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv(neighbourEnv)
	if dir == "" {
		t.Skip("make neighbours runs this, once there is a release")
	}
	return filepath.Join(dir, name)
}

// TestNeighbours: the three programs work together in every mixture of the last release's and this tree's, on a direct path and through a
// relay that runs alone, over its WebSocket. `make neighbours` runs it.
func TestNeighbours(t *testing.T) {
	for mix := 1; mix < 1<<len(threePrograms)-1; mix++ {
		last := map[string]string{}
		var name []string
		for i, program := range threePrograms {
			age := "this"
			if mix>>i&1 == 1 {
				age, last[program] = "last", neighbour(t, program)
			}
			name = append(name, age+" "+program)
		}
		t.Run(strings.Join(name, ", "), func(t *testing.T) {
			t.Run("direct", func(t *testing.T) { meet(t, stage.Options{Programs: last, Coordinator: "lease: 30s"}, true) })
			t.Run("websocket", func(t *testing.T) {
				meet(t, stage.Options{Programs: last, Runner: lab.NATOptions{Kind: lab.NoUDP}, Relays: []stage.RelayOptions{{Name: "far"}}}, false)
			})
		})
	}
}

// meet is a whole session: join, traffic of both kinds, what is denied, a renewal, the end.
func meet(t *testing.T, opts stage.Options, renews bool) {
	t.Helper()
	s := setup(t, opts)
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun", "--wait-for", s.Target(stage.PortHTTP))
	fetch(t, job, "http://"+s.Target(stage.PortHTTP)+"/download")
	echo(t, s)
	culvert(t, job, 3, "check", s.Target(stage.PortOther))
	if renews {
		expires := lease(t, job)
		eventually(t, 40*time.Second, "a renewal", func() error {
			if now := lease(t, job); !now.After(expires) {
				return fmt.Errorf("the lease still ends at %v", now)
			}
			return nil
		})
	}
	culvert(t, job, 0, "down")
	if got, err := get(t, s, "http://"+s.Target(stage.PortHTTP)+"/"); err == nil {
		t.Errorf("the service answers %q after the end", got)
	}
}

// lease is until when the session of a job lasts without another renewal.
func lease(t *testing.T, job *stage.Job) time.Time {
	t.Helper()
	var status struct{ Expires time.Time }
	decode(t, culvert(t, job, 0, "status", "--json").Stdout, &status)
	return status.Expires
}

// TestUpgrade: everything of the last release, with a job that has a connection open, becomes this tree's in the order that the operations
// page gives. The connection outlives the coordinator's upgrade, the job the gateway's, and the audit log is one chain throughout.
func TestUpgrade(t *testing.T) {
	last, this := map[string]string{}, os.Getenv(binEnv)
	for _, program := range threePrograms {
		last[program] = neighbour(t, program)
	}
	s := setup(t, stage.Options{Programs: last, Coordinator: "lease: 30s"})
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun", "--wait-for", s.Target(stage.PortHTTP))
	more := drip(t, s)

	code, err := s.StopCoordinator(timeout(t, time.Minute))
	if err != nil || code != 0 {
		t.Fatalf("the last release's coordinator ends with %d, %v", code, err)
	}
	must(t, s.Use("culvert-coordinator", filepath.Join(this, "culvert-coordinator")))
	must(t, s.StartCoordinator(timeout(t, time.Minute)))
	more()
	eventually(t, 30*time.Second, "a join after the coordinator's upgrade", func() error { return join(t, s) })
	expires := lease(t, job)
	eventually(t, 40*time.Second, "a renewal", func() error {
		if !lease(t, job).After(expires) {
			return fmt.Errorf("the lease still ends at %v", expires)
		}
		return nil
	})
	more()

	if code, err := s.StopGateway(timeout(t, time.Minute)); err != nil || code != 0 {
		t.Fatalf("the last release's gateway ends with %d, %v", code, err)
	}
	must(t, s.Use("culvert-gateway", filepath.Join(this, "culvert-gateway")))
	must(t, s.StartGateway(timeout(t, time.Minute)))
	service := "http://" + s.Target(stage.PortHTTP) + "/"
	eventually(t, time.Minute, "the running job at the new gateway", func() error { _, err := get(t, s, service); return err })
	culvert(t, job, 0, "down")

	must(t, s.Use("culvert", filepath.Join(this, "culvert")))
	job = newJob(t, s, stage.JobOptions{})
	up(t, job, "tun", "--wait-for", s.Target(stage.PortHTTP))
	culvert(t, job, 0, "down")
	code, err = s.Cloud.Run(timeout(t, time.Minute), lab.Program{
		Path: s.Binary("culvert-coordinator"), Args: []string{"audit", "verify", "--config", s.ConfigFile()}, Env: os.Environ(),
	})
	if err != nil || code != 0 {
		t.Errorf("the log of both versions: audit verify ends with %d, %v", code, err)
	}
}
