package main

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

// printed is what a command prints.
func printed(t *testing.T, command ...string) string {
	t.Helper()
	var out bytes.Buffer
	env := environment{args: command, getenv: func(string) string { return "" }, stdout: &out, stderr: &out}
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
