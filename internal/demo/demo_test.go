//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// binaries gives a folder with the programs and the demo that every user can enter.
func binaries(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "culvert-demo-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "demo"), ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the demo: %v\n%s", err, out)
	}
	from := os.Getenv("CULVERT_E2E_BIN")
	if from == "" {
		if err := stage.Build(t.Context(), "../..", dir); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	for _, name := range []string{"culvert", "culvert-gateway", "culvert-coordinator"} {
		data, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// perform runs the demo and gives what it printed and its exit code.
func perform(t *testing.T, dir string, user *syscall.Credential, args ...string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "demo"), append([]string{"-bin", dir}, args...)...)
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: user}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	t.Logf("%v\n%s%s", args, &out, &errs)
	return out.String(), cmd.ProcessState.ExitCode()
}

var lastLine = regexp.MustCompile(`demo: (\d+) passed, (\d+) failed\n$`)

func TestDemoHoldsEverywhere(t *testing.T) {
	dir := binaries(t)
	somebody := &syscall.Credential{Uid: lab.UnprivilegedID, Gid: lab.UnprivilegedID}
	if os.Getuid() != 0 {
		somebody = nil
	}
	for name, run := range map[string]struct {
		user   *syscall.Credential
		args   []string
		passed string
	}{
		"as it comes":                             {nil, nil, "8"},
		"ordinary user":                           {somebody, nil, "8"},
		"without network namespaces":              {nil, []string{"-flat"}, "7"},
		"without network namespaces, as ordinary": {somebody, []string{"-flat"}, "7"},
	} {
		t.Run(name, func(t *testing.T) {
			if run.args == nil {
				lab.Require(t)
			}
			out, code := perform(t, dir, run.user, run.args...)
			if m := lastLine.FindStringSubmatch(out); code != 0 || m == nil || m[1] != run.passed || m[2] != "0" {
				t.Errorf("exit %d, last line %q, want %s passed", code, m, run.passed)
			}
			if strings.Contains(out, "\x1b[") {
				t.Error("colours without a terminal")
			}
		})
	}
}

// A demo that cannot fail shows nothing.
func TestDemoFailsWhereItShould(t *testing.T) {
	dir := binaries(t)
	if err := os.WriteFile(filepath.Join(dir, "culvert"), []byte("#!/bin/sh\necho broken >&2\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	out, code := perform(t, dir, nil, "-flat")
	if m := lastLine.FindStringSubmatch(out); code != 1 || m == nil || m[2] == "0" {
		t.Errorf("exit %d, last line %q, want failures", code, m)
	}
}

func TestScreenMarksWhatFailed(t *testing.T) {
	var out bytes.Buffer
	s := &screen{out: &out}
	if !s.step("holds", func() ([]string, error) { return []string{"detail"}, nil }) {
		t.Error("a step that holds counts as failed")
	}
	if s.step("breaks", func() ([]string, error) { return nil, errors.New("why\nand where") }) {
		t.Error("a step that breaks counts as passed")
	}
	s.cannot("the rest", "because")
	if failed := s.summary(); failed != 1 {
		t.Errorf("%d failed, want 1", failed)
	}
	for _, want := range []string{"✓ holds", "      detail\n", "✗ breaks", "      why\n      and where\n", "– the rest: not shown here", "demo: 1 passed, 1 failed\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("lacks %q:\n%s", want, &out)
		}
	}
}

func TestCauseIsShort(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("get: %w", syscall.ECONNREFUSED), "connection refused"},
		{errors.New("a: b: c"), "c"},
		{errors.New("plain"), "plain"},
	} {
		if got := cause(tc.err); got != tc.want {
			t.Errorf("%v: %q, want %q", tc.err, got, tc.want)
		}
	}
}
