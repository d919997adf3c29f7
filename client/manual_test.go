package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/culvertnet/culvert/internal/lab"
)

// printed is what a command prints.
func printed(t *testing.T, command string) string {
	t.Helper()
	var out bytes.Buffer
	env := environment{args: []string{command}, getenv: func(string) string { return "" }, stdout: &out, stderr: &out}
	if code := run(t.Context(), env); code != 0 {
		t.Fatalf("culvert %s: exit %d: %s", command, code, out.String())
	}
	return out.String()
}

// The manual page knows every flag of every command, and has no line that roff takes for a request by accident.
func TestManual(t *testing.T) {
	page := printed(t, "man")
	for field := range reflect.TypeFor[upCommand]().Fields() {
		if name, ok := field.Tag.Lookup("env"); ok && !strings.Contains(page, strings.ReplaceAll(name, "-", `\-`)) {
			t.Errorf("the page says nothing of %s", name)
		}
	}
	for line := range strings.Lines(page) {
		request, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch {
		case !strings.HasPrefix(line, "."), request == ".TH", request == ".SH", request == ".PP", request == ".TP", request == ".B", request == ".I":
		default:
			t.Errorf("a line begins like a request: %s", line)
		}
	}
}

// What bash completes, asked of bash itself.
func TestCompletion(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		lab.Skip(t, "there is no bash here")
	}
	file := filepath.Join(t.TempDir(), "culvert")
	if err := os.WriteFile(file, []byte(printed(t, "completion")), 0o600); err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]string{
		"culvert stat":                "status",
		"culvert up --wait":           "--wait-for",
		"culvert up --for":            "--foreground --forward",
		"culvert up --mode t":         "tun",
		"culvert down --wait":         "",
		"culvert check --js":          "--json",
		"culvert up --mode auto --ne": "--network",
	} {
		words := strings.Fields(line)
		script := `. "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _culvert; echo "${COMPREPLY[*]}"`
		out, err := exec.Command(bash, append([]string{"-c", script, "bash", file}, words...)...).CombinedOutput()
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", line, got, err, want)
		}
	}
}
