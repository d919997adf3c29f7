package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/client/agent/agenttest"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// options are those of a job that may join.
func options(t *testing.T, w *agenttest.World) Options {
	t.Helper()
	return Options{
		Coordinator: w.URL,
		Timeout:     20 * time.Second,
		Logger:      slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Tokens:      func(*http.Client) (TokenSource, error) { return tokenFunc(goodToken), nil },
	}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

type tokenFunc func(ctx context.Context, audience string) (wire.Secret, error)

func (f tokenFunc) Token(ctx context.Context, audience string) (wire.Secret, error) {
	return f(ctx, audience)
}

func goodToken(_ context.Context, audience string) (wire.Secret, error) {
	return agenttest.Token(audience), nil
}

// running is an agent that runs until the test ends.
type running struct {
	*Agent
	ready  chan Ready
	result chan error
}

// start runs an agent.
func start(t *testing.T, opts Options) *running {
	t.Helper()
	r := &running{ready: make(chan Ready, 1), result: make(chan error, 1)}
	opts.OnReady = func(ready Ready) { r.ready <- ready }
	var err error
	if r.Agent, err = New(opts); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { r.result <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-r.done
	})
	return r
}

// up waits until the agent is ready.
func (r *running) up(t *testing.T) Ready {
	t.Helper()
	select {
	case ready := <-r.ready:
		return ready
	case err := <-r.result:
		t.Fatalf("the agent ended: %v (%v)", err, errors.Unwrap(problem.From(err)))
	case <-time.After(20 * time.Second):
		t.Fatal("not up in time")
	}
	return Ready{}
}

// failure waits for the agent's error.
func (r *running) failure(t *testing.T) *problem.Error {
	t.Helper()
	select {
	case err := <-r.result:
		if err == nil {
			t.Fatal("the agent ended without an error")
		}
		return problem.From(err)
	case <-r.ready:
		t.Fatal("the agent is up")
	case <-time.After(time.Minute):
		t.Fatal("no end in time")
	}
	return nil
}

// hello asks the service through the agent's network stack.
func (r *running) hello(t *testing.T) string {
	t.Helper()
	transport := &http.Transport{DialContext: r.dialInside, DisableKeepAlives: true}
	client := &http.Client{Transport: transport, Timeout: 10 * time.Second}
	resp, err := client.Get("http://" + netip.AddrPortFrom(agenttest.Service, agenttest.ServicePort).String())
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(said)
}

// slowTokens gives tokens once something has come to be.
func slowTokens(ready func() bool) func(*http.Client) (TokenSource, error) {
	return func(*http.Client) (TokenSource, error) {
		return tokenFunc(func(ctx context.Context, audience string) (wire.Secret, error) {
			for deadline := time.Now().Add(40 * time.Second); !ready() && time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			}
			return goodToken(ctx, audience)
		}), nil
	}
}

// tunnelKnows reports whether these relays have answered.
func (r *running) tunnelKnows(names ...string) bool {
	r.mu.Lock()
	t := r.tunnel
	r.mu.Unlock()
	if t == nil {
		return false
	}
	got := nearest(t)
	return !slices.ContainsFunc(names, func(n string) bool { return !slices.Contains(got, n) })
}
