//go:build linux

package stage

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/lab/podman"
)

// The images that the Dockerfile makes, as a stage calls them, and the one that it builds in.
const (
	BaseImage        = "docker.io/library/golang:1.26"
	GatewayImage     = "culvert-gateway:test"
	CoordinatorImage = "culvert-coordinator:test"
)

// BuildImages makes an engine in dir and builds both images from the module at root. It needs Go's caches, so call it before
// [lab.Enter].
func BuildImages(ctx context.Context, root, dir string) (*podman.Engine, error) {
	get := exec.CommandContext(ctx, "go", "mod", "download")
	get.Dir = root
	if out, err := get.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("download modules for the images: %w\n%s", err, out)
	}
	e, err := podman.New(ctx, dir)
	if err != nil {
		return nil, err
	}
	if err := e.Base(ctx, BaseImage, runtime.GOARCH); err != nil {
		return nil, err
	}
	for target, tag := range map[string]string{"gateway": GatewayImage, "coordinator": CoordinatorImage} {
		if err := e.Build(ctx, root, target, tag, "--build-arg", "VERSION=0.0.0-test"); err != nil {
			return nil, err
		}
	}
	return e, nil
}

// contained gives what runs a program of the stage from its image, with the same arguments and files.
func (s *Stage) contained(c podman.Container, p lab.Program) (lab.Program, error) {
	c.Args, c.Env, c.Dir = p.Args, p.Env, s.opts.Dir
	c.Mounts = append(c.Mounts, s.ca.caFile())
	return s.opts.Images.Program(c)
}

// gatewayProgram is the gateway, from its image where the stage has one.
func (s *Stage) gatewayProgram(log string, p lab.Program) (lab.Program, error) {
	if s.opts.Images == nil {
		return p, nil
	}
	if log == "second" { // the image says where metrics are, and both gateways are on one host
		p.Env = append(p.Env, "CULVERT_METRICS=127.0.0.1:9092")
	}
	files := []string{s.enrolment}
	if s.opts.Policy != nil {
		files = append(files, s.file("policy.yaml"))
	}
	return s.contained(podman.Container{Host: s.GatewayBox, Image: GatewayImage, Name: log, Mounts: files}, p)
}

// coordinatorProgram is the coordinator, likewise.
func (s *Stage) coordinatorProgram(p lab.Program) (lab.Program, error) {
	if s.opts.Images == nil || !s.opts.CoordinatorImage {
		return p, nil
	}
	state := s.file("state")
	if err := os.MkdirAll(state, 0o700); err != nil {
		return p, err
	}
	if err := os.Chown(state, lab.UnprivilegedID, lab.UnprivilegedID); err != nil {
		return p, err
	}
	// As container engines do for the networks that they make: port 443 is an ordinary user's there.
	err := s.Cloud.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_unprivileged_port_start", []byte("0"), 0o644) })
	if err != nil {
		return p, fmt.Errorf("open low ports to ordinary users: %w", err)
	}
	p.Env = append(p.Env, "CULVERT_CONFIG="+s.ConfigFile()) // for the health check, which has no argument
	// The folder and not the file: it is replaced when it changes.
	return s.contained(podman.Container{Host: s.Cloud, Image: CoordinatorImage, Name: "coordinator", Mounts: []string{s.opts.Dir}, Writable: []string{state}}, p)
}

// Healthy runs the health check of the image that a program runs from: "gateway", "second" or "coordinator".
func (s *Stage) Healthy(ctx context.Context, program string) error {
	return s.opts.Images.Health(ctx, podman.Container{Name: program, Dir: s.opts.Dir})
}
