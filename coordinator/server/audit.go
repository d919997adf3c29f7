package server

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/problem"
)

// closeAudit bounds how long records may take that are still to be stored when the coordinator ends.
const closeAudit = 5 * time.Second

// openAudit opens the audit log. Nothing is decided without it.
func (s *Server) openAudit(ctx context.Context) (err error) {
	c, a := s.config.State, s.config.Audit
	s.auditStore, err = state.OpenLog(ctx, state.LogOptions{
		Options: state.Options{Dir: c.Dir, NATS: c.NATS, Credentials: c.Credentials, Elections: c.Elections, Logger: s.log}, MaxAge: a.Keep, MaxBytes: a.MaxSize,
	})
	if err != nil && problem.CodeOf(err) == problem.Failed {
		err = problem.Wrap(err, problem.Failed, fmt.Sprintf("cannot open the audit log: %v", err), "check that the folder is writable and that the disk has room")
	}
	if err != nil {
		return err
	}
	to, err := s.auditCopy(a.Copy)
	if err != nil {
		return err
	}
	return state.Patiently(ctx, s.log, func() error {
		key, former, err := audit.Keys(ctx, s.auditStore, a.KeyFile, a.FormerKeys, false)
		if err != nil {
			return err
		}
		s.audit, err = audit.Open(ctx, audit.Options{
			Store: s.auditStore, Key: key, Former: former, Node: nodeName(), Rivals: len(s.config.State.NATS) > 0, Copy: to, Logger: s.log, Metrics: s.metrics.audit,
		})
		return err
	})
}

// auditCopy opens where records go besides the log.
func (s *Server) auditCopy(to string) (io.Writer, error) {
	switch to {
	case config.AuditOff:
		return nil, nil
	case config.AuditStdout:
		if s.opts.Stdout == nil {
			return nil, nil
		}
		return s.opts.Stdout, nil
	}
	f, err := openCopy(to)
	if err != nil {
		return nil, problem.Wrap(err, problem.BadConfig, "the audit log's copy cannot be written: "+err.Error(), "give audit.log a file in a folder that exists")
	}
	s.auditFile = f
	return f, nil
}

// copyFile is a file that whoever rotates logs may move away: a hangup opens it anew.
type copyFile struct {
	name string
	mu   sync.Mutex
	f    *os.File
}

func openCopy(name string) (*copyFile, error) {
	f, err := os.OpenFile(name, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	return &copyFile{name: name, f: f}, nil
}

// Write appends.
func (c *copyFile) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.f.Write(p)
}

// reopen opens the file anew; where that fails the old one stays.
func (c *copyFile) reopen() error {
	next, err := openCopy(c.name)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.f
	c.f = next.f
	return old.Close()
}

// Close closes the file.
func (c *copyFile) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.f.Close()
}

// nodeName tells nodes apart in the log: the host's name and a random word for this process.
func nodeName() string {
	host, err := os.Hostname()
	if err != nil || host == "" {
		host = "node"
	}
	return fmt.Sprintf("%.60s/%.6s", host, rand.Text())
}

// recordStart puts this node's start on record, and what it begins with.
func (s *Server) recordStart(ctx context.Context) error {
	r := audit.Record{Event: audit.Started, Message: "this coordinator serves " + s.config.URL}
	r.Succeeded()
	u := &r.Unmapped
	u.Keep, u.MaxSize, u.Key = s.config.Audit.Keep.String(), s.config.Audit.MaxSize, audit.PublicKey(s.audit.PublicKey())
	u.Program = fmt.Sprintf("%s %s/%s %s", s.opts.Version, runtime.GOOS, runtime.GOARCH, runtime.Version())
	for _, r := range []audit.Record{r, policyRecord(nil, s.config)} {
		if err := state.Patiently(ctx, s.log, func() error { return s.audit.Record(ctx, r) }); err != nil {
			return err
		}
		s.started = true
	}
	return nil
}

// recordPolicy puts a changed policy on record before it is in force. That the log is away does not keep a rule alive that
// somebody took out.
func (s *Server) recordPolicy(ctx context.Context, r audit.Record) {
	if err := s.audit.Record(ctx, r); err != nil {
		s.audit.Note(r)
	}
}

// reopenCopy opens the copy's file anew, for whoever rotates it.
func (s *Server) reopenCopy() {
	if s.auditFile == nil {
		return
	}
	if err := s.auditFile.reopen(); err != nil {
		s.log.Error("the audit log's copy goes on in the old file", "err", err)
	}
}

// closeLog ends the audit log, the last thing that the server does.
func (s *Server) closeLog() error {
	var errs []error
	if s.audit != nil {
		if s.started {
			r := audit.Record{Event: audit.Stopped}
			r.Succeeded()
			s.audit.Note(r)
		}
		ctx, cancel := context.WithTimeout(context.Background(), closeAudit)
		defer cancel()
		errs = append(errs, s.audit.Close(ctx))
	}
	if s.auditStore != nil {
		errs = append(errs, s.auditStore.Close())
	}
	if s.auditFile != nil {
		errs = append(errs, s.auditFile.Close())
	}
	return errors.Join(errs...)
}
