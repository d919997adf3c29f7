//go:build unix

package stage

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/problem"
)

// JobOptions describe a job.
type JobOptions struct {
	Claims       map[string]any // over those of [Claims]
	Unprivileged bool           // an ordinary user, as on a container runner
	Host         *lab.Host      // default the stage's runner
}

// Job is a job on a runner: the environment in which `culvert` runs.
type Job struct {
	stage *Stage
	host  *lab.Host
	name  string
	home  string
	opts  JobOptions
	env   []string
}

// Job starts a job.
func (s *Stage) Job(opts JobOptions) (*Job, error) {
	s.mu.Lock()
	s.jobs++
	j := &Job{stage: s, host: opts.Host, name: fmt.Sprintf("job-%d", s.jobs), opts: opts}
	s.mu.Unlock()
	if j.host == nil {
		j.host = s.Runner
	}
	j.home = s.file(j.name)
	if err := os.MkdirAll(j.home, 0o700); err != nil {
		return nil, err
	}
	if opts.Unprivileged && os.Getuid() == 0 {
		_ = os.Chown(j.home, lab.UnprivilegedID, lab.UnprivilegedID) // see writeFiles
	}
	asks := s.Issuer.AddJob(Claims(opts.Claims))
	j.env = s.environ(j.host,
		"HOME="+j.home, "XDG_RUNTIME_DIR="+j.home, "RUNNER_TEMP="+j.home,
		"ACTIONS_ID_TOKEN_REQUEST_URL="+asks.RequestURL,
		"ACTIONS_ID_TOKEN_REQUEST_TOKEN="+asks.RequestToken,
		"CULVERT_COORDINATOR="+s.URL,
	)
	return j, nil
}

// Result is how a program ended.
type Result struct {
	Code   int // exit code; -1 where a signal ended it
	Stdout string
	Stderr string
}

// String shows all of it, for a failed test.
func (r Result) String() string {
	return fmt.Sprintf("exit %d\nstdout: %s\nstderr: %s", r.Code, strings.TrimSpace(r.Stdout), strings.TrimSpace(r.Stderr))
}

// Problem is the problem document that a program printed with --json; nil where there is none.
func (r Result) Problem() *problem.Error {
	for _, text := range []string{r.Stdout, r.Stderr} {
		for line := range strings.Lines(text) {
			var p problem.Error
			if json.Unmarshal([]byte(line), &p) == nil && p.Message != "" {
				return &p
			}
		}
		var p problem.Error
		if json.Unmarshal([]byte(text), &p) == nil && p.Message != "" {
			return &p
		}
	}
	return nil
}

// Setenv adds to the environment of programs started from now on.
func (j *Job) Setenv(name, value string) { j.env = append(j.env, name+"="+value) }

// Getenv reads from the environment of its programs.
func (j *Job) Getenv(name string) string {
	for _, entry := range slices.Backward(j.env) {
		if value, ok := strings.CutPrefix(entry, name+"="); ok {
			return value
		}
	}
	return ""
}

// Environ is the environment of its programs.
func (j *Job) Environ() []string { return slices.Clone(j.env) }

// Home is a folder of the job's own, where its programs start.
func (j *Job) Home() string { return j.home }

// Host is where the job runs.
func (j *Job) Host() *lab.Host { return j.host }

// Name names the job, and its log.
func (j *Job) Name() string { return j.name }

// Culvert runs the client.
func (j *Job) Culvert(ctx context.Context, args ...string) (Result, error) {
	return j.Run(ctx, j.stage.Binary("culvert"), args...)
}

// Run runs any program in the job's environment.
func (j *Job) Run(ctx context.Context, path string, args ...string) (Result, error) {
	// Files, not pipes: what a program leaves running may hold its output, and nobody shall wait for that.
	out, err := os.CreateTemp(j.stage.opts.Dir, j.name+"-out-")
	if err != nil {
		return Result{}, err
	}
	defer discard(out)
	errs, err := os.CreateTemp(j.stage.opts.Dir, j.name+"-err-")
	if err != nil {
		return Result{}, err
	}
	defer discard(errs)
	code, err := j.host.Run(ctx, lab.Program{
		Path: path, Args: args, Env: j.env, Dir: j.home, Stdout: out, Stderr: errs, Unprivileged: j.opts.Unprivileged,
	})
	result := Result{Code: code}
	result.Stdout, result.Stderr = content(out), content(errs)
	if err != nil {
		return result, fmt.Errorf("run %s %s: %w\n%s", filepath.Base(path), strings.Join(args, " "), err, result)
	}
	return result, nil
}

// Start starts a program in the job's environment; its output goes to the job's log.
func (j *Job) Start(path string, args ...string) (*lab.Process, error) {
	return j.stage.daemon(j.host, j.name, lab.Program{
		Path: path, Args: args, Env: j.env, Dir: j.home, Unprivileged: j.opts.Unprivileged,
	})
}

func discard(f *os.File) {
	f.Close()
	os.Remove(f.Name())
}

func content(f *os.File) string {
	data, err := os.ReadFile(f.Name())
	if err != nil {
		return ""
	}
	return string(data)
}
