package main

import (
	"encoding/json"
	"os"
	"regexp"
	"runtime"
	"strings"
	"testing"
)

// TestDescribesItself: this test's program is one like any other.
func TestDescribesItself(t *testing.T) {
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	first, err := describe("culvert", "1.2.3", program)
	if err != nil {
		t.Fatal(err)
	}
	again, _ := describe("culvert", "1.2.3", program)
	one, _ := json.Marshal(first)
	two, _ := json.Marshal(again)
	if string(one) != string(two) {
		t.Error("two documents of one program differ")
	}
	if !regexp.MustCompile(`^urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(first.Serial) {
		t.Errorf("serial %s", first.Serial)
	}
	if std := first.Components[0]; std.PURL != "pkg:golang/std@"+strings.TrimPrefix(runtime.Version(), "go") {
		t.Errorf("the standard library is %+v", std)
	}
	if c := first.Metadata.Component; c.Name != "culvert" || c.Version != "1.2.3" || len(c.Hashes) != 1 || len(c.Hashes[0].Content) != 64 {
		t.Errorf("the program is %+v", c)
	}
	if len(first.Dependencies) != 1 || len(first.Dependencies[0].DependsOn) != len(first.Components) {
		t.Errorf("%d components, dependencies %+v", len(first.Components), first.Dependencies)
	}
}

func TestRefusesWhatIsNoProgram(t *testing.T) {
	if _, err := describe("x", "1.2.3", []byte("#!/bin/sh\n")); err == nil {
		t.Error("a script was described")
	}
	if err := run([]string{"x"}); err == nil {
		t.Error("too few arguments were taken")
	}
}
