//go:build linux

package e2e

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/lab/podman"
	"github.com/culvertnet/culvert/internal/stage"
)

// gatewayEnv says what the gateway is started from in every test: the binary, or with "image" the image. `make images` sets it.
const gatewayEnv = "CULVERT_E2E_GATEWAY"

// built is the engine that images has made, nil where no test wanted it.
var built *podman.Engine

func closeImages() {
	if built == nil {
		return
	}
	if err := built.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "remove the images:", err)
	}
}

// images builds both images once, for every test that wants them.
var images = sync.OnceValues(func() (*podman.Engine, error) {
	dir, err := scratch("culvert-images-")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	e, err := stage.BuildImages(ctx, "../..", dir)
	if err != nil {
		os.RemoveAll(dir)
	}
	built = e
	return e, err
})

// engine gives the images; without podman the test is skipped, and fails where CI=true.
func engine(t testing.TB) *podman.Engine {
	t.Helper()
	lab.Require(t)
	if err := podman.Missing(); err != nil {
		lab.Skip(t, "no images: %v", err)
	}
	e, err := images()
	must(t, err)
	return e
}

// asImage runs the gateway from its image where the environment says so.
func asImage(t testing.TB, opts *stage.Options) {
	t.Helper()
	if os.Getenv(gatewayEnv) == "image" && !opts.Flat {
		opts.Images = engine(t)
	}
}

// TestImages: what the Dockerfile makes is small, holds one program and nothing else, and does the whole job under an orchestrator
// that gives it nothing: coordinator and gateway each in a container, read-only, without capability, as an ordinary user.
func TestImages(t *testing.T) {
	e := engine(t)
	checkImage(t, e, stage.GatewayImage, 25e6, "culvert-gateway")
	checkImage(t, e, stage.CoordinatorImage, 32e6, "culvert-coordinator")
	s := setup(t, stage.Options{Images: e, CoordinatorImage: true})
	for name, p := range map[string]*lab.Process{"gateway": s.Gateway(), "coordinator": s.Coordinator()} {
		checkConfined(t, name, p.Pid())
		if err := s.Healthy(timeout(t, 30*time.Second), name); err != nil {
			t.Errorf("the %s's health check: %v", name, err)
		}
	}
	job := newJob(t, s, stage.JobOptions{})
	up(t, job, "tun")
	if got, err := get(t, s, "http://"+s.Target(stage.PortHTTP)+"/"); err != nil || got != stage.Greeting {
		t.Fatalf("through the containers: %q, %v", got, err)
	}
	if got, err := get(t, s, "http://"+s.Target(stage.PortOther)+"/"); err == nil {
		t.Errorf("a port that is not granted answers %q", got)
	}
	culvert(t, job, 0, "down")
	for name, stop := range map[string]func(context.Context) (int, error){"gateway": s.StopGateway, "coordinator": s.StopCoordinator} {
		if code, err := stop(timeout(t, 30*time.Second)); code != 0 || err != nil {
			t.Errorf("the %s's container, asked to end: exit %d, %v", name, code, err)
		}
		if err := s.Healthy(timeout(t, 30*time.Second), name); err == nil {
			t.Errorf("the %s is healthy after its end", name)
		}
	}
}

// TestImagesForARM: the same file gives images for the other architecture, without emulating it. `make images` runs it.
func TestImagesForARM(t *testing.T) {
	if os.Getenv(gatewayEnv) != "image" {
		t.Skip("make images runs this")
	}
	e := engine(t)
	// This podman looks for a base of the target's architecture even where the file asks for the builder's, as BuildKit does not.
	must(t, e.Base(timeout(t, time.Minute), stage.BaseImage, "arm64"))
	for _, target := range []string{"gateway", "coordinator"} {
		image := "culvert-" + target + ":arm64"
		must(t, e.Build(timeout(t, 6*time.Minute), "../..", target, image, "--platform", "linux/arm64"))
		is, err := e.Inspect(timeout(t, time.Minute), image)
		must(t, err)
		files, err := e.Files(timeout(t, time.Minute), image)
		must(t, err)
		binary, err := elf.NewFile(bytes.NewReader(files["culvert-"+target]))
		must(t, err)
		if is.Architecture != "arm64" || binary.Machine != elf.EM_AARCH64 {
			t.Errorf("%s is for %s, its program for %s", image, is.Architecture, binary.Machine)
		}
	}
}

// checkImage holds an image to what is promised of it.
func checkImage(t *testing.T, e *podman.Engine, image string, size int64, program string) {
	t.Helper()
	is, err := e.Inspect(timeout(t, time.Minute), image)
	must(t, err)
	t.Logf("%s: %.1f MB", image, float64(is.Size)/1e6)
	if is.Size > size {
		t.Errorf("%s has %d bytes, more than %d", image, is.Size, size)
	}
	if is.Config.User != "65532:65532" || !slices.Equal(is.Config.Entrypoint, []string{"/" + program}) {
		t.Errorf("%s runs %v as %q", image, is.Config.Entrypoint, is.Config.User)
	}
	if is.HealthCheck == nil || !slices.Equal(is.HealthCheck.Test, []string{"CMD", "/" + program, "health"}) {
		t.Errorf("%s has the health check %+v", image, is.HealthCheck)
	}
	labels := map[string]string{
		"title": program, "version": "0.0.0-test", "source": "https://github.com/culvertnet/culvert", "licenses": "Apache-2.0",
	}
	for name, want := range labels {
		if got := is.Config.Labels["org.opencontainers.image."+name]; got != want {
			t.Errorf("%s has the label %s %q, want %q", image, name, got, want)
		}
	}
	files, err := e.Files(timeout(t, time.Minute), image)
	must(t, err)
	checkFiles(t, files, program)
}

// checkFiles: a static program and the authorities of the web, nothing that could be run besides.
func checkFiles(t *testing.T, files map[string][]byte, program string) {
	t.Helper()
	binary, err := elf.NewFile(bytes.NewReader(files[program]))
	if err != nil {
		t.Fatalf("%s: %v", program, err)
	}
	for _, p := range binary.Progs {
		if p.Type == elf.PT_INTERP {
			t.Errorf("%s wants a dynamic linker", program)
		}
	}
	if !bytes.Contains(files["etc/ssl/certs/ca-certificates.crt"], []byte("BEGIN CERTIFICATE")) {
		t.Error("no authorities")
	}
	for name, content := range files {
		ours := name == program || name == "etc/ssl/certs/ca-certificates.crt"
		if !ours && len(content) > 0 { // the engine itself adds empty files, such as etc/hosts
			t.Errorf("the image holds %s, %d bytes", name, len(content))
		}
	}
}

// checkConfined reads from the kernel what a container's process may do.
func checkConfined(t *testing.T, name string, pid int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	for _, line := range []string{"Uid:\t65532\t65532\t65532\t65532", "CapEff:\t0000000000000000",
		"CapPrm:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(string(status), line+"\n") {
			t.Errorf("the %s lacks %q in\n%s", name, line, status)
		}
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	must(t, err)
	root := ""
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 5 && f[4] == "/" {
			root = f[5]
		}
	}
	if !slices.Contains(strings.Split(root, ","), "ro") {
		t.Errorf("the %s's root is mounted %q", name, root)
	}
}
