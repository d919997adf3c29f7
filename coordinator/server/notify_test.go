package server

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"
)

// TestSystemdIsTold: ready once everything is served, alive as long as it is, stopping when it is not.
func TestSystemdIsTold(t *testing.T) {
	name := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", name)
	t.Setenv("WATCHDOG_USEC", "100000")
	r := newRig(t, Options{})
	r.stop()
	s, err := New(Options{Config: loadOr(t, r.file)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, time.Minute) }()
	heard := func(want string) {
		t.Helper()
		buf := make([]byte, 100)
		for {
			_ = conn.SetReadDeadline(time.Now().Add(time.Minute))
			n, err := conn.Read(buf)
			if err != nil {
				t.Fatalf("waiting for %s: %v", want, err)
			}
			if string(buf[:n]) == want {
				return
			}
		}
	}
	heard("READY=1")
	heard("WATCHDOG=1")
	cancel()
	heard("STOPPING=1")
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestDraining: while a coordinator drains it says that it is not ready, and joins are served.
func TestDraining(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway()
	status := func(path string) int {
		resp, err := r.client.Get(r.url() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		return resp.StatusCode
	}
	if got := status("/readyz"); got != http.StatusOK {
		t.Fatalf("before: %d", got)
	}
	r.server.opts.Drain = time.Millisecond
	if err := r.server.drain(); err != nil {
		t.Fatal(err)
	}
	if got := status("/readyz"); got != http.StatusServiceUnavailable {
		t.Errorf("ready: %d", got)
	}
	if got := status("/healthz"); got != http.StatusOK {
		t.Errorf("healthy: %d", got)
	}
	r.job().mustJoin()
}
