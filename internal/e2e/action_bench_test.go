//go:build linux

package e2e

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// actAll is the variable that has slow tests under act run, see `make act`.
const actAll = "CULVERT_E2E_ACT"

// BenchmarkAction measures what the action's step takes beyond `culvert up` itself, alternating, with the client in the tool cache;
// what the client takes in memory while nothing happens; and its size as a release has it.
func BenchmarkAction(b *testing.B) {
	a := newActions(b, stage.Options{})
	m := a.machine(b, "bench", nil, nil)
	cache := filepath.Join(m.home, "tools/culvert", actionVersion, platform)
	must(b, os.MkdirAll(cache, 0o755))
	copyFile(b, a.Binary("culvert"), filepath.Join(cache, "culvert"))
	must(b, os.Chmod(filepath.Join(cache, "culvert"), 0o755))
	env := append(m.job.Environ(), "INPUT_COORDINATOR="+a.URL, "INPUT_MODE=auto", "INPUT_SUDO=true", "INPUT_TIMEOUT=60s", "CULVERT_COORDINATOR=",
		"RUNNER_TOOL_CACHE="+m.file("tools"), "GITHUB_ACTIONS=true", "RUNNER_ENVIRONMENT=github-hosted")
	timed := func(path string, args ...string) float64 {
		b.Helper()
		began := time.Now()
		code, err := m.job.Host().Run(timeout(b, time.Minute), lab.Program{Path: path, Args: args, Env: env})
		took := time.Since(began)
		if err != nil || code != 0 {
			b.Fatalf("%s: exit %d, %v", path, code, err)
		}
		return took.Seconds() * 1000
	}
	var step, up, rest []float64
	var idle float64
	for range 11 {
		with := timed(filepath.Join(a.node, "node"), filepath.Join(a.action, "action/main.mjs"))
		culvert(b, m.job, 0, "down")
		alone := timed(a.Binary("culvert"), "up", "--coordinator", a.URL)
		if idle == 0 {
			time.Sleep(3 * time.Second)
			idle = residentMemory(b, clientPID(b, m.job))
		}
		culvert(b, m.job, 0, "down")
		step, up, rest = append(step, with), append(up, alone), append(rest, with-alone)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(middle(step), "step-ms")
	b.ReportMetric(middle(up), "up-ms")
	b.ReportMetric(middle(rest), "overhead-ms")
	b.ReportMetric(idle, "idle-RSS-MB")
	b.ReportMetric(packed(b, a.Binary("culvert")), "client-gz-MB")
}

// packed is the size of a program as a release has it, in MB.
func packed(t testing.TB, path string) float64 {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	var out bytes.Buffer
	w, _ := gzip.NewWriterLevel(&out, gzip.BestCompression)
	_, err = w.Write(data)
	must(t, err)
	must(t, w.Close())
	return float64(out.Len()) / 1e6
}

// starter is a client that waits in `up` until somebody opens a pipe for writing, and notes when it began and ended. Waiting takes no
// processor time, which those that have begun need.
const starter = `#!/bin/sh
[ "$1" = up ] || exec %[1]q "$@"
touch "$HOME/waiting"
: < %[2]q
began=$(date +%%s%%N)
%[1]q "$@" || exit $?
echo "$began $(date +%%s%%N)" > "$HOME/times"
`

// TestWorkflowsMatrix: twenty jobs under act, each on a machine of its own behind a NAT of its own, join at the same moment. It takes long,
// and its figure depends on the machine, so it runs by `make act` alone.
func TestWorkflowsMatrix(t *testing.T) {
	if os.Getenv(actAll) == "" {
		t.Skip("make act runs this")
	}
	a := newActions(t, stage.Options{})
	shared, err := scratch("culvert-matrix-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(shared) })
	client, start := filepath.Join(shared, "culvert"), filepath.Join(shared, "start")
	must(t, syscall.Mkfifo(start, 0o600))
	must(t, os.WriteFile(client, fmt.Appendf(nil, starter, a.Binary("culvert"), start), 0o755))
	const jobs = 20
	var machines []*machine
	var runs []*actRun
	var before [][]string
	for i := range jobs {
		nat, err := a.Net.NAT(fmt.Sprintf("nat-%d", i), lab.NATOptions{})
		must(t, err)
		m := a.machine(t, fmt.Sprintf("job-%d", i), nat, nil)
		machines, before = append(machines, m), append(before, m.state(t))
		runs = append(runs, m.begin(t, a.workflow(", binary: "+client, `psql -h db.internal -At -c "select 6*7"`), a.action))
	}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		waiting := 0
		for _, m := range machines {
			if exists(m.file("waiting")) {
				waiting++
			}
		}
		if waiting == jobs {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d jobs have come to join", waiting, jobs)
		}
	}
	open, err := os.OpenFile(start, os.O_RDWR, 0) // to the end of the test: some may not have come to wait yet
	must(t, err)
	defer open.Close()
	var first, last int64
	for i, run := range runs {
		if code, log := run.end(t); code != 0 || !strings.Contains(log, "42") {
			t.Fatalf("job %d: exit code %d\n%s", i, code, log)
		}
		times, err := os.ReadFile(machines[i].file("times"))
		must(t, err)
		fields := strings.Fields(string(times))
		began, _ := strconv.ParseInt(fields[0], 10, 64)
		ended, _ := strconv.ParseInt(fields[1], 10, 64)
		if first == 0 || began < first {
			first = began
		}
		last = max(last, ended)
		must(t, os.Remove(machines[i].file("waiting")))
		must(t, os.Remove(machines[i].file("times")))
		machines[i].clean(t, before[i])
	}
	t.Logf("BenchmarkMatrix%d 1 %.0f ms-first-start-to-last-usable", jobs, float64(last-first)/1e6)
}
