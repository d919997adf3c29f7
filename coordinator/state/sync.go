package state

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"
)

// syncEvery bounds how often the disk is asked to make safe what was written: what comes within that after a sync shares the next one.
const syncEvery = 10 * time.Millisecond

// sweepEvery is how often blocks are made safe that changed without anybody waiting for it: renewals and ends, and what NATS has rewritten without
// what was replaced in it. NATS would do so itself, but holds a lock of the stream until the disk has answered: joins stood still for 0.6 s.
const sweepEvery = 5 * time.Second

// syncer makes safe from loss of power what an embedded server has written to its files, on demand. NATS can do so after every write,
// or every few seconds; those whose joins are answered meanwhile would have lost their leases.
type syncer struct {
	dir  string // of the stream's blocks
	from int    // all blocks before this one are safe; run's

	mu   sync.Mutex
	next *round // that begins after what waits for it was written; nil where nobody waits
	kick chan struct{}
}

// round is one sync for all who wait for it.
type round struct {
	done chan struct{}
	err  error // set before done is closed
}

func newSyncer(storeDir string) *syncer {
	return &syncer{dir: filepath.Join(storeDir, "jetstream", "$G", "streams", streamName, "msgs"), kick: make(chan struct{}, 1)}
}

// begin gives the sync that makes safe all that was written before.
func (s *syncer) begin() *round {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next == nil {
		s.next = &round{done: make(chan struct{})}
		s.kick <- struct{}{} // has room: next was nil, so run has taken the last one
	}
	return s.next
}

// run syncs when somebody waits, until ctx ends.
func (s *syncer) run(ctx context.Context) {
	var last time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.kick:
		}
		if pause := syncEvery - time.Since(last); pause > 0 {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
		}
		last = time.Now()
		s.mu.Lock()
		r := s.next
		s.next = nil
		s.mu.Unlock()
		r.err = s.sync()
		close(r.done)
	}
}

// sync makes the stream's blocks safe from the one on that was the last when it did so before: messages are only ever added to the last one.
func (s *syncer) sync() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("list the state's files: %w", err)
	}
	last := 0
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".blk")
		if n, bad := strconv.Atoi(name); ok && bad == nil && n >= s.from {
			last = max(last, n)
			err = errors.Join(err, syncFile(filepath.Join(s.dir, e.Name())))
		}
	}
	if last == 0 {
		return errors.New("the state has no files to make safe")
	}
	if err == nil {
		s.from = last
	}
	return err
}

// sweep makes safe what has changed, every few seconds until ctx ends, beside run.
func (s *syncer) sweep(ctx context.Context, log *slog.Logger) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	safe := map[string]version{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := s.catchUp(safe); err != nil {
			log.Error("the state is not safe from a loss of power", "err", err)
		}
	}
}

// version is what tells that a file has changed.
type version struct {
	size int64
	mod  time.Time
}

// catchUp makes those blocks safe that are not as they were when that was done last, which safe remembers.
func (s *syncer) catchUp(safe map[string]version) error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("list the state's files: %w", err)
	}
	there := map[string]bool{}
	changed := false
	for _, e := range entries {
		info, gone := e.Info()
		if gone != nil || !strings.HasSuffix(e.Name(), ".blk") {
			continue
		}
		there[e.Name()] = true
		now := version{info.Size(), info.ModTime()} // before it is made safe: what is written meanwhile may not be
		if safe[e.Name()] == now {
			continue
		}
		changed = true
		failed := syncFile(filepath.Join(s.dir, e.Name()))
		if failed == nil {
			safe[e.Name()] = now
		}
		err = errors.Join(err, failed)
	}
	maps.DeleteFunc(safe, func(name string, _ version) bool { return !there[name] })
	if changed {
		err = errors.Join(err, syncDir(s.dir))
	}
	return err
}

// syncFile makes a file safe, unless it is gone.
func syncFile(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil // NATS dropped the block: nothing in it counts any more
	}
	if err != nil {
		return fmt.Errorf("open a file of the state: %w", err)
	}
	if err := f.Sync(); err != nil {
		_ = f.Close()
		return fmt.Errorf("make a file of the state safe: %w", err)
	}
	return f.Close()
}

// syncDir makes safe which files a folder has. Windows has no such thing.
func syncDir(name string) error {
	if runtime.GOOS == "windows" {
		return nil
	}
	d, err := os.Open(name)
	if err != nil {
		return fmt.Errorf("open the state's folder: %w", err)
	}
	if err := d.Sync(); err != nil {
		_ = d.Close()
		return fmt.Errorf("make the state's folder safe: %w", err)
	}
	return d.Close()
}

// Saving has all that this store has written so far outlive a loss of power; safe waits for that. With an existing cluster it has nothing to wait
// for: its servers see to that.
func (s *Store) Saving() (safe func(ctx context.Context) error) {
	if s.syncer == nil {
		return func(context.Context) error { return nil }
	}
	r := s.syncer.begin()
	return func(ctx context.Context) error {
		select {
		case <-r.done:
			if r.err != nil {
				return fmt.Errorf("make the state safe: %w", r.err)
			}
			return nil
		case <-ctx.Done():
			return fmt.Errorf("make the state safe: %w", ctx.Err())
		case <-s.life.Done(): // nobody syncs any more
			return fmt.Errorf("make the state safe: %w", context.Canceled)
		}
	}
}

// Safe returns once all that this store has written so far outlives a loss of power.
func (s *Store) Safe(ctx context.Context) error { return s.Saving()(ctx) }
