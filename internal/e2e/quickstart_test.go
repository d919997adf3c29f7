//go:build linux

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// snippet is a fenced block of the quickstart: "sh WHERE", "sh WHERE runs", "sh WHERE fails=CODE" or "yaml WHERE FILE".
type snippet struct {
	line              int
	lang, where, text string
	option            string
}

var fenced = regexp.MustCompile("(?ms)^```(sh|yaml) ([a-z]+) ?([^\n]*)\n(.*?)^```$")

func snippets(t *testing.T, path string) []snippet {
	t.Helper()
	doc, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []snippet
	for _, m := range fenced.FindAllSubmatchIndex(doc, -1) {
		part := func(i int) string { return string(doc[m[2*i]:m[2*i+1]]) }
		out = append(out, snippet{
			line: bytes.Count(doc[:m[0]], []byte("\n")) + 1,
			lang: part(1), where: part(2), option: part(3), text: part(4),
		})
	}
	return out
}

// TestQuickstart follows docs/quickstart.md command by command, on the hosts that it speaks of. Only names that are somebody else's
// are replaced: the coordinator's, the service's address, and GitHub's issuer.
func TestQuickstart(t *testing.T) {
	s := scenery(t, stage.Options{})
	job, err := s.Job(stage.JobOptions{})
	if err != nil {
		t.Fatal(err)
	}
	q := newQuickstart(t, s, job)
	ran := map[string]int{}
	for _, b := range snippets(t, "../../docs/quickstart.md") {
		q.follow(t, b)
		ran[b.lang+" "+b.where]++
	}
	for _, kind := range []string{"sh gateway", "yaml coordinator", "sh coordinator", "sh job"} {
		if ran[kind] == 0 {
			t.Errorf("the quickstart has no block %q", kind)
		}
	}
}

type quickstart struct {
	stage *stage.Stage
	job   *stage.Job
	dirs  map[string]string
	hosts map[string]*lab.Host
	words *strings.Replacer
}

func newQuickstart(t *testing.T, s *stage.Stage, job *stage.Job) *quickstart {
	t.Helper()
	q := &quickstart{
		stage: s, job: job, dirs: map[string]string{},
		hosts: map[string]*lab.Host{"coordinator": s.Cloud, "gateway": s.GatewayBox, "job": s.Runner},
		words: strings.NewReplacer("https://culvert.example.com", s.URL, "https://token.actions.githubusercontent.com", s.Issuer.URL(),
			"10.20.0.5", s.Private.Addr().String(), "state: {dir: state}", "state: {dir: state}\nissuers: [{url: "+s.Issuer.URL()+"}]"),
	}
	for where := range q.hosts {
		q.dirs[where] = t.TempDir()
	}
	for from, to := range s.Certificate() {
		copyFile(t, from, filepath.Join(q.dirs["coordinator"], to))
	}
	return q
}

func (q *quickstart) follow(t *testing.T, b snippet) {
	t.Helper()
	text := q.words.Replace(b.text)
	switch {
	case b.where == "workflow": // what the workflow does is done by the blocks of the job
	case b.lang == "yaml":
		sum, err := os.ReadFile(filepath.Join(q.dirs["gateway"], "enrol.sha256"))
		if err != nil {
			t.Fatal(err)
		}
		text = strings.ReplaceAll(text, "ENROL_SHA256", strings.TrimSpace(string(sum)))
		if err := os.WriteFile(filepath.Join(q.dirs[b.where], b.option), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	case b.option == "runs":
		q.start(t, b.where, "exec "+text)
	default:
		q.run(t, b, text)
	}
}

func (q *quickstart) program(where, text string) lab.Program {
	path := filepath.Dir(q.stage.Binary("culvert")) + ":" + os.Getenv("PATH")
	env := append(q.job.Environ(), "PATH="+path, "CULVERT_ISSUER="+q.stage.Issuer.URL())
	return lab.Program{Path: "/bin/sh", Args: []string{"-ec", text}, Env: env, Dir: q.dirs[where]}
}

// start runs what stays, and gives it until the next block needs it: what depends on it says itself that it is not there.
func (q *quickstart) start(t *testing.T, where, text string) {
	t.Helper()
	log := filepath.Join(q.dirs[where], "log")
	f, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	p := q.program(where, text)
	p.Stdout, p.Stderr = f, f
	proc, err := q.hosts[where].Start(p)
	_ = f.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		proc.Kill()
		<-proc.Done()
		if t.Failed() {
			content, _ := os.ReadFile(log)
			t.Logf("%s:\n%s", where, content)
		}
	})
	ready := map[string]string{"coordinator": "coordinator serves", "gateway": "stream to the coordinator is up"}[where]
	deadline := time.Now().Add(30 * time.Second)
	for !logged(log, ready) {
		if time.Now().After(deadline) {
			t.Fatalf("the %s never says %q", where, ready)
		}
		select {
		case <-proc.Done():
			t.Fatalf("the %s has ended", where)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func logged(file, word string) bool {
	content, err := os.ReadFile(file)
	return err == nil && bytes.Contains(content, []byte(word))
}

func (q *quickstart) run(t *testing.T, b snippet, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := os.CreateTemp(q.dirs[b.where], "out-")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	p := q.program(b.where, text)
	p.Stdout, p.Stderr = out, out
	code, err := q.hosts[b.where].Run(ctx, p)
	want := 0
	if n, ok := strings.CutPrefix(b.option, "fails="); ok {
		want, _ = strconv.Atoi(n)
	}
	if err != nil || code != want {
		said, _ := os.ReadFile(out.Name())
		t.Fatalf("docs/quickstart.md, line %d: exit %d, %v; want %d\n%s\n%s", b.line, code, err, want, text, said)
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(fmt.Errorf("copy %s: %w", from, err))
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}
