//go:build linux

package e2e

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	shown "github.com/culvertnet/culvert/internal/snippets"
	"github.com/culvertnet/culvert/internal/stage"
)

// job is a workflow of one job: join, then these steps.
func (a *actions) workflow(with string, steps ...string) string {
	lines := []string{"on: push", "permissions: {id-token: write, contents: read}", "jobs:", "  test:", "    runs-on: ubuntu-latest", "    steps:",
		"      - uses: culvertnet/culvert@v1", fmt.Sprintf("        with: {coordinator: %q%s}", a.URL, with)}
	for _, step := range steps {
		lines = append(lines, "      - run: "+step)
	}
	return strings.Join(lines, "\n") + "\n"
}

// Workflows as an outside user writes them, under act with real Node 24. Each runs on a runner with a network of its own, which is
// afterwards as it was before.
func TestWorkflows(t *testing.T) {
	a := newActions(t, stage.Options{})
	const query = `psql -h db.internal -At -c "select 'answer', 6*7"`
	for _, tc := range []struct {
		name    string
		with    string
		steps   []string
		env     []string
		claims  map[string]any
		forged  bool // what is downloaded is not what the action pins
		cut     bool // the runner's network lets nothing out
		code    int
		want    []string // patterns in the log
		never   []string
		summary []string // what it says; act keeps it where the job failed
	}{
		{name: "node 24", steps: []string{"node --version", query},
			want: []string{`v24\.`, `answer\|42`, `culvert: up in network corp`, `Success - Post culvertnet/culvert@v1`}, never: []string{`::error`}},
		{name: "step fails", steps: []string{query, "(exec 3<>/dev/tcp/" + a.Private.Addr().String() + "/81) || exit 7"}, code: 1,
			want: []string{`answer\|42`, `Failure - Main`, `Success - Post culvertnet/culvert@v1`}, summary: []string{"| path | `reflexive`", "| `tcp db.internal:5432` | 1 |", "| `allow: [\"tcp "}},
		{name: "debug", steps: []string{query}, env: []string{"RUNNER_DEBUG=1"}, want: []string{`level=DEBUG`, `answer\|42`, `Success - Post`}, never: []string{`::error`}},
		{name: "no id-token", env: []string{"ACTIONS_ID_TOKEN_REQUEST_URL=", "ACTIONS_ID_TOKEN_REQUEST_TOKEN="}, code: 1,
			want: []string{`::error title=culvert%3A token-unavailable::.*id-token: write`, `Success - Post`}},
		{name: "wrong audience", claims: map[string]any{"aud": "https://elsewhere.example.com"}, code: 1,
			want: []string{`::error title=culvert%3A token-audience::`, `Success - Post`}},
		{name: "denied", claims: map[string]any{"repository": "acme/other", "repository_id": "4712"}, code: 1,
			want: []string{`exit status 3`, `::error title=culvert%3A denied::.*claim repository expected \["acme/shop"\], got "acme/other"`, `Success - Post`}},
		{name: "no network", with: ", timeout: 3s, binary: " + a.Binary("culvert"), cut: true, code: 1,
			want: []string{`exit status 4`, `::error title=culvert%3A timeout::.*neither \S+ nor GitHub's token service answers`, `Success - Post`}},
		{name: "from the coordinator", with: `, mirror: "https://github.com/nowhere"`, steps: []string{query},
			want: []string{`culvert: client from ` + regexp.QuoteMeta(a.Cloud.Addr().String()) + `\s`, `answer\|42`, `Success - Post`}, never: []string{`::error`}},
		{name: "corrupt download", forged: true, code: 1,
			want: []string{`its SHA-256 is not the pinned (ab){32}`, `Success - Post`}, never: []string{`culvert: client from`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			var nat *lab.NAT
			if tc.cut {
				nat = a.cutOff(t)
			}
			m := a.machine(t, strings.ReplaceAll(tc.name, " ", "-"), nat, tc.claims)
			before := m.state(t)
			action := a.action
			if tc.forged {
				action = a.forged
			}
			code, log := m.begin(t, a.workflow(tc.with, tc.steps...), action, tc.env...).end(t)
			if code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			for _, want := range tc.want {
				if !regexp.MustCompile(want).MatchString(log) {
					t.Errorf("the log does not say %s", want)
				}
			}
			for _, never := range append(tc.never, `::warning`, `eyJ`, regexp.QuoteMeta(m.job.Getenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN"))) {
				if regexp.MustCompile(never).MatchString(log) {
					t.Errorf("the log says %s", never)
				}
			}
			summary := m.summary(t)
			for _, want := range tc.summary {
				if !strings.Contains(summary, want) {
					t.Errorf("the job's summary does not say %s:\n%s", want, summary)
				}
			}
			m.clean(t, before)
			if t.Failed() {
				t.Log(log)
			}
		})
	}
	for _, w := range a.documented(t) {
		if strings.Contains(w.Text, "network: "+otherNetwork) {
			continue // see TestWorkflowOfTwoNetworks
		}
		t.Run(w.Name(), func(t *testing.T) {
			t.Parallel()
			m := a.machine(t, "documented", nil, nil)
			before := m.state(t)
			code, log := m.begin(t, w.Text, a.action).end(t)
			if code != 0 || !strings.Contains(log, "Success - Post culvertnet/culvert@v1") {
				t.Errorf("exit code %d\n%s\n%s", code, w.Text, log)
			}
			m.clean(t, before)
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		t.Parallel()
		m := a.machine(t, "cancelled", nil, nil)
		before := m.state(t)
		run := m.begin(t, a.workflow("", query+` && touch "$HOME/working" && sleep 600`), a.action)
		deadline := time.Now().Add(time.Minute)
		for !exists(m.file("working")) {
			if time.Now().After(deadline) {
				t.Fatalf("the step does not begin\n%s", run.output(t))
			}
			time.Sleep(20 * time.Millisecond)
		}
		must(t, os.Remove(m.file("working")))
		must(t, run.proc.Signal(syscall.SIGINT))
		code, log := run.end(t)
		if code == 0 || !strings.Contains(log, "Success - Post culvertnet/culvert@v1") {
			t.Errorf("exit code %d\n%s", code, log)
		}
		m.clean(t, before)
	})
}

// TestWorkflowOfTwoNetworks: two steps of the action join two networks, as docs/action.md shows it and in both modes. Both are usable at
// once, later steps' commands are about both, outputs are each step's own, and both are gone after the job.
func TestWorkflowOfTwoNetworks(t *testing.T) {
	a := newActions(t, stage.Options{Other: otherNetwork})
	workflows := map[string]string{}
	for _, w := range a.documented(t) {
		if strings.Contains(w.Text, "network: "+otherNetwork) {
			workflows["documented"] = w.Text
		}
	}
	if len(workflows) == 0 {
		t.Error("the docs show no workflow of two networks")
	}
	join := "      - {id: %s, uses: culvertnet/culvert@v1, with: {coordinator: %q, network: %s, mode: %s, export-proxy: true}}\n"
	for _, mode := range []string{"tun", "proxy"} {
		text := "on: push\npermissions: {id-token: write, contents: read}\njobs:\n  test:\n    runs-on: ubuntu-latest\n    steps:\n"
		text += fmt.Sprintf(join, "one", a.URL, stage.Network, mode) + fmt.Sprintf(join, "two", a.URL, otherNetwork, mode)
		for _, step := range []string{
			`test -n "${{ steps.one.outputs.session }}" -a "${{ steps.one.outputs.session }}" != "${{ steps.two.outputs.session }}"`,
			a.Binary("culvert") + ` status --json | wc -l | grep -x 2`,
			a.Binary("culvert") + ` check db.internal:5432 wiki.lab:80`,
			`curl --fail --max-time 20 http://` + otherName + `/ http://` + a.Private.Addr().String() + `/`,
		} {
			text += "      - run: " + step + "\n"
		}
		workflows[mode] = text
	}
	for name, text := range workflows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := a.machine(t, "two-"+name, nil, nil)
			before := m.state(t)
			code, log := m.begin(t, text, a.action).end(t)
			if code != 0 || strings.Count(log, "Success - Post culvertnet/culvert@v1") != 2 || strings.Contains(log, "::warning") || strings.Contains(log, "eyJ") {
				t.Errorf("exit code %d\n%s\n%s", code, text, log)
			}
			m.clean(t, before)
		})
	}
}

// documented are the workflows of README and docs, with this stage's coordinator in place of the example's.
func (a *actions) documented(t testing.TB) []shown.Workflow {
	t.Helper()
	all, err := shown.Find("../..")
	must(t, err)
	for i := range all {
		all[i].Text = strings.NewReplacer("https://culvert.example.com", a.URL, "10.20.0.5", a.Private.Addr().String()).Replace(all[i].Text)
	}
	return all
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}

// cutOff makes a network that lets nothing out.
func (a *actions) cutOff(t testing.TB) *lab.NAT {
	t.Helper()
	nat, err := a.Net.NAT("nat-cut", lab.NATOptions{})
	must(t, err)
	for _, h := range []*lab.Host{a.Cloud, a.IssuerHost, a.release} {
		must(t, a.Net.Block(nat.Public(), h.Public()))
	}
	return nat
}
