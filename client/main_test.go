package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/culvertnet/culvert/client/agent/agenttest"
	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/client/host"
	"github.com/culvertnet/culvert/client/kernel"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) != "culvert" { // the command itself runs as it is
		isolate()
	}
	testscript.Main(m, map[string]func(){"culvert": main})
}

var scripts atomic.Int64

// TestScripts runs testdata/*.txtar. A script that says `world` has a coordinator and a gateway, and may say how they behave:
// `world deny`, `world absent` (no gateway), `world silent` (the gateway answers nobody).
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			testscript.Run(t, testscript.Params{
				Files: []string{file},
				Condition: func(cond string) (bool, error) {
					switch cond {
					case "tun":
						return isolated() && host.Privileged(), nil
					case "kernel":
						d, err := kernel.Open(kernel.Options{})
						return err == nil && d.Close() == nil && isolated(), nil
					}
					return false, fmt.Errorf("no such condition")
				},
				Setup: func(env *testscript.Env) error {
					env.Setenv("CULVERT_NAME", fmt.Sprintf("test-%d-%d", os.Getpid(), scripts.Add(1)))
					env.Setenv("CULVERT_MODE", "proxy")
					env.Setenv("GORACE", os.Getenv("GORACE"))
					return nil
				},
				Cmds: map[string]func(*testscript.TestScript, bool, []string){
					"world":      func(ts *testscript.TestScript, _ bool, args []string) { world(t, ts, args) },
					"cloud":      func(ts *testscript.TestScript, _ bool, args []string) { cloud(t, ts, args) },
					"exitcode":   exitCode,
					"jsonfield":  jsonField,
					"interface":  interfaces,
					"killtunnel": killTunnel,
					"waitname":   func(ts *testscript.TestScript, _ bool, _ []string) { await(ts, true) },
					"waitgone":   func(ts *testscript.TestScript, _ bool, _ []string) { await(ts, false) },
				},
			})
		})
	}
}

var behaviours = map[string]func(*agenttest.World){
	"deny": func(w *agenttest.World) {
		denied := problem.New(problem.Denied, "no rule lets this job in", "ask for one")
		denied.Denial = &problem.Denial{Rule: "deploy", Claim: "ref", Expected: []string{"refs/heads/main"}, Got: "refs/heads/x"}
		w.OnJoin = refuse(denied)
	},
	"absent": func(w *agenttest.World) {
		w.OnJoin = refuse(problem.New(problem.NoGateway, "no gateway is connected", "start one"))
	},
	"silent": func(w *agenttest.World) { w.Gateway.Deaf = true },
	"unreachable": func(w *agenttest.World) {
		w.Gateway.Verdict = wire.ReachResult{Verdict: wire.Unreachable, Reason: "connection refused"}
	},
	"flow-denied": func(w *agenttest.World) {
		w.Gateway.Verdict = wire.ReachResult{Verdict: wire.FlowDenied, Reason: "no rule allows it"}
	},
}

func world(t *testing.T, ts *testscript.TestScript, args []string) {
	w := agenttest.New(t, func(w *agenttest.World) {
		for _, arg := range args {
			script, ok := behaviours[arg]
			if !ok {
				ts.Fatalf("no such world: %s", arg)
			}
			script(w)
		}
	})
	for _, entry := range w.Environ() {
		name, value, _ := strings.Cut(entry, "=")
		ts.Setenv(name, value)
	}
	ts.Setenv("GATEWAY_KEY", w.Gateway.Key().String())
	ts.Setenv("SERVICE", net.JoinHostPort(agenttest.Service.String(), fmt.Sprint(agenttest.ServicePort)))
}

// exitCode runs a command and compares its exit code: exitcode 3 culvert up.
func exitCode(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: exitcode N CMD…")
	}
	err := ts.Exec(args[1], args[2:]...)
	got := "0"
	if err != nil {
		got = strings.TrimPrefix(err.Error(), "exit status ")
	}
	if got != args[0] {
		ts.Fatalf("%v: exit code %s, want %s", args[1:], got, args[0])
	}
}

// jsonField compares a top-level field of the JSON on standard output: jsonfield code denied.
func jsonField(ts *testscript.TestScript, _ bool, args []string) {
	var doc map[string]any
	text := ts.ReadFile("stdout")
	if err := json.Unmarshal([]byte(text), &doc); err != nil {
		ts.Fatalf("standard output is not one JSON document: %v\n%s", err, text)
	}
	if got := fmt.Sprint(doc[args[0]]); got != args[1] {
		ts.Fatalf("%s = %s, want %s", args[0], got, args[1])
	}
}

func refuse(p *problem.Error) func(int, http.ResponseWriter) bool {
	return func(_ int, w http.ResponseWriter) bool {
		problem.Write(w, p)
		return true
	}
}

// interfaces holds `interface none`: that this namespace has no interface but loopback, within two seconds.
func interfaces(ts *testscript.TestScript, neg bool, _ []string) {
	var names []string
	for range 200 {
		list, err := net.Interfaces()
		ts.Check(err)
		names = nil
		for _, i := range list {
			if strings.HasPrefix(i.Name, "culvert") {
				names = append(names, i.Name)
			}
		}
		if neg == (len(names) > 0) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	ts.Fatalf("interfaces: %v", names)
}

// killTunnel kills the process of a status document with SIGKILL.
func killTunnel(ts *testscript.TestScript, _ bool, args []string) {
	var st control.Status
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &st))
	p, err := os.FindProcess(st.PID)
	ts.Check(err)
	ts.Check(p.Kill())
}

// await waits until the script's tunnel is there, or is gone.
func await(ts *testscript.TestScript, there bool) {
	client, err := control.NewClient(ts.Getenv("CULVERT_NAME"))
	ts.Check(err)
	for range 500 {
		if _, err := client.Status(context.Background()); (err == nil) == there {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	ts.Fatalf("the tunnel's presence is not %t in time", there)
}
