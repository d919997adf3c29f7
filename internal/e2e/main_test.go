//go:build linux

package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// Environment variables: where the binaries are (built here where unset), and flags for building them, such as -race.
const (
	binEnv   = "CULVERT_E2E_BIN"
	ownedEnv = "CULVERT_E2E_BIN_OWNED" // set by this process: remove binEnv at the end
	raceEnv  = "CULVERT_E2E_RACE"
)

func TestMain(m *testing.M) {
	// Before lab.Enter, which leaves the network that go build may need behind.
	if err := buildOnce(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	_ = lab.Enter() // each test names the reason, through lab.Require
	code := m.Run()
	closeImages()
	if os.Getenv(ownedEnv) != "" {
		os.RemoveAll(os.Getenv(binEnv))
	}
	os.Exit(code)
}

func buildOnce() error {
	if os.Getenv(binEnv) != "" {
		return nil
	}
	dir, err := scratch("culvert-bin-")
	if err != nil {
		return err
	}
	var flags []string
	if os.Getenv(raceEnv) != "" {
		flags = append(flags, "-race")
	}
	if err := stage.Build(context.Background(), "../..", dir, flags...); err != nil {
		return err
	}
	os.Setenv(ownedEnv, "1")
	return os.Setenv(binEnv, dir)
}

// scratch makes a folder that other users can enter; the folders of testing.T cannot be.
func scratch(pattern string) (string, error) {
	dir, err := os.MkdirTemp("", pattern)
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}

// setup gives a stage that is ready for jobs.
func setup(t testing.TB, opts stage.Options) *stage.Stage {
	t.Helper()
	s := scenery(t, opts)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	return s
}

// scenery gives a stage on which neither coordinator nor gateway run.
func scenery(t testing.TB, opts stage.Options) *stage.Stage {
	t.Helper()
	lab.Require(t)
	dir, err := scratch("culvert-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	opts.Binaries, opts.Dir = os.Getenv(binEnv), dir
	asImage(t, &opts)
	if opts.Service == nil {
		opts.Service = http.HandlerFunc(serve)
	}
	s, err := stage.New(context.Background(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(s.Logs())
		}
		os.RemoveAll(dir)
	})
	return s
}

// The download: a fixed stream of pseudo-random bytes, so that nothing on the way can compress or guess it.
const downloadSize = 200 << 20

func download() io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte([]byte("culvert end-to-end download 0001"))), downloadSize)
}

// downloadSum is the download's SHA-256 in hexadecimal.
var downloadSum = sync.OnceValue(func() string {
	h := sha256.New()
	_, _ = io.Copy(h, download())
	return hex.EncodeToString(h.Sum(nil))
})

// serve is the private service.
func serve(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/download":
		w.Header().Set("Content-Length", fmt.Sprint(downloadSize))
		_, _ = io.Copy(w, download())
	case "/drip": // a byte every 100 ms until the caller goes
		for r.Context().Err() == nil {
			fmt.Fprint(w, ".")
			_ = http.NewResponseController(w).Flush()
			time.Sleep(100 * time.Millisecond)
		}
	case "/upload":
		h := sha256.New()
		_, _ = io.Copy(h, r.Body)
		fmt.Fprint(w, hex.EncodeToString(h.Sum(nil)))
	default:
		fmt.Fprint(w, stage.Greeting)
	}
}

// timeout is a context for one step of a test.
func timeout(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func newJob(t testing.TB, s *stage.Stage, opts stage.JobOptions) *stage.Job {
	t.Helper()
	job, err := s.Job(opts)
	if err != nil {
		t.Fatal(err)
	}
	return job
}

// culvert runs the client and expects this exit code.
func culvert(t testing.TB, job *stage.Job, code int, args ...string) stage.Result {
	t.Helper()
	result, err := job.Culvert(timeout(t, time.Minute), args...)
	if err != nil {
		t.Fatal(err)
	}
	if result.Code != code {
		t.Fatalf("culvert %v: want exit %d, got %s", args, code, result)
	}
	return result
}

// ready is what `culvert up --json` prints, as far as tests look at it.
type ready struct {
	Session string             `json:"session"`
	Address string             `json:"address"`
	Proxy   string             `json:"proxy"`
	Mode    string             `json:"mode"`
	Timings map[string]float64 `json:"timings"`
}

// up joins in this mode and ends the session with the test.
func up(t testing.TB, job *stage.Job, mode string, args ...string) ready {
	t.Helper()
	result := culvert(t, job, 0, append([]string{"up", "--json", "--mode", mode}, args...)...)
	t.Cleanup(func() { _, _ = job.Culvert(timeout(t, 20*time.Second), "down") })
	var r ready
	if err := json.Unmarshal([]byte(result.Stdout), &r); err != nil {
		t.Fatalf("culvert up --json printed %q: %v", result.Stdout, err)
	}
	return r
}

// decode reads the JSON value that a program printed first.
func decode(t testing.TB, text string, into any) {
	t.Helper()
	if err := json.NewDecoder(strings.NewReader(text)).Decode(into); err != nil {
		t.Fatalf("reading %q: %v", text, err)
	}
}

// program finds a program of the distribution; without it the test is skipped, and fails where CI=true.
func program(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err == nil {
		return path
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s is missing, and CI must not skip", name)
	}
	t.Skipf("%s is missing; as root on Debian, make test installs it", name)
	return ""
}

// output runs a program in the job's environment, which must succeed, and gives what it printed.
func output(t testing.TB, job *stage.Job, path string, args ...string) string {
	t.Helper()
	result, err := job.Run(timeout(t, 2*time.Minute), path, args...)
	if err != nil {
		t.Fatal(err)
	}
	if result.Code != 0 {
		t.Fatalf("%s %v: %s", filepath.Base(path), args, result)
	}
	return result.Stdout
}

// get fetches a URL from the runner's network, which in mode tun goes through the tunnel.
func get(t testing.TB, s *stage.Stage, url string) (string, error) {
	t.Helper()
	resp, err := s.Client(s.Runner, 10*time.Second).Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return string(body), err
}
