//go:build linux

package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab/podman"
	"github.com/culvertnet/culvert/internal/stage"
)

// TestProxyInAContainer: the client and its authority's certificate are all that is in the container. It has no capability, an ordinary
// user and a root that nothing can write to, and the service is reached all the same. `make images` runs it, with the gateway in a
// container as well.
func TestProxyInAContainer(t *testing.T) {
	if os.Getenv(gatewayEnv) != "image" {
		t.Skip("make images runs this")
	}
	e := engine(t)
	s := setup(t, stage.Options{})
	root, err := scratch("culvert-root-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(root) })
	copyFile(t, s.Binary("culvert"), filepath.Join(root, "culvert"))
	must(t, os.Chmod(filepath.Join(root, "culvert"), 0o755))
	copyFile(t, s.CAFile(), filepath.Join(root, "ca.pem"))
	job := newJob(t, s, stage.JobOptions{Unprivileged: true})
	var env []string
	for _, entry := range append(job.Environ(), "SSL_CERT_FILE=/ca.pem") {
		if name, _, _ := strings.Cut(entry, "="); strings.HasPrefix(name, "ACTIONS_") || strings.HasPrefix(name, "CULVERT_") || entry == "SSL_CERT_FILE=/ca.pem" {
			env = append(env, entry)
		}
	}
	forwarded := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 18080)
	contained, err := e.Program(podman.Container{
		Host: s.Runner, Image: root, Rootfs: true, Env: env, Name: "client", Dir: t.TempDir(),
		Args: []string{"/culvert", "up", "--foreground", "--mode", "proxy", "--forward", fmt.Sprintf("%d:%s", forwarded.Port(), s.Target(stage.PortHTTP))},
	})
	must(t, err)
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	must(t, err)
	defer log.Close()
	contained.Stdout, contained.Stderr = log, log
	proc, err := s.Runner.Start(contained)
	must(t, err)
	t.Cleanup(func() { // podman itself takes the container away
		_ = proc.Signal(syscall.SIGTERM)
		if code, err := proc.Wait(timeout(t, 30*time.Second)); code != 0 || err != nil {
			said, _ := os.ReadFile(log.Name())
			t.Errorf("the container ends with %d, %v\n%s", code, err, said)
		}
	})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		got, err := get(t, s, "http://"+forwarded.String()+"/")
		if err == nil && got == stage.Greeting {
			return
		}
		if time.Now().After(deadline) {
			said, _ := os.ReadFile(log.Name())
			t.Fatalf("through the container: %q, %v\n%s", got, err, said)
		}
	}
}
