//go:build linux

package podman

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/culvertnet/culvert/internal/lab"
)

// Container describes how an image is run.
type Container struct {
	Host   *lab.Host // whose network it has
	Image  string
	Rootfs bool // Image is a folder with the files instead
	Args   []string
	Env    []string // NAME=value; the values do not appear in any argv
	Mounts []string // folders and files that are in the container where they are outside; those in Writable can be written
	// Writable are mounts that the container writes to.
	Writable []string
	Name     string // of the files that say which container and process it is; of an engine's containers at a time
	Dir      string // where these are
}

// seconds is when a container ends whatever happens: it is no child of this process and would outlive it.
const seconds = "540"

// Program gives what runs a container as an orchestrator that is careful does: with a root that cannot be written, without capability,
// as an ordinary user. The program's process is that of the container.
func (e *Engine) Program(c Container) (lab.Program, error) {
	pid, id := e.pidFile(c), e.idFile(c)
	for _, f := range []string{pid, id} {
		if err := os.Remove(f); err != nil && !os.IsNotExist(err) {
			return lab.Program{}, fmt.Errorf("forget the container before: %w", err)
		}
	}
	args := append(e.global(), "run", "--rm", "--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--security-opt=no-new-privileges",
		"--user", fmt.Sprint(lab.UnprivilegedID), "--network", "ns:"+c.Host.Namespace(), "--ulimit", "host", "--timeout", seconds, "--pidfile", pid, "--cidfile", id)
	env := e.environ()
	for _, entry := range c.Env {
		if name, _, _ := strings.Cut(entry, "="); name != "PATH" && name != "TMPDIR" && name != "HOME" {
			args, env = append(args, "--env", name), append(env, entry)
		}
	}
	for _, path := range c.Mounts {
		args = append(args, "-v", path+":"+path+":ro")
	}
	for _, path := range c.Writable {
		args = append(args, "-v", path+":"+path)
	}
	if c.Rootfs {
		args = append(args, "--rootfs")
	}
	args = append(append(args, c.Image), c.Args...)
	return lab.Program{Path: e.podman, Args: args, Env: env, PidFile: pid}, nil
}

// Command gives what runs podman as a job's step does.
func (e *Engine) Command(args ...string) lab.Program {
	return lab.Program{Path: e.podman, Args: append(e.global(), args...), Env: e.environ()}
}

func (e *Engine) pidFile(c Container) string { return filepath.Join(c.Dir, c.Name+".pid") }
func (e *Engine) idFile(c Container) string  { return filepath.Join(c.Dir, c.Name+".cid") }

// Health runs the image's own health check in a running container.
func (e *Engine) Health(ctx context.Context, c Container) error {
	id, err := os.ReadFile(e.idFile(c))
	if err != nil {
		return fmt.Errorf("find the container: %w", err)
	}
	_, err = e.do(ctx, nil, "healthcheck", "run", strings.TrimSpace(string(id)))
	return err
}

// HealthOf runs the health check of a container by its name.
func (e *Engine) HealthOf(ctx context.Context, name string) error {
	_, err := e.do(ctx, nil, "healthcheck", "run", name)
	return err
}

// Compose gives what runs podman-compose with these files, for a project of that name and with these variables.
func (e *Engine) Compose(project string, files, env []string, args ...string) (lab.Program, error) {
	path, err := exec.LookPath("podman-compose")
	if err != nil {
		return lab.Program{}, err
	}
	all := []string{"--project-name", project}
	for _, f := range files {
		all = append(all, "--file", f)
	}
	env = append(append(e.environ(), "CONTAINERS_STORAGE_CONF="+e.storage()), env...)
	return lab.Program{Path: path, Args: append(all, args...), Env: env}, nil
}

// Logs gives what a container has said.
func (e *Engine) Logs(ctx context.Context, name string) string {
	cmd := exec.CommandContext(ctx, e.podman, append(e.global(), "logs", name)...)
	cmd.Env = e.environ()
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Sprintf("%s\n%v", out, err)
	}
	return string(out)
}
