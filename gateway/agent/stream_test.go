package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

var testHello = wire.Hello{Version: wire.Version, Name: "gw", Key: wire.Key{1}}

// testStream runs a stream to c until the test ends.
func testStream(t *testing.T, c *coordinator, edit ...func(*stream)) (*stream, chan wire.Frame) {
	t.Helper()
	got := make(chan wire.Frame, 16)
	s := &stream{
		url: c.url() + wire.PathGateway, network: "corp", client: &http.Client{Transport: &http.Transport{}}, out: newOutbox(),
		credential: func() (wire.Secret, error) { return "Enrol secret", nil },
		hello:      func() wire.Hello { return testHello },
		welcome:    func(wire.Welcome) error { return nil },
		handle:     func(_ context.Context, f wire.Frame) { got <- f },
		join:       func() {}, log: slog.New(slog.DiscardHandler),
	}
	for _, f := range edit {
		f(s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { s.run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait(); s.client.CloseIdleConnections() })
	return s, got
}

// eventually waits for real parts that run beside the test.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(40 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 40 s: %s", what)
		}
	}
}

func TestStreamIntroducesTheGateway(t *testing.T) {
	c := startCoordinator(t)
	s, got := testStream(t, c)
	if h := c.hello(); h.Name != "gw" {
		t.Errorf("hello %+v", h)
	}
	c.mu.Lock()
	auth, network := c.headers.Get("Authorization"), c.headers.Get(wire.HeaderNetwork)
	c.mu.Unlock()
	if auth != "Enrol secret" || network != "corp" {
		t.Errorf("headers %q, %q", auth, network)
	}
	s.out.end(wire.End{Session: "x", Reason: "over"})
	if e := body[wire.End](t, c.expect(wire.FrameEnd)); e.Session != "x" {
		t.Errorf("end %+v", e)
	}
	c.send(frame(wire.FrameEnd, 7, wire.End{Session: "y"}))
	if f := <-got; f.Type != wire.FrameEnd || f.ID != 7 {
		t.Errorf("frame %+v", f)
	}
}

// projection is a folder as a kubelet fills it with a token: the file is a link through ..data, which is swapped as a whole.
type projection struct {
	t   *testing.T
	dir string
	n   int
}

func (p *projection) file() string { return filepath.Join(p.dir, "token") }

func (p *projection) rotate(token string) {
	p.t.Helper()
	p.n++
	version := fmt.Sprintf("..2026_%d", p.n)
	err := errors.Join(
		os.Mkdir(filepath.Join(p.dir, version), 0o700),
		os.WriteFile(filepath.Join(p.dir, version, "token"), []byte(token), 0o600),
		os.Symlink(version, filepath.Join(p.dir, "..data_tmp")),
		os.Rename(filepath.Join(p.dir, "..data_tmp"), filepath.Join(p.dir, "..data")),
	)
	if p.n == 1 {
		err = errors.Join(err, os.Symlink("..data/token", p.file()))
	} else {
		err = errors.Join(err, os.RemoveAll(filepath.Join(p.dir, fmt.Sprintf("..2026_%d", p.n-1))))
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// A projected token rotates on disk: the running stream brings the new one, and the next connection opens with it.
func TestStreamFollowsARotatingToken(t *testing.T) {
	p := &projection{t: t, dir: t.TempDir()}
	p.rotate("first.token.here")
	o := Options{IdentityTokenFile: p.file()}
	c := startCoordinator(t)
	s, _ := testStream(t, c, func(s *stream) { s.credential, s.refresh = o.credential, 5*time.Millisecond })
	c.hello()
	eventually(t, "the stream is up", s.up)
	for _, token := range []string{"second.token.here", "third.token.here"} {
		p.rotate(token)
		if got := body[wire.Credential](t, c.expect(wire.FrameCredential)); got.Authorization != wire.Secret("Bearer "+token) {
			t.Errorf("the stream brings %q", got.Authorization.Reveal())
		}
	}
	if err := os.WriteFile(p.file(), nil, 0o600); err != nil { // unreadable for a moment: no reason to end anything
		t.Fatal(err)
	}
	p.rotate("fourth.token.here")
	if got := body[wire.Credential](t, c.expect(wire.FrameCredential)); got.Authorization != "Bearer fourth.token.here" {
		t.Errorf("the stream brings %q", got.Authorization.Reveal())
	}
	c.drop()
	c.hello()
	c.mu.Lock()
	defer c.mu.Unlock()
	if got := c.headers.Get("Authorization"); got != "Bearer fourth.token.here" {
		t.Errorf("reconnects with %q", got)
	}
}

func TestStreamFindsARestartedCoordinator(t *testing.T) {
	c := startCoordinator(t)
	s, _ := testStream(t, c)
	c.hello()
	eventually(t, "the stream is up", s.up)
	c.stop()
	eventually(t, "the gateway notices", func() bool { return !s.up() })
	s.out.renew(wire.Renewed{Session: "x", Token: "kept"})
	began := time.Now()
	c.start()
	c.hello()
	if d := time.Since(began); d > 2*time.Second {
		t.Errorf("found after %v", d)
	}
	if r := body[wire.Renewed](t, c.expect(wire.FrameRenewed)); r.Token != "kept" {
		t.Errorf("renewed %+v", r)
	}
}

// TestStreamSurvivesNonsense sends what no coordinator should; the gateway drops the stream and comes back.
func TestStreamSurvivesNonsense(t *testing.T) {
	for name, raw := range map[string][]byte{
		"no JSON":         []byte("hello"),
		"another frame":   []byte(`{"type":"offer","id":1}`),
		"another version": []byte(`{"type":"welcome","body":{"version":99}}`),
		"a huge frame":    append([]byte(`{"type":"welcome","body":{"network":"`), make([]byte, wire.MaxFrame)...),
	} {
		t.Run(name, func(t *testing.T) {
			c := startCoordinator(t)
			c.script(func(c *coordinator) { c.raw = raw })
			s := &stream{
				url: c.url() + wire.PathGateway, client: &http.Client{Transport: &http.Transport{}}, out: newOutbox(),
				credential: func() (wire.Secret, error) { return "Enrol secret", nil },
				hello:      func() wire.Hello { return testHello },
				welcome:    func(wire.Welcome) error { t.Error("welcomed"); return nil },
				join:       func() {}, log: slog.New(slog.DiscardHandler),
			}
			defer s.client.CloseIdleConnections()
			welcomed, err := s.once(t.Context())
			if welcomed || err == nil {
				t.Errorf("welcomed: %t, %v", welcomed, err)
			}
		})
	}
}

func TestPermanentRefusals(t *testing.T) {
	for code, want := range map[problem.Code]bool{
		problem.Unauthorized: true, problem.NoNetwork: true, problem.Incompatible: true,
		problem.UnknownName: true, problem.Certificate: true, problem.NoTLS: true,
		problem.Unreachable: false, problem.Failed: false, problem.RateLimited: false,
	} {
		c := startCoordinator(t)
		c.script(func(c *coordinator) { c.refuse = problem.New(code, "no", "next") })
		var dials atomic.Int32
		s := &stream{
			url: c.url() + wire.PathGateway, client: &http.Client{Transport: &http.Transport{}}, out: newOutbox(),
			credential: func() (wire.Secret, error) { dials.Add(1); return "Enrol secret", nil },
		}
		_, err := s.once(t.Context())
		if got := permanent(err); got != want || problem.CodeOf(err) != code {
			t.Errorf("%s: %v is permanent: %t, want %t", code, err, got, want)
		}
		s.client.CloseIdleConnections()
	}
}

func TestNoRedirectGetsTheCredential(t *testing.T) {
	c := startCoordinator(t)
	c.script(func(c *coordinator) {
		c.server.Handler = http.RedirectHandler("http://127.0.0.1:1/", http.StatusTemporaryRedirect)
	})
	s := &stream{
		url: c.url() + wire.PathGateway, client: &http.Client{Transport: &http.Transport{}}, out: newOutbox(),
		credential: func() (wire.Secret, error) { return "Enrol secret", nil }, hello: func() wire.Hello { return testHello },
	}
	defer s.client.CloseIdleConnections()
	if _, err := s.once(t.Context()); problem.CodeOf(err) != problem.Unreachable {
		t.Errorf("got %v", err)
	}
}

func TestBackoff(t *testing.T) {
	for range 100 {
		b := backoff{first: firstRetry, last: lastRetry}
		limit := firstRetry
		for range 12 {
			d := b.next()
			if d > limit || d < limit/2 {
				t.Fatalf("waits %v, want between %v and %v", d, limit/2, limit)
			}
			limit = min(limit*2, lastRetry)
		}
		b.reset()
		if d := b.next(); d > 250*time.Millisecond {
			t.Fatalf("first retry after %v", d)
		}
	}
}

// TestRefusedGatewaySaysSo: a gateway whose secret is wrong says so, with code and next step, to whoever asks how it is, and in its
// metrics; once it has been let in, no more.
func TestRefusedGatewaySaysSo(t *testing.T) {
	w := newWorld(t, nil)
	w.coord.hello()
	eventually(t, "the stream is up", w.gateway.stream.up)
	if text := strings.TrimSpace(w.page(t, "/healthz")); text != "ok" {
		t.Errorf("health %q", text)
	}
	w.coord.script(func(c *coordinator) {
		c.refuse = problem.New(problem.Unauthorized, "this gateway is not enrolled", "compare its credential")
	})
	w.coord.drop()
	says := func(page string) bool {
		text := w.page(t, page)
		return strings.Contains(text, "unauthorized") && strings.Contains(text, "not enrolled") && strings.Contains(text, "compare its credential")
	}
	eventually(t, "it is not ready, and says why", func() bool { return says("/readyz") })
	if !says("/healthz") {
		t.Errorf("health %q", w.page(t, "/healthz"))
	}
	if n := w.scrape(t)[`culvert_gateway_stream_failures_total{code="unauthorized"}`]; n == 0 {
		t.Error("metrics do not show it")
	}
	w.coord.script(func(c *coordinator) { c.refuse = nil })
	w.coord.hello()
	eventually(t, "it is ready again", func() bool { return strings.TrimSpace(w.page(t, "/readyz")) == "ok" })
	if text := strings.TrimSpace(w.page(t, "/healthz")); text != "ok" {
		t.Errorf("health %q", text)
	}
}

// TestRefusalsAreTriedSlowly: what only a person can lift is tried again after seconds, and then less and less; another coordinator's codes
// make no series of their own.
func TestRefusalsAreTriedSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMetrics()
		var tries []time.Time
		s := &stream{
			credential: func() (wire.Secret, error) {
				tries = append(tries, time.Now())
				return "", nil
			},
			client: &http.Client{Transport: refusing{}}, url: "http://127.0.0.1/", out: newOutbox(), log: slog.New(slog.DiscardHandler), failed: m.streamFailed,
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		s.run(ctx)
		if n := len(tries); n < 11 || n > 30 {
			t.Errorf("%d tries in ten minutes", n)
		}
		if first := tries[1].Sub(tries[0]); first < firstRefused/2 || first > firstRefused {
			t.Errorf("first tried again after %v", first)
		}
		m.streamFailed("made-up")
		if p := problem.From(s.ready()); p.Code != problem.Unauthorized || p.Next != "next" {
			t.Errorf("ready: %v", p)
		}
		series := make(chan prometheus.Metric, 8)
		m.streams.Collect(series)
		if n := len(series); n != 2 {
			t.Errorf("%d series", n)
		}
	})
}

// refusing is a coordinator that knows no gateway.
type refusing struct{}

func (refusing) RoundTrip(*http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	problem.Write(w, problem.New(problem.Unauthorized, "no", "next"))
	return w.Result(), nil
}
