package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestReport(t *testing.T) {
	denied := problem.New(problem.FlowDenied, "the grant does not cover it", "ask for one")
	for name, c := range map[string]struct {
		err       error
		json      bool
		actions   bool
		launched  bool
		code      int
		out, err2 string
	}{
		"nothing":     {code: 0},
		"for people":  {err: denied, code: 3, err2: "culvert: the grant does not cover it [flow-denied]\n  next: ask for one\n"},
		"wrapped":     {err: fmt.Errorf("try: %w", denied), code: 3, err2: "culvert: the grant does not cover it [flow-denied]\n  next: ask for one\n"},
		"only a code": {err: exit(7), json: true, actions: true, code: 7},
		"in actions": {err: denied, actions: true, code: 3, err2: "culvert: the grant does not cover it [flow-denied]\n  next: ask for one\n" +
			"::error title=culvert%3A flow-denied::culvert: the grant does not cover it [flow-denied]%0A  next: ask for one%0A\n"},
		"the launched one leaves annotations to its parent": {err: denied, actions: true, launched: true, code: 3,
			err2: "culvert: the grant does not cover it [flow-denied]\n  next: ask for one\n"},
		"unexpected": {err: errors.New("disk on fire"), code: 1,
			err2: "culvert: something unexpected failed [failed]\n  cause: disk on fire\n  next: look at the log of this program for the cause\n"},
	} {
		t.Run(name, func(t *testing.T) {
			var out, errs bytes.Buffer
			env := environment{stdout: &out, stderr: &errs, launched: c.launched, getenv: func(name string) string {
				if name == "GITHUB_ACTIONS" && c.actions {
					return "true"
				}
				return ""
			}}
			if code := report(env, c.json, c.err); code != c.code {
				t.Errorf("exit code %d, want %d", code, c.code)
			}
			if out.String() != c.out || errs.String() != c.err2 {
				t.Errorf("out %q\nerr %q", out.String(), errs.String())
			}
		})
	}
}

func TestProblemDocument(t *testing.T) {
	var out bytes.Buffer
	env := environment{stdout: &out, getenv: func(string) string { return "" }}
	report(env, true, problem.New(problem.NoPath, "no <path>", "look"))
	var got problem.Error
	if err := json.Unmarshal(out.Bytes(), &got); err != nil || got.Code != problem.NoPath || got.Message != "no <path>" {
		t.Errorf("%s: %v", out.Bytes(), err)
	}
}

// What a server says must not become a workflow command of its own.
func TestAnnotationsAreOneLine(t *testing.T) {
	evil := problem.New(problem.Code("x,y:z\n::set-env name=A::b"), "one\r\n::add-mask::two%0A", "three\n::stop-commands::four")
	got := annotation(evil)
	if strings.Count(got, "\n") != 1 || !strings.HasSuffix(got, "\n") || strings.Contains(got, "\r") {
		t.Errorf("annotation = %q", got)
	}
	if !strings.HasPrefix(got, "::error title=culvert%3A x%2Cy%3Az%0A%3A%3Aset-env") || !strings.Contains(got, "two%250A") {
		t.Errorf("annotation = %q", got)
	}
}

func TestWriteStatus(t *testing.T) {
	now := time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	shook, expires, ends := now.Add(-5*time.Second), now.Add(9*time.Minute), now.Add(2*time.Hour)
	var out bytes.Buffer
	err := writeStatus(&out, control.Status{
		State: control.Up, Session: "S", Network: "corp", Mode: "tun", Interface: "culvert0", Addresses: []string{"198.18.0.10"},
		Gateway: "gw", Path: &control.Path{Kind: "host", Remote: "192.0.2.1:51820", RTT: 1.25, Lost: 0.0123, Parities: true, Rebuilt: 7}, Handshake: &shook,
		RxBytes: 999, TxBytes: 1_250_000, Routes: []string{"10.0.0.0/8"}, LeftOut: []string{"10.1.0.0/16"},
		Expires: &expires, Ends: &ends, Rejoins: 1, Problem: problem.New(problem.Unreachable, "away", "wait"),
		History: []control.Event{{At: now, What: "up"}},
	}, now)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"state      up\n", "path       direct, host 192.0.2.1:51820, 1.2 ms; 1.2 % of packets get lost, 7 rebuilt\n", "handshake  5s ago\n", "traffic    999 B received, 1.2 MB sent\n",
		"mode       tun culvert0\n", "left out   10.1.0.0/16\n", "lease      12:09:00 (in 9m0s), renewed before that\n",
		"ends       14:00:00 (in 2h0m0s) at the latest\n", "problem    unreachable: away; wait\n", "12:00:00   up\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
}

func TestBytesText(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 999: "999 B", 1000: "1.0 kB", 999_949: "999.9 kB", 999_950: "1.0 MB", 1 << 30: "1.1 GB", 1<<64 - 1: "18.4 EB",
	} {
		if got := bytesText(n); got != want {
			t.Errorf("%d = %q, want %q", n, got, want)
		}
	}
}

func TestWorst(t *testing.T) {
	of := func(verdicts ...wire.Verdict) (results []wire.ReachResult) {
		for _, v := range verdicts {
			results = append(results, wire.ReachResult{Verdict: v})
		}
		return results
	}
	for want, results := range map[int][][]wire.ReachResult{
		0: {of(wire.Reachable), of()},
		1: {of(wire.Reachable, wire.Unreachable), of("something new")},
		3: {of(wire.Unreachable, wire.FlowDenied), of(wire.FlowDenied, wire.Unreachable)},
	} {
		for _, r := range results {
			if got := worst(r); got != want {
				t.Errorf("%v: %d, want %d", r, got, want)
			}
		}
	}
}

// reaching is a tunnel that knows one name.
type reaching struct{ control.Handler }

func (reaching) Check(_ context.Context, target string) (wire.ReachResult, error) {
	if target != "db:1" {
		return wire.ReachResult{}, problem.New(problem.FlowUnreachable, "no such name", "use another")
	}
	return wire.ReachResult{Target: target, Verdict: wire.Reachable}, nil
}

func TestCheckAnswersForEachTarget(t *testing.T) {
	name := fmt.Sprintf("check-%d", os.Getpid())
	server, err := control.Listen(name, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	server.Serve(reaching{})
	t.Cleanup(func() { _ = server.Close() })
	check := func(targets ...string) (string, error) {
		var out bytes.Buffer
		err := (&checkCommand{Target: targets}).run(t.Context(), environment{stdout: &out}, common{Name: name})
		return out.String(), err
	}
	out, err := check("nowhere:1", "db:1")
	if !strings.Contains(out, "nowhere:1: unreachable: no such name\n") || !strings.Contains(out, "db:1: reachable") || err == nil {
		t.Errorf("two targets: %q, %v", out, err)
	}
	if _, err := check("nowhere:1"); problem.CodeOf(err) != problem.FlowUnreachable {
		t.Errorf("one target alone: %v", err)
	}
	if out, err := check("db:1", "db"); problem.CodeOf(err) != problem.Usage || out != "" {
		t.Errorf("no port: %q, %v", out, err)
	}
}

func TestExecEnviron(t *testing.T) {
	before := []string{"PATH=/bin", "HTTPS_PROXY=http://old:1", "no_proxy=10.0.0.0/8"}
	if got := execEnviron(before, control.Status{Mode: "tun"}); !slices.Equal(got, before) {
		t.Errorf("mode tun: %v", got)
	}
	got := execEnviron(before, control.Status{Mode: "proxy", Proxy: "127.0.0.1:1080"})
	for _, want := range []string{"PATH=/bin", "HTTPS_PROXY=http://127.0.0.1:1080", "https_proxy=http://127.0.0.1:1080",
		"all_proxy=socks5h://127.0.0.1:1080", "no_proxy=localhost,127.0.0.1,::1"} {
		if !slices.Contains(got, want) {
			t.Errorf("%s is missing in %v", want, got)
		}
	}
	if len(got) != 9 {
		t.Errorf("something is there twice: %v", got)
	}
}

func TestChildEnviron(t *testing.T) {
	got := childEnviron([]string{"A=1", "RUNNER_TRACKING_ID=github_x", "CULVERT_LAUNCHED=0", "RUNNER_TRACKING_ID_B=2"}, time.Unix(1, 5))
	if want := []string{"A=1", "RUNNER_TRACKING_ID_B=2", "CULVERT_LAUNCHED=1000000005"}; !slices.Equal(got, want) {
		t.Errorf("got %v", got)
	}
}

func TestRing(t *testing.T) {
	var shown bytes.Buffer
	r := newRing(&shown, slog.LevelWarn)
	path := filepath.Join(t.TempDir(), "log")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	r.file = file
	log := slog.New(r.handler())
	for i := range 2 * ringLines {
		log.Info("line", "n", i)
	}
	log.Debug("not kept")
	log.Warn("seen")
	r.quiet()
	log.Warn("kept", "text", strings.Repeat("x", 2*ringLine), "secret", wire.Secret("hidden"))
	r.Close()
	lines := r.Lines()
	if len(lines) != ringLines || !strings.Contains(lines[len(lines)-2], "msg=seen") || len(lines[len(lines)-1]) > ringLine {
		t.Errorf("%d lines, last %q", len(lines), lines[len(lines)-1])
	}
	if got := shown.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "msg=seen") {
		t.Errorf("shown %q", got)
	}
	whole, err := os.ReadFile(path)
	if err != nil || bytes.Count(whole, []byte("\n")) != 2*ringLines+2 || bytes.Contains(whole, []byte("hidden")) {
		t.Errorf("%d lines in the file, %v", bytes.Count(whole, []byte("\n")), err)
	}
}
