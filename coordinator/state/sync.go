package state

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// syncEvery bounds how often the disk is asked to make safe what was written: what comes within that after a sync shares the next one.
const syncEvery = 10 * time.Millisecond

// syncer makes safe from loss of power what an embedded server has written to its files, on demand. NATS can do so after every write, of which a
// join needs three, or every few seconds; those whose joins are answered meanwhile would have lost their leases.
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

// wait returns once all that was written before is on the disk.
func (s *syncer) wait(ctx context.Context) error {
	s.mu.Lock()
	r := s.next
	if r == nil {
		r = &round{done: make(chan struct{})}
		s.next = r
		s.kick <- struct{}{} // has room: next was nil, so run has taken the last one
	}
	s.mu.Unlock()
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		return ctx.Err()
	}
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

// Safe returns once all that this store has written so far outlives a loss of power: at once with an existing cluster, where its
// servers see to that.
func (s *Store) Safe(ctx context.Context) error {
	if s.syncer == nil {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(s.life, cancel) // nobody syncs any more
	defer stop()
	if err := s.syncer.wait(ctx); err != nil {
		return fmt.Errorf("make the state safe: %w", err)
	}
	return nil
}
