package state

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
	"github.com/nats-io/nats-server/v2/server"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		crashChild(dir)
	}
	goleak.VerifyTestMain(m)
}

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// clock is turned by hand.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func newClock() *clock { return &clock{t: time.Now().UTC().Round(0)} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) turn(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

func open(tb testing.TB, opts Options) *Store {
	tb.Helper()
	opts.Logger = quiet
	s, err := Open(tb.Context(), opts)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// natsServer is a NATS server that listens on loopback, as an operator's would.
func natsServer(tb testing.TB) *server.Server {
	tb.Helper()
	srv, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true, JetStream: true, StoreDir: tb.TempDir(),
		JetStreamMaxMemory: maxMemory, JetStreamMaxStore: maxStore,
	})
	if err != nil {
		tb.Fatal(err)
	}
	srv.Start()
	tb.Cleanup(func() {
		srv.Shutdown()
		srv.WaitForShutdown()
	})
	if !srv.ReadyForConnections(10 * time.Second) {
		tb.Fatal("the nats server does not start")
	}
	return srv
}

// eventually waits for what another goroutine of the process brings about.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(time.Minute); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			tb.Fatalf("waited in vain: %s", what)
		}
	}
}

var testPool = Pool{V4: netip.MustParsePrefix("198.18.0.0/16"), V6: netip.MustParsePrefix("fd63:756c:7665:7274::/96")}

// testLease is a full lease for ten minutes from now.
func testLease(session string, now time.Time) Lease {
	return Lease{
		Session:    session,
		Network:    "corp",
		Key:        wire.Key{1, 2, 3},
		SecretHash: []byte{9, 8, 7},
		Rules:      []string{"deploy"},
		Claims:     map[string]string{"repository": "acme/shop", "run_id": "42"},
		Issued:     now.Add(-time.Second),
		Created:    now,
		Expires:    now.Add(10 * time.Minute),
		Ends:       now.Add(2 * time.Hour),
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestOptionsAreChecked(t *testing.T) {
	for name, opts := range map[string]Options{
		"dir and nats":             {Dir: "x", NATS: []string{"nats://n1:4222"}},
		"credentials without nats": {Credentials: "x"},
		"url":                      {NATS: []string{"nats://user:hunter2@[::bad"}},
		"no host":                  {NATS: []string{"n1"}},
		"credentials away":         {NATS: []string{"nats://127.0.0.1:1"}, Credentials: "/nonexistent"},
		"dir is a file":            {Dir: os.Args[0]},
	} {
		t.Run(name, func(t *testing.T) {
			opts.Logger = quiet
			_, err := Open(t.Context(), opts)
			if problem.CodeOf(err) != problem.BadConfig || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestNoServerAnswers(t *testing.T) {
	_, err := Open(t.Context(), Options{NATS: []string{"nats://user:hunter2@127.0.0.1:1"}, Logger: quiet})
	if problem.CodeOf(err) != problem.Unreachable || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("got %v", err)
	}
}

func TestDirectoryIsLocked(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "when", "missing")
	first := open(t, Options{Dir: dir})
	_, err := Open(t.Context(), Options{Dir: dir, Logger: quiet})
	if problem.CodeOf(err) != problem.BadConfig || !strings.Contains(err.Error(), "another process uses the state directory "+dir) {
		t.Errorf("a second store on one directory: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, Options{Dir: dir})
}

func TestTemporaryDirectoryGoes(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	s := open(t, Options{})
	if _, err := os.Stat(s.embedded.dir); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(os.Getenv("TMPDIR") + "/*"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestReady(t *testing.T) {
	s := open(t, Options{})
	if err := s.Ready(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Ready(t.Context()); err == nil {
		t.Error("ready though closed")
	}
	if _, err := s.Serve("gw", nil); err == nil {
		t.Error("serves though closed")
	}
}

func TestOpenGivesUpWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, Options{Logger: quiet}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestToken(t *testing.T) {
	seen := map[string]string{}
	for _, s := range []string{"", "=", "corp", "a.b", "a=2Eb", "a b", "*", ">", "ä", "A-Z_09", "a\x00"} {
		got := token(s)
		if other, ok := seen[got]; ok {
			t.Errorf("%q and %q both give %q", s, other, got)
		}
		seen[got] = s
		if strings.ContainsAny(got, ".*> \x00") || got == "" {
			t.Errorf("%q gives %q, which is not one token", s, got)
		}
	}
}

func BenchmarkLease(b *testing.B) {
	s := open(b, Options{Dir: b.TempDir()})
	l := must(s.CreateLease(b.Context(), testLease("s1", time.Now()), testPool))
	b.Run("read", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			must(s.Lease(b.Context(), "s1"))
		}
	})
	b.Run("renew", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			l.Expires = l.Expires.Add(time.Second)
			l = must(s.UpdateLease(b.Context(), l))
		}
	})
	b.Run("create and end", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			must(s.CreateLease(b.Context(), testLease("s2", time.Now()), testPool))
			if err := s.EndLease(b.Context(), "s2"); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkAsk(b *testing.B) {
	s := open(b, Options{})
	defer must(s.Serve("gw", func(_ context.Context, msg []byte) []byte { return msg }))()
	msg := make([]byte, 4<<10)
	b.ReportAllocs()
	for b.Loop() {
		must(s.Ask(b.Context(), "gw", msg))
	}
}

func BenchmarkOpen(b *testing.B) {
	for b.Loop() {
		if err := must(Open(b.Context(), Options{Logger: quiet})).Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCreateLease(b *testing.B) {
	for _, writers := range []int{1, 16} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			s := open(b, Options{Dir: b.TempDir()})
			pool := Pool{V4: netip.MustParsePrefix("10.0.0.0/8"), V6: testPool.V6}
			var n int
			var mu sync.Mutex
			next := func() string {
				mu.Lock()
				defer mu.Unlock()
				n++
				return wire.Key{byte(n), byte(n >> 8), byte(n >> 16)}.SessionID()
			}
			b.SetParallelism(max(writers/2, 1))
			b.ReportAllocs()
			b.ResetTimer()
			run := func() {
				if _, err := s.CreateLease(context.Background(), testLease(next(), time.Now()), pool); err != nil {
					b.Error(err)
				}
			}
			if writers == 1 {
				for range b.N {
					run()
				}
			} else {
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						run()
					}
				})
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "leases/s")
		})
	}
}
