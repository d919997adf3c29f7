//go:build linux

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/lab/podman"
	"github.com/culvertnet/culvert/internal/stage"
)

// dockerEnv says where Debian's packages of Docker are unpacked; the Makefile fetches them.
const dockerEnv = "CULVERT_TEST_DOCKER"

// dockerMachine is a runner on which Docker's daemon runs, and a DNS server of its own.
type dockerMachine struct {
	*stage.Stage
	job    *stage.Job
	names  *ownNames
	mounts string // pid of a process that has the runner's mounts
	path   string // where Docker's programs are, and all others
	dir    string
}

func newDocker(t *testing.T) *dockerMachine {
	t.Helper()
	if os.Getenv(actAll) == "" {
		t.Skip("make act runs this")
	}
	unpacked := filepath.Dir(filepath.Dir(tool(t, dockerEnv, "docker")))
	if err := podman.Missing(); err != nil {
		lab.Skip(t, "no containers: %v", err)
	}
	dir, err := scratch("culvert-docker-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &dockerMachine{names: &ownNames{}, dir: dir, path: unpacked + "/bin:" + unpacked + "/sbin:" + os.Getenv("PATH")}
	d.Stage = setup(t, stage.Options{Names: []string{firstName}, Rules: func(s *stage.Stage) string {
		return fmt.Sprintf("- {name: names, network: corp, match: {repository_owner_id: %q}, allow: [\"tcp %s:%d\"]}\n", stage.OwnerID, firstName, stage.PortHTTP)
	}})
	d.job = newJob(t, d.Stage, stage.JobOptions{})
	d.mounts = d.names.serve(t, d.Stage, d.job, "mount -t tmpfs run /run && mkdir /run/netns")
	d.start(t)
	root, err := podman.BusyboxRoot(timeout(t, time.Minute))
	must(t, err)
	load := d.command("import", "-", containerImage)
	load.Stdin = root
	if code, err := d.Runner.Run(timeout(t, time.Minute), load); err != nil || code != 0 {
		t.Fatalf("import an image: exit %d, %v", code, err)
	}
	return d
}

// start starts the daemon and ends it with the test, and with it its containers.
func (d *dockerMachine) start(t *testing.T) {
	t.Helper()
	group := fmt.Sprintf("/culvert-%d", os.Getpid())
	var builders []string
	if found, _ := filepath.Glob("/sys/fs/cgroup/*/docker"); len(found) == 0 && !exists("/sys/fs/cgroup/docker") {
		builders = append(builders, "/docker")
	}
	log, err := os.Create(filepath.Join(d.dir, "log"))
	must(t, err)
	defer log.Close()
	p := d.in(lab.Program{Path: "/usr/bin/env", Args: []string{"dockerd", "--data-root", d.dir + "/data", "--exec-root", d.dir + "/exec", "--pidfile", d.dir + "/pid",
		"--host", d.socket(), "--storage-driver", "vfs", "--cgroup-parent", group}, Env: []string{"PATH=" + d.path, "HOME=" + d.dir}, Stdout: log, Stderr: log})
	daemon, err := d.Runner.Start(p)
	must(t, err)
	t.Cleanup(func() {
		_ = daemon.Signal(syscall.SIGTERM)
		_, _ = daemon.Wait(timeout(t, time.Minute))
		emptied(t, group)
		for _, folder := range builders { // BuildKit's own, where nobody else has one
			emptied(t, folder)
		}
		if t.Failed() {
			said, _ := os.ReadFile(log.Name())
			t.Logf("Docker's daemon:\n%s", said)
		}
	})
	eventually(t, time.Minute, "Docker's daemon", func() error {
		select {
		case <-daemon.Done():
			said, _ := os.ReadFile(log.Name())
			t.Fatalf("Docker's daemon does not run here:\n%s", said)
		default:
		}
		code, err := d.Runner.Run(timeout(t, time.Minute), d.command("version"))
		if err == nil && code != 0 {
			err = fmt.Errorf("exit %d", code)
		}
		return err
	})
}

// emptied removes a group of processes in every hierarchy (cgroups(7)), and those below it; nothing is in them any more.
func emptied(t *testing.T, group string) {
	t.Helper()
	folders, _ := filepath.Glob("/sys/fs/cgroup/*" + group)
	for _, folder := range append(folders, "/sys/fs/cgroup"+group) {
		var all []string
		_ = filepath.WalkDir(folder, func(path string, entry os.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				all = append(all, path)
			}
			return nil
		})
		for _, path := range slices.Backward(all) {
			must(t, os.Remove(path))
		}
	}
}

func (d *dockerMachine) socket() string { return "unix://" + d.dir + "/socket" }

// in gives what runs a program with the runner's mounts.
func (d *dockerMachine) in(p lab.Program) lab.Program {
	p.Path, p.Args = nsenter, append([]string{"--mount", "--target", d.mounts, "--", p.Path}, p.Args...)
	return p
}

// command gives what runs Docker's client, as a step of a job does.
func (d *dockerMachine) command(args ...string) lab.Program {
	return d.in(lab.Program{Path: "/usr/bin/env", Args: append([]string{"docker"}, args...),
		Env: []string{"PATH=" + d.path, "HOME=" + d.dir, "DOCKER_HOST=" + d.socket(), "DOCKER_BUILDKIT=0"}})
}

// docker runs Docker's client, which must succeed unless fails, and gives what it printed.
func (d *dockerMachine) docker(t *testing.T, fails bool, p lab.Program) string {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	must(t, err)
	defer out.Close()
	p.Stdout, p.Stderr = out, out
	code, err := d.Runner.Run(timeout(t, 2*time.Minute), p)
	must(t, err)
	said, err := os.ReadFile(out.Name())
	must(t, err)
	if (code != 0) != fails {
		t.Fatalf("docker %v: exit %d\n%s", p.Args, code, said)
	}
	return string(said)
}

// TestDockerOfAJob: with Docker itself, containers that a job starts reach a granted name: on Docker's own network, on one that the job has
// made, as for services, where Docker's own server answers for the names of containers, on the host's, and in both of its builders. All
// other names are asked for where they were before, and the end of the tunnel leaves nothing.
func TestDockerOfAJob(t *testing.T) {
	d := newDocker(t)
	run := func(network string, args ...string) lab.Program {
		return d.command(append([]string{"run", "--rm", "--network", network, containerImage}, args...)...)
	}
	d.docker(t, false, d.command("network", "create", "work"))
	d.docker(t, false, d.command("run", "--detach", "--name", "peer", "--network", "work", containerImage, "sleep", "300"))
	t.Cleanup(func() { d.docker(t, false, d.command("rm", "--force", "peer")) })
	networks := []string{"bridge", "work", "host"}
	for _, network := range networks {
		d.docker(t, true, run(network, "nslookup", "-type=a", firstName))
	}
	before := snapshot(t, d.Runner)
	d.names.mu.Lock()
	d.names.asked = nil
	d.names.mu.Unlock()
	output(t, d.job, nsenter, "--mount", "--target", d.mounts, "--", d.Binary("culvert"), "up", "--mode", "tun", "--wait-for", firstName+":80")
	for _, network := range networks {
		if got := d.docker(t, false, run(network, "sh", "-c", fetchByName, "sh", firstName)); !strings.Contains(got, stage.Greeting) {
			t.Errorf("network %s: the service answers %q", network, got)
		}
		if got := d.docker(t, false, run(network, "nslookup", "-type=a", publicName)); !strings.Contains(got, publicAddr) {
			t.Errorf("network %s: %s resolves to %s", network, publicName, got)
		}
	}
	d.docker(t, false, run("work", "nslookup", "-type=a", "peer"))
	for _, builder := range []string{"0", "1"} {
		d.build(t, builder)
	}
	if d.names.saw(firstName) || !d.names.saw(publicName) {
		t.Errorf("the runner's own DNS server was asked for %q", d.names.asked)
	}
	culvert(t, d.job, 0, "down")
	for _, network := range networks {
		d.docker(t, true, run(network, "nslookup", "-type=a", firstName))
	}
	unchanged(t, d.Runner, before)
}

// build builds an image one of whose steps fetches a page by name. builder is Docker's first one, "0", or BuildKit, "1".
func (d *dockerMachine) build(t *testing.T, builder string) {
	t.Helper()
	folder := filepath.Join(d.dir, "build-"+builder)
	must(t, os.Mkdir(folder, 0o755))
	text := fmt.Sprintf("FROM %s\nRUN set -- %s; %s > /page\nRUN grep -F '%s' /page\n", containerImage, firstName, fetchByName, strings.TrimSpace(stage.Greeting))
	must(t, os.WriteFile(filepath.Join(folder, "Dockerfile"), []byte(text), 0o644))
	p := d.command("build", "--no-cache", "--tag", "built:"+builder, folder)
	p.Env = append(p.Env, "DOCKER_BUILDKIT="+builder)
	d.docker(t, false, p)
}
