package state

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// TestSafe: what a store has written is in the files that are made safe, by however many at once, and a store that is closed makes nobody wait.
func TestSafe(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Options{Dir: dir})
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			_, err := s.CreateLease(t.Context(), testLease(fmt.Sprint("s", i), time.Now()), testPool)
			if err := errors.Join(err, s.Safe(t.Context())); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	blocks, err := filepath.Glob(filepath.Join(s.syncer.dir, "*.blk"))
	if err != nil || len(blocks) == 0 {
		t.Fatalf("nats keeps its blocks elsewhere: %v, %v", blocks, err)
	}
	late, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Safe(late); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that has gone: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Safe(t.Context()); err == nil {
		t.Error("a closed store makes safe")
	}
}

// TestSyncGoesOnFromTheLastBlock: numbers are numbers, what was safe already is left alone, and what fails is tried again. None at all is an error.
func TestSyncGoesOnFromTheLastBlock(t *testing.T) {
	s := &syncer{dir: t.TempDir()}
	if s.sync() == nil {
		t.Error("nothing is safe")
	}
	for _, name := range []string{"8.blk", "9.blk", "10.blk", "index.db", "x.blk"} {
		if err := os.WriteFile(filepath.Join(s.dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.sync(); err != nil || s.from != 10 {
		t.Errorf("goes on from %d: %v", s.from, err)
	}
	broken := func(name string) { // a folder cannot be opened for writing
		t.Helper()
		if err := errors.Join(os.RemoveAll(filepath.Join(s.dir, name)), os.Mkdir(filepath.Join(s.dir, name), 0o700)); err != nil {
			t.Fatal(err)
		}
	}
	broken("9.blk")
	if err := s.sync(); err != nil {
		t.Errorf("a block that was safe is looked at again: %v", err)
	}
	broken("11.blk")
	if s.sync() == nil || s.from != 10 {
		t.Errorf("goes on from %d behind a block that is not safe", s.from)
	}
	if err := syncFile(filepath.Join(s.dir, "12.blk")); err != nil {
		t.Errorf("a block that is gone: %v", err)
	}
}

// TestSweep: a block that has changed is made safe again, also one behind which the stream has gone on, and no other.
func TestSweep(t *testing.T) {
	s := &syncer{dir: t.TempDir()}
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(s.dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	first := write("1.blk", "a")
	write("2.blk", "b")
	write("index.db", "c")
	safe := map[string]version{}
	if err := s.catchUp(safe); err != nil || len(safe) != 2 {
		t.Fatalf("made safe %v: %v", safe, err)
	}
	before := safe["1.blk"]
	if err := os.Rename(write("1.new", "rewritten"), first); err != nil {
		t.Fatal(err)
	}
	if err := s.catchUp(safe); err != nil || safe["1.blk"] == before || safe["1.blk"].size != 9 {
		t.Errorf("a rewritten block: %v, %v", safe, err)
	}
	if err := errors.Join(os.Remove(first), os.Mkdir(first, 0o700)); err != nil { // cannot be opened for writing
		t.Fatal(err)
	}
	was := safe["1.blk"]
	if s.catchUp(safe) == nil || safe["1.blk"] != was {
		t.Error("what is not safe counts as safe")
	}
	if err := errors.Join(os.Remove(first), s.catchUp(safe)); err != nil || len(safe) != 1 {
		t.Errorf("without the first: %v, %v", safe, err)
	}
}
