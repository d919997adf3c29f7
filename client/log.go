package main

import (
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
)

// Bounds of the log kept in memory.
const (
	ringLines = 200
	ringLine  = 1024 // bytes of one line; the rest is cut off
)

// ring keeps the last lines of the log for `culvert status --json`, and passes lines on while somebody listens.
type ring struct {
	level slog.Level

	mu     sync.Mutex
	lines  []string
	stderr io.Writer // nil once quiet
	file   *os.File  // nil without --log-file
}

func newRing(stderr io.Writer, level slog.Level) *ring { return &ring{stderr: stderr, level: level} }

// handler logs everything from info up to memory and file, and what the level says to standard error.
func (r *ring) handler() slog.Handler {
	level := min(r.level, slog.LevelInfo)
	kept := slog.NewTextHandler(writerFunc(r.keep), &slog.HandlerOptions{Level: level})
	shown := slog.NewTextHandler(writerFunc(r.show), &slog.HandlerOptions{Level: r.level})
	return slog.NewMultiHandler(kept, shown)
}

// keep takes one line for memory and file.
func (r *ring) keep(line []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	text := strings.TrimRight(string(line[:min(len(line), ringLine)]), "\n")
	if len(r.lines) == ringLines {
		r.lines = append(r.lines[:0], r.lines[1:]...)
	}
	r.lines = append(r.lines, text)
	if r.file != nil {
		_, _ = r.file.Write(line) // a full disk must not stop a tunnel
	}
	return len(line), nil
}

// show takes one line for standard error.
func (r *ring) show(line []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stderr != nil {
		_, _ = r.stderr.Write(line)
	}
	return len(line), nil
}

// quiet ends the lines on standard error.
func (r *ring) quiet() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stderr = nil
}

// Lines gives the last lines, oldest first.
func (r *ring) Lines() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.lines...)
}

// Close closes the log file.
func (r *ring) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.file != nil {
		_ = r.file.Close()
		r.file = nil
	}
}

type writerFunc func([]byte) (int, error)

// Write calls the function.
func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
