//go:build linux

// Package podman builds a Dockerfile's images and runs them on hosts of a lab: without a daemon, a registry, systemd or a network.
// It needs root, podman, runc and busybox.
package podman

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// containersConf makes podman do without systemd and cgroups of its own.
const containersConf = `[containers]
default_ulimits = ["nofile=1024:1024","nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
network_config_dir = %q
`

// Engine holds images and containers in a folder of its own, apart from the machine's.
type Engine struct {
	podman string
	dir    string
	driver string
}

// Missing names what the engine needs and this machine lacks, nil where it is all there.
func Missing() error {
	if os.Getuid() != 0 {
		return errors.New("images are built and run as root")
	}
	for _, name := range []string{"podman", "runc", "busybox"} {
		if _, err := exec.LookPath(name); err != nil {
			return fmt.Errorf("%s is missing; as root on Debian, make test installs it", name)
		}
	}
	return nil
}

// New makes an engine in dir, which [Engine.Close] removes.
func New(ctx context.Context, dir string) (*Engine, error) {
	if err := Missing(); err != nil {
		return nil, err
	}
	path, err := exec.LookPath("podman")
	if err != nil {
		return nil, err
	}
	e := &Engine{podman: path, dir: dir}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	conf := fmt.Sprintf(containersConf, filepath.Join(dir, "networks"))
	if err := os.WriteFile(e.conf(), []byte(conf), 0o644); err != nil {
		return nil, err
	}
	// Overlay cannot stand on another overlay, as inside some CI's containers.
	var failures []error
	for _, e.driver = range []string{"overlay", "vfs"} {
		_, err := e.do(ctx, nil, "images")
		if err == nil {
			return e, e.writeStorage()
		}
		failures = append(failures, err)
	}
	return nil, errors.Join(failures...)
}

func (e *Engine) conf() string    { return filepath.Join(e.dir, "containers.conf") }
func (e *Engine) storage() string { return filepath.Join(e.dir, "storage.conf") }
func (e *Engine) root() string    { return filepath.Join(e.dir, e.driver) }
func (e *Engine) runRoot() string { return filepath.Join(e.dir, "run") }

// writeStorage says where everything is to programs that call podman themselves.
func (e *Engine) writeStorage() error {
	text := fmt.Sprintf("[storage]\ndriver = %q\ngraphroot = %q\nrunroot = %q\n", e.driver, e.root(), e.runRoot())
	return os.WriteFile(e.storage(), []byte(text), 0o644)
}

// environ is what podman itself needs.
func (e *Engine) environ() []string {
	return []string{"PATH=" + os.Getenv("PATH"), "HOME=" + e.dir, "TMPDIR=" + e.dir, "CONTAINERS_CONF=" + e.conf(), "DISABLE_HC_SYSTEMD=true"}
}

// global are the arguments that every command begins with.
func (e *Engine) global() []string {
	return []string{"--storage-driver", e.driver, "--root", e.root(), "--runroot", e.runRoot()}
}

// do runs podman and gives what it printed on stdout.
func (e *Engine) do(ctx context.Context, stdin io.Reader, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, e.podman, append(e.global(), args...)...)
	cmd.Env, cmd.Stdin = e.environ(), stdin
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("podman %s: %w\n%s%s", args[0], err, out.Bytes(), said.Bytes())
	}
	return out.Bytes(), nil
}

// Close removes all containers and images. Containers must have ended.
func (e *Engine) Close() error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	// What a killed podman has left mounted, innermost first.
	lines := strings.Split(string(mounts), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if f := strings.Fields(lines[i]); len(f) > 4 && strings.HasPrefix(f[4], e.dir+"/") {
			if err := unmount(f[4]); err != nil {
				return fmt.Errorf("unmount %s: %w", f[4], err)
			}
		}
	}
	return os.RemoveAll(e.dir)
}

// Base makes a stand-in for the image that Go programs are built in, under its name: this machine's Go is mounted into it, see
// [Engine.Build]. arch is what the stand-in calls itself; whatever it says, its programs are this machine's.
func (e *Engine) Base(ctx context.Context, name, arch string) error {
	root, err := base([]string{"sh", "mkdir", "mv"})
	if err != nil {
		return fmt.Errorf("make a stand-in for %s: %w", name, err)
	}
	_, err = e.do(ctx, root, "import", "--arch", arch, "--change", "ENV PATH=/usr/local/go/bin:/bin", "--change", "ENV GOPATH=/go",
		"--change", "ENV GOCACHE=/gocache", "--change", "ENV GOTOOLCHAIN=local", "-", name)
	return err
}

// Busybox makes a stand-in for the image of that name from this machine's busybox, with all that it can do.
func (e *Engine) Busybox(ctx context.Context, name string) error {
	root, err := BusyboxRoot(ctx)
	if err != nil {
		return fmt.Errorf("make a stand-in for %s: %w", name, err)
	}
	_, err = e.do(ctx, root, "import", "--change", "ENV PATH=/bin", "-", name)
	return err
}

// BusyboxRoot is the files of an image of this machine's busybox with all that it can do, as a tar archive.
func BusyboxRoot(ctx context.Context) (io.Reader, error) {
	list, err := exec.CommandContext(ctx, "busybox", "--list").Output()
	if err != nil {
		return nil, err
	}
	return base(strings.Fields(string(list)))
}

// Tag gives an image another name.
func (e *Engine) Tag(ctx context.Context, image, name string) error {
	_, err := e.do(ctx, nil, "tag", image, name)
	return err
}

// base is a root with these of busybox's programs, and this machine's authorities.
func base(programs []string) (io.Reader, error) {
	shell, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	add := func(h tar.Header, content []byte) {
		h.Size = int64(len(content))
		if err == nil {
			err = w.WriteHeader(&h)
		}
		if err == nil {
			_, err = w.Write(content)
		}
	}
	for to, from := range map[string]string{"bin/busybox": shell, "etc/ssl/certs/ca-certificates.crt": "/etc/ssl/certs/ca-certificates.crt"} {
		content, err := os.ReadFile(from)
		if err != nil {
			return nil, err
		}
		add(tar.Header{Name: to, Mode: 0o755}, content)
	}
	for _, name := range programs {
		if name == "busybox" {
			continue
		}
		add(tar.Header{Name: "bin/" + name, Typeflag: tar.TypeSymlink, Linkname: "busybox"}, nil)
	}
	add(tar.Header{Name: "tmp", Typeflag: tar.TypeDir, Mode: 0o1777}, nil)
	if err != nil {
		return nil, err
	}
	return &out, w.Close()
}

// Build builds a target of root's Dockerfile and tags it. Modules come from this machine's cache alone, which has to hold them; what
// has been compiled before is not compiled again.
func (e *Engine) Build(ctx context.Context, root, target, tag string, args ...string) error {
	mounts, err := e.goMounts(ctx)
	if err != nil {
		return err
	}
	all := append([]string{"build", "--pull=never", "--network", "none", "--format", "docker", "--target", target, "--tag", tag,
		"--build-arg", "GOPROXY=off"}, mounts...)
	_, err = e.do(ctx, nil, append(append(all, args...), root)...)
	return err
}

func (e *Engine) goMounts(ctx context.Context) ([]string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT", "GOMODCACHE", "GOCACHE").Output()
	if err != nil {
		return nil, fmt.Errorf("ask go for its folders: %w", err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != 3 {
		return nil, fmt.Errorf("go env says %q", out)
	}
	return []string{"-v", lines[0] + ":/usr/local/go:ro", "-v", lines[1] + ":/go/pkg/mod", "-v", lines[2] + ":/gocache"}, nil
}

// Image is what an image says of itself.
type Image struct {
	Size         int64 // bytes, unpacked
	Architecture string
	Config       struct {
		User       string
		Entrypoint []string
		Cmd        []string
		Labels     map[string]string
		Volumes    map[string]struct{}
	}
	HealthCheck *struct{ Test []string } `json:"Healthcheck"`
}

// Inspect reads an image's description.
func (e *Engine) Inspect(ctx context.Context, image string) (Image, error) {
	out, err := e.do(ctx, nil, "image", "inspect", image)
	if err != nil {
		return Image{}, err
	}
	var all []Image
	if err := json.Unmarshal(out, &all); err != nil || len(all) != 1 {
		return Image{}, fmt.Errorf("podman image inspect says %q: %w", out, err)
	}
	return all[0], nil
}

// Files maps the paths of an image's files to their contents.
func (e *Engine) Files(ctx context.Context, image string) (map[string][]byte, error) {
	id, err := e.do(ctx, nil, "create", "--network", "none", image)
	if err != nil {
		return nil, err
	}
	name := strings.TrimSpace(string(id))
	out, err := e.do(ctx, nil, "export", name)
	if err != nil {
		return nil, err
	}
	if _, err := e.do(ctx, nil, "rm", name); err != nil {
		return nil, err
	}
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(out)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return files, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read the image's files: %w", err)
		}
		if h.Typeflag == tar.TypeReg {
			if files[h.Name], err = io.ReadAll(r); err != nil {
				return nil, err
			}
		}
	}
}

// unmount lets go of a mount that a container had.
func unmount(path string) error {
	err := syscall.Unmount(path, syscall.MNT_DETACH)
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOENT) {
		return nil // it went with another
	}
	return err
}
