package audit

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/coordinator/state"
)

// crashDirEnv makes the test binary the child of TestKilledProcessLosesNothing.
const crashDirEnv = "CULVERT_TEST_AUDIT_CRASH_DIR"

func childDir() string { return os.Getenv(crashDirEnv) }

func logOptions(dir string) state.LogOptions {
	return state.LogOptions{Options: state.Options{Dir: dir, Logger: slog.New(slog.DiscardHandler)}, MaxAge: time.Hour, MaxBytes: 64 << 20}
}

func openStore(t testing.TB, opts state.LogOptions) *state.Log {
	t.Helper()
	s, err := state.OpenLog(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// crashChild stores records in dir from several goroutines and prints each once it is acknowledged, until it is killed.
func crashChild(dir string) {
	fail := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	ctx := context.Background()
	store, err := state.OpenLog(ctx, logOptions(dir))
	fail(err)
	l, err := Open(ctx, Options{Store: store, Key: testKey, Node: "child"})
	fail(err)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				n := w*1_000_000 + i
				fail(l.Record(ctx, joined(n)))
				mu.Lock()
				fmt.Printf("s%d\n", n)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
}

// TestKilledProcessLosesNothing kills a writer three times over on the same log: every record that was acknowledged is
// there afterwards, and the chain is whole.
func TestKilledProcessLosesNothing(t *testing.T) {
	dir := t.TempDir()
	acknowledged := map[string]bool{}
	for range 3 {
		crash(t, dir, acknowledged)
	}
	store := openStore(t, logOptions(dir))
	rep := sound(t, store)
	var all bytes.Buffer
	r := Reader{Store: store, Keys: []ed25519.PublicKey{publicKey}}
	if err := r.Tail(t.Context(), Filter{}, 0, false, func(line []byte) bool { all.Write(append(line, '\n')); return true }); err != nil {
		t.Fatal(err)
	}
	for id := range acknowledged {
		if strings.Count(all.String(), `"uid":"`+id+`"`) == 0 {
			t.Errorf("the record of %s was acknowledged and is gone", id)
		}
	}
	if int(rep.Records) < len(acknowledged) {
		t.Errorf("%d records of %d", rep.Records, len(acknowledged))
	}
}

func crash(t *testing.T, dir string, acknowledged map[string]bool) {
	t.Helper()
	child := exec.CommandContext(t.Context(), os.Args[0]) //nolint:gosec // this test binary
	child.Env = append(os.Environ(), crashDirEnv+"="+dir)
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	for count := 0; ; {
		text, err := lines.ReadString('\n')
		if err != nil { // the pipe ends with the child, within a line perhaps
			break
		}
		id := strings.TrimSpace(text)
		if acknowledged[id] { // numbers begin anew with each child
			id += "again"
		}
		acknowledged[strings.TrimSuffix(id, "again")] = true
		if count++; count == 100 {
			if err := child.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = child.Wait()
	if len(acknowledged) < 100 {
		t.Fatalf("the child ended by itself after %d records", len(acknowledged))
	}
}

// TestOnJetStream: the chain on a real store, from writing through a restart to an export that verifies.
func TestOnJetStream(t *testing.T) {
	dir := t.TempDir()
	for i := range 2 {
		store, err := state.OpenLog(t.Context(), logOptions(dir))
		if err != nil {
			t.Fatal(err)
		}
		l := open(t, store)
		record(t, l, i*5, i*5+5)
		shut(t, l)
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
	}
	store := openStore(t, logOptions(dir))
	if rep := sound(t, store); rep.Records != 10 {
		t.Errorf("%+v", rep)
	}
	var b bytes.Buffer
	r := Reader{Store: store, Key: testKey, Keys: []ed25519.PublicKey{publicKey}}
	if err := r.Export(t.Context(), &b, time.Time{}, time.Time{}); err != nil {
		t.Fatal(err)
	}
	rep, err := VerifyExport(&b, publicKey)
	if err != nil || !rep.OK() || rep.Records != 10 {
		t.Errorf("%+v, %v", rep, err)
	}
}

// TestNodesOnOneStore: two nodes write through the connection that they have to one NATS server.
func TestNodesOnOneStore(t *testing.T) { rivals(t, openStore(t, logOptions(t.TempDir())), 2, 25) }

// BenchmarkRecord is what storing a record costs when many are stored at once.
func BenchmarkRecord(b *testing.B) {
	for _, writers := range []int{1, 64, 512} {
		b.Run(fmt.Sprint("writers=", writers), func(b *testing.B) {
			store := openStore(b, logOptions(b.TempDir()))
			l := open(b, store)
			b.SetParallelism(writers)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := l.Record(b.Context(), joined(1)); err != nil {
						b.Error(err)
					}
				}
			})
			b.StopTimer()
			shut(b, l)
		})
	}
}
