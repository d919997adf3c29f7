package state

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/nats-io/nats-server/v2/server"
)

// Limits of the embedded server. A lease takes about 1 KB on disk and 100 B of index in memory.
const (
	maxMemory    = 64 << 20  // bytes of streams in memory; we have none
	maxStore     = 1 << 30   // bytes of streams on disk
	syncInterval = time.Hour // of NATS, see sweepEvery
	startTimeout = 10 * time.Second
)

// embedded is a NATS server in this process. It listens on no port: only this process can connect.
type embedded struct {
	server *server.Server
	dir    string
	temp   bool // dir is removed in the end
	lock   *os.File
}

// storage is how much an embedded server may keep and how soon it is safe from a loss of power.
type storage struct {
	name  string // of the server
	limit int64  // bytes on disk
	sync  bool   // sync every write before it is acknowledged; else every few seconds
}

// startEmbedded starts a server that keeps its files in dir, which no other process may use at the same time.
func startEmbedded(dir string, how storage, log *slog.Logger) (*embedded, error) {
	e := &embedded{dir: dir}
	if err := e.prepare(); err != nil {
		return nil, errors.Join(err, e.stop())
	}
	bridge := &serverLog{log: log}
	srv, err := server.NewServer(&server.Options{
		ServerName:         how.name,
		DontListen:         true,
		NoSigs:             true,
		NoLog:              true,
		JetStream:          true,
		StoreDir:           e.dir,
		JetStreamMaxMemory: maxMemory,
		JetStreamMaxStore:  how.limit,
		SyncInterval:       syncInterval,
		SyncAlways:         how.sync,
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make the embedded nats server: %w", err), e.stop())
	}
	e.server = srv
	srv.SetLoggerV2(bridge, false, false, false)
	srv.Start()
	if !srv.ReadyForConnections(startTimeout) || !srv.JetStreamEnabled() {
		err := fmt.Errorf("the embedded nats server does not start: %s", bridge.reason())
		return nil, errors.Join(err, e.stop())
	}
	return e, nil
}

// prepare makes the directory and locks it.
func (e *embedded) prepare() (err error) {
	if e.dir == "" {
		e.temp = true
		if e.dir, err = os.MkdirTemp("", "culvert-state-"); err != nil {
			return fmt.Errorf("make a temporary state directory: %w", err)
		}
	}
	if err := os.MkdirAll(e.dir, 0o700); err != nil {
		return problem.Wrap(err, problem.BadConfig, fmt.Sprintf("the state directory cannot be made: %v", err),
			"give state.dir a path that this program may write to")
	}
	f, err := os.OpenFile(filepath.Join(e.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return problem.Wrap(err, problem.BadConfig, fmt.Sprintf("the state directory %s cannot be written: %v", e.dir, err),
			"give state.dir a path that this program may write to")
	}
	if err := lockFile(f); err != nil {
		_ = f.Close()
		return problem.Wrap(err, problem.BadConfig, fmt.Sprintf("another process uses the state directory %s", e.dir),
			"stop the other coordinator, or give each its own state.dir")
	}
	e.lock = f
	return nil
}

// stop ends the server and waits, and gives up the directory.
func (e *embedded) stop() error {
	if e.server != nil {
		e.server.Shutdown()
		e.server.WaitForShutdown()
	}
	var err error
	if e.lock != nil {
		err = e.lock.Close() // gives up the lock as well
		e.lock = nil
	}
	if e.temp && e.dir != "" {
		err = errors.Join(err, os.RemoveAll(e.dir))
	}
	if err != nil {
		return fmt.Errorf("give up the state directory: %w", err)
	}
	return nil
}

// serverLog hands the server's warnings and errors to slog and remembers the last error.
type serverLog struct {
	log  *slog.Logger
	last atomic.Pointer[string]
}

func (l *serverLog) reason() string {
	if s := l.last.Load(); s != nil {
		return *s
	}
	return "it gave no reason"
}

func (l *serverLog) failed(format string, v []any) {
	s := fmt.Sprintf(format, v...)
	l.last.Store(&s)
	l.log.Error("embedded nats server", "err", s)
}

// Noticef drops what the server tells about itself when all is well.
func (l *serverLog) Noticef(string, ...any) {}

// Debugf drops.
func (l *serverLog) Debugf(string, ...any) {}

// Tracef drops.
func (l *serverLog) Tracef(string, ...any) {}

// Warnf logs a warning, unless it is about a directory that is temporary by intent.
func (l *serverLog) Warnf(format string, v ...any) {
	if strings.HasPrefix(format, "Temporary storage directory") {
		return
	}
	l.log.Warn("embedded nats server", "err", fmt.Sprintf(format, v...))
}

// Errorf logs an error.
func (l *serverLog) Errorf(format string, v ...any) { l.failed(format, v) }

// Fatalf logs an error; that the server is unusable shows when it is asked whether it is ready.
func (l *serverLog) Fatalf(format string, v ...any) { l.failed(format, v) }
