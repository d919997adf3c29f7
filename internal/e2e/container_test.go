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

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// containersConf makes podman do without systemd and cgroups of its own.
const containersConf = `[containers]
default_ulimits = ["nofile=1024:1024","nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
`

// TestProxyInAContainer: the client and its authority's certificate are all that is in the container. It has no capability, an ordinary
// user and a root that nothing can write to, and the service is reached all the same. `make act` runs it.
func TestProxyInAContainer(t *testing.T) {
	if os.Getenv(actAll) == "" {
		t.Skip("make act runs this")
	}
	podman := program(t, "podman")
	program(t, "runc")
	s := setup(t, stage.Options{})
	root, err := scratch("culvert-root-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(root) })
	copyFile(t, s.Binary("culvert"), filepath.Join(root, "culvert"))
	must(t, os.Chmod(filepath.Join(root, "culvert"), 0o755))
	copyFile(t, s.CAFile(), filepath.Join(root, "ca.pem"))
	conf := filepath.Join(t.TempDir(), "containers.conf")
	must(t, os.WriteFile(conf, []byte(containersConf), 0o644))
	// The container's network is the runner's, held open by a program there.
	holder, err := s.Runner.Start(lab.Program{Path: program(t, "sleep"), Args: []string{"300"}})
	must(t, err)
	job := newJob(t, s, stage.JobOptions{Unprivileged: true})
	dir := t.TempDir()
	args := []string{"--storage-driver", "vfs", "--root", dir + "/root", "--runroot", dir + "/run", "run", "--rm", "--rootfs", "--read-only", "--read-only-tmpfs=false",
		"--user", fmt.Sprint(lab.UnprivilegedID), "--cap-drop=ALL", "--security-opt=no-new-privileges",
		"--network", fmt.Sprintf("ns:/proc/%d/ns/net", holder.Pid()), "--env", "SSL_CERT_FILE=/ca.pem"}
	for _, entry := range job.Environ() {
		if name, _, _ := strings.Cut(entry, "="); strings.HasPrefix(name, "ACTIONS_") || strings.HasPrefix(name, "CULVERT_") {
			args = append(args, "--env", name) // its value comes from podman's own environment
		}
	}
	forwarded := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 18080)
	args = append(args, root, "/culvert", "up", "--foreground", "--mode", "proxy", "--forward", fmt.Sprintf("%d:%s", forwarded.Port(), s.Target(stage.PortHTTP)))
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	must(t, err)
	defer log.Close()
	net := lab.Program{Path: podman, Args: args, Env: append(job.Environ(), "CONTAINERS_CONF="+conf), Stdout: log, Stderr: log}
	proc, err := s.Runner.Start(net)
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
