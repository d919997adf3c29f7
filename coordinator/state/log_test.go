package state

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/culvertnet/culvert/internal/problem"
)

func openLog(tb testing.TB, opts LogOptions) *Log {
	tb.Helper()
	opts.Logger = quiet
	if opts.MaxBytes == 0 {
		opts.MaxBytes = 64 << 20
	}
	l, err := OpenLog(tb.Context(), opts)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := l.Close(); err != nil {
			tb.Error(err)
		}
	})
	return l
}

func contents(tb testing.TB, l *Log, from uint64) (out []string) {
	tb.Helper()
	if err := l.Read(tb.Context(), from, false, func(m Message) bool {
		out = append(out, fmt.Sprint(m.Sequence, string(m.Data)))
		return true
	}); err != nil {
		tb.Fatal(err)
	}
	return out
}

func TestLogAppends(t *testing.T) {
	l := openLog(t, LogOptions{})
	if got := contents(t, l, 1); len(got) != 0 {
		t.Errorf("an empty log holds %q", got)
	}
	for i, s := range []string{"a", "b", "c"} {
		if seq := must(l.Append(t.Context(), []byte(s), uint64(i))); seq != uint64(i+1) {
			t.Errorf("%s became message %d", s, seq)
		}
	}
	if _, err := l.Append(t.Context(), []byte("x"), 2); !errors.Is(err, ErrConflict) {
		t.Errorf("appended where something stands: %v", err)
	}
	if _, err := l.Append(t.Context(), []byte("x"), 4); !errors.Is(err, ErrConflict) {
		t.Errorf("appended with a gap: %v", err)
	}
	if got := contents(t, l, 2); fmt.Sprint(got) != "[2b 3c]" {
		t.Errorf("read %q", got)
	}
	if got := contents(t, l, 9); len(got) != 0 {
		t.Errorf("beyond its end the log holds %q", got)
	}
	if got := must(l.Get(t.Context(), 3)); string(got) != "c" {
		t.Errorf("got %q", got)
	}
	if _, err := l.Get(t.Context(), 4); !errors.Is(err, ErrNotFound) {
		t.Errorf("got something: %v", err)
	}
	if info := must(l.Info(t.Context())); info.First != 1 || info.Last != 3 || info.Messages != 3 || info.Bytes == 0 {
		t.Errorf("%+v", info)
	}
}

// TestLogIsAppendOnly: no API of NATS changes, deletes or purges what is in it, or makes the stream such that it could.
func TestLogIsAppendOnly(t *testing.T) {
	l := openLog(t, LogOptions{})
	must(l.Append(t.Context(), []byte("a"), 0))
	if err := l.stream.DeleteMsg(t.Context(), 1); err == nil {
		t.Error("deleted")
	}
	if err := l.stream.SecureDeleteMsg(t.Context(), 1); err == nil {
		t.Error("erased")
	}
	if err := l.stream.Purge(t.Context()); err == nil {
		t.Error("purged")
	}
	config := l.stream.CachedInfo().Config
	for name, edit := range map[string]func(c *jetstream.StreamConfig){
		"delete": func(c *jetstream.StreamConfig) { c.DenyDelete = false },
		"purge":  func(c *jetstream.StreamConfig) { c.DenyPurge = false },
	} {
		loose := config
		edit(&loose)
		if _, err := l.js.UpdateStream(t.Context(), loose); err == nil {
			t.Errorf("the stream now allows %s", name)
		}
	}
	if got := contents(t, l, 1); fmt.Sprint(got) != "[1a]" {
		t.Errorf("read %q", got)
	}
}

func TestLogRetention(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, LogOptions{Options: Options{Dir: dir}, MaxBytes: 1 << 20, MaxAge: time.Hour})
	for i := range uint64(200) {
		must(l.Append(t.Context(), bytes.Repeat([]byte{byte(i)}, 10_000), i))
	}
	info := must(l.Info(t.Context()))
	if info.First < 90 || info.Last != 200 || info.Bytes > 1<<20 || info.MaxAge != time.Hour || info.MaxBytes != 1<<20 {
		t.Errorf("%+v", info)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = openLog(t, LogOptions{Options: Options{Dir: dir}, MaxBytes: 8 << 20, MaxAge: 2 * time.Hour})
	if info := must(l.Info(t.Context())); info.Last != 200 || info.MaxAge != 2*time.Hour || info.MaxBytes != 8<<20 {
		t.Errorf("changed limits: %+v", info)
	}
}

func TestLogSeedAndMark(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, LogOptions{Options: Options{Dir: dir}})
	seed := must(l.Seed(t.Context(), false))
	if len(seed) != 32 || !bytes.Equal(seed, must(l.Seed(t.Context(), false))) {
		t.Error("the seed changes")
	}
	if data, revision, err := l.Mark(t.Context()); data != nil || revision != 0 || err != nil {
		t.Errorf("a mark before there is one: %q %d %v", data, revision, err)
	}
	for i := range uint64(3) {
		if err := l.SetMark(t.Context(), fmt.Append(nil, i), i); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.SetMark(t.Context(), nil, 1); !errors.Is(err, ErrConflict) {
		t.Errorf("an old revision: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = openLog(t, LogOptions{Options: Options{Dir: dir}, ReadOnly: true})
	if !bytes.Equal(seed, must(l.Seed(t.Context(), true))) {
		t.Error("the seed is another one after a restart")
	}
	if data, revision, err := l.Mark(t.Context()); string(data) != "2" || revision != 3 || err != nil {
		t.Errorf("after a restart: %q %d %v", data, revision, err)
	}
}

func TestLogReadOnly(t *testing.T) {
	if _, err := OpenLog(t.Context(), LogOptions{Options: Options{Dir: t.TempDir(), Logger: quiet}, ReadOnly: true}); !errors.Is(err, ErrNotFound) {
		t.Errorf("a log that nobody made: %v", err)
	}
	dir := t.TempDir()
	_ = openLog(t, LogOptions{Options: Options{Dir: dir}})
	_, err := OpenLog(t.Context(), LogOptions{Options: Options{Dir: dir, Logger: quiet}, ReadOnly: true})
	if problem.CodeOf(err) != problem.BadConfig {
		t.Errorf("a log that another process holds: %v", err)
	}
	if _, err := OpenLog(t.Context(), LogOptions{Options: Options{Dir: t.TempDir()}}); err == nil {
		t.Error("a log without room was opened")
	}
}

// TestLogOnACluster: two nodes' connections to somebody else's server; one follows what the other appends.
func TestLogOnACluster(t *testing.T) {
	url := natsServer(t).ClientURL()
	a := openLog(t, LogOptions{Options: Options{NATS: []string{url}}})
	b := openLog(t, LogOptions{Options: Options{NATS: []string{url}}})
	if !bytes.Equal(must(a.Seed(t.Context(), false)), must(b.Seed(t.Context(), false))) {
		t.Error("two nodes have two seeds")
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	got := make(chan string, 10)
	wg.Go(func() {
		if err := b.Read(ctx, 1, true, func(m Message) bool { got <- string(m.Data); return true }); err != nil {
			t.Error(err)
		}
	})
	for i := range uint64(3) {
		must(a.Append(t.Context(), fmt.Append(nil, i), i))
		if s := <-got; s != fmt.Sprint(i) {
			t.Errorf("got %q", s)
		}
	}
	cancel()
	wg.Wait()
	_, err := OpenLog(t.Context(), LogOptions{Options: Options{NATS: []string{url}, Logger: quiet}, MaxBytes: 1 << 50})
	if problem.CodeOf(err) != problem.BadConfig {
		t.Errorf("a log larger than the server's storage: %v", err)
	}
	if _, err := b.Append(t.Context(), nil, 0); !errors.Is(err, ErrConflict) {
		t.Errorf("appended where something stands: %v", err)
	}
}

// TestLogSurvivesItsNeighbour: leases and log of one directory are two servers, each with a lock of its own.
func TestLogSurvivesItsNeighbour(t *testing.T) {
	dir := t.TempDir()
	s, l := open(t, Options{Dir: dir}), openLog(t, LogOptions{Options: Options{Dir: dir}})
	must(s.CreateLease(t.Context(), testLease("s1", time.Now()), testPool))
	must(l.Append(t.Context(), []byte("a"), 0))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	must(l.Append(t.Context(), []byte("b"), 1))
}

// TestRestOfTheLog: what a consumer's server has not got is read from the leader, and looks the same.
func TestRestOfTheLog(t *testing.T) {
	l := openLog(t, LogOptions{})
	for i := range uint64(5) {
		must(l.Append(t.Context(), fmt.Append(nil, "message ", i+1), i))
	}
	read := func(how func(yield func(Message) bool) error) (out []Message) {
		if err := how(func(m Message) bool { out = append(out, m); return true }); err != nil {
			t.Fatal(err)
		}
		return out
	}
	all := read(func(yield func(Message) bool) error { return l.Read(t.Context(), 2, false, yield) })
	rest := read(func(yield func(Message) bool) error { return l.rest(t.Context(), 2, 7, lastAgain, yield) })
	if len(all) != 4 || len(rest) != 4 {
		t.Fatalf("%d messages, %d from the leader", len(all), len(rest))
	}
	for i := range all {
		if all[i].Sequence != rest[i].Sequence || !all[i].Time.Equal(rest[i].Time) || string(all[i].Data) != string(rest[i].Data) {
			t.Errorf("%+v, from the leader %+v", all[i], rest[i])
		}
	}
	few := 0
	if err := l.rest(t.Context(), 1, 5, 0, func(Message) bool { few++; return few < 2 }); err != nil || few != 2 {
		t.Errorf("%d messages where two were enough, %v", few, err)
	}
}
