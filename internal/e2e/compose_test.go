//go:build linux

package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab/podman"
	"github.com/culvertnet/culvert/internal/stage"
)

// composed is one machine of the lab on which compose.yaml is up.
type composed struct {
	engine *podman.Engine
	stage  *stage.Stage
	files  []string
	env    []string
}

// override is what a test has to add: its authority's certificate, which no image holds.
const override = `services:
  coordinator: {environment: {SSL_CERT_FILE: /ca.pem}, volumes: ["CA:/ca.pem:ro"]}
  gateway: {environment: {SSL_CERT_FILE: /ca.pem}, volumes: ["CA:/ca.pem:ro"]}
`

// TestCompose brings compose.yaml up as it stands on a machine of the internet, with its own bridges, ports and names, and a job on a
// runner elsewhere reaches the private service by name. `make images` runs it.
func TestCompose(t *testing.T) {
	if os.Getenv(gatewayEnv) != "image" {
		t.Skip("make images runs this")
	}
	program(t, "podman-compose")
	c := newComposed(t)
	c.run(t, "up", "--detach", "--no-build")
	for _, name := range []string{"coordinator", "gateway"} {
		eventually(t, time.Minute, name, func() error { return c.engine.HealthOf(timeout(t, 30*time.Second), "culverttest_"+name+"_1") })
	}
	job := newJob(t, c.stage, stage.JobOptions{})
	forwarded := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 18081)
	var result stage.Result
	eventually(t, time.Minute, "a session", func() (err error) {
		result, err = job.Culvert(timeout(t, time.Minute), "up", "--mode", "proxy", "--wait-for", "shop.internal:80",
			"--forward", fmt.Sprintf("%d:shop.internal:80", forwarded.Port()))
		if err == nil && result.Code != 0 {
			err = fmt.Errorf("culvert up: %s", result)
		}
		return err
	})
	if got, err := get(t, c.stage, "http://"+forwarded.String()+"/"); err != nil || got != stage.Greeting {
		t.Errorf("the private service answers %q, %v", got, err)
	}
	culvert(t, job, 3, "check", "shop.internal:81")
	culvert(t, job, 0, "down")
}

func newComposed(t *testing.T) *composed {
	t.Helper()
	e := engine(t)
	ctx := timeout(t, time.Minute)
	must(t, e.Busybox(ctx, "docker.io/library/busybox:1.37"))
	must(t, e.Tag(ctx, stage.GatewayImage, "culvert-gateway"))
	must(t, e.Tag(ctx, stage.CoordinatorImage, "culvert-coordinator"))
	s := scenery(t, stage.Options{})
	dir, err := scratch("culvert-compose-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	for from, to := range s.Certificate() {
		copyFile(t, from, filepath.Join(dir, to))
	}
	file, err := filepath.Abs("../../compose.yaml")
	must(t, err)
	more := filepath.Join(dir, "override.yaml")
	must(t, os.WriteFile(more, []byte(strings.ReplaceAll(override, "CA:", s.CAFile()+":")), 0o644))
	return &composed{engine: e, stage: s, files: []string{file, more}, env: []string{
		"CULVERT_URL=" + s.URL, "CULVERT_OWNER=" + stage.OwnerID, "CULVERT_ISSUER=" + s.Issuer.URL(), "CULVERT_TLS=" + dir,
	}}
}

// run runs podman-compose on the machine; what it brought up goes with the test.
func (c *composed) run(t *testing.T, args ...string) {
	t.Helper()
	if args[0] == "up" {
		t.Cleanup(func() {
			if t.Failed() {
				for _, name := range []string{"prepare", "coordinator", "gateway"} {
					t.Log(c.engine.Logs(timeout(t, 30*time.Second), "culverttest_"+name+"_1"))
				}
			}
			c.run(t, "down", "--volumes")
		})
	}
	p, err := c.engine.Compose("culverttest", c.files, c.env, args...)
	must(t, err)
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	must(t, err)
	defer log.Close()
	p.Stdout, p.Stderr = log, log
	if code, err := c.stage.Cloud.Run(timeout(t, 2*time.Minute), p); code != 0 || err != nil {
		said, _ := os.ReadFile(log.Name())
		t.Fatalf("podman-compose %v: exit %d, %v\n%s", args, code, err, said)
	}
}
