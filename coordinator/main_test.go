package main

import (
	"os"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"culvert-coordinator": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata", Setup: func(e *testscript.Env) error {
		e.Setenv("GOCOVERDIR", os.Getenv("GOCOVERDIR"))
		return nil
	}, Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){"exits": exits, "await": await}})
}

// await waits until a file is there: await FILE
func await(ts *testscript.TestScript, _ bool, args []string) {
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(ts.MkAbs(args[0])); err == nil {
			return
		}
	}
	ts.Fatalf("%s never came", args[0])
}

// exits runs the program and wants an exit code: exits CODE ARG…
func exits(ts *testscript.TestScript, _ bool, args []string) {
	err := ts.Exec("culvert-coordinator", args[1:]...)
	got := "0"
	if err != nil {
		got = err.Error()
	}
	if want := args[0]; got != want && got != "exit status "+want {
		ts.Fatalf("%v ended with %s, want %s", args[1:], got, want)
	}
}
