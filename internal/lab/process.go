//go:build unix

package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// UnprivilegedID is the user and group that unprivileged programs run as.
const UnprivilegedID = 65532

// Program is a real program to run on a host.
type Program struct {
	Path         string
	Args         []string
	Env          []string // the whole environment; nil gives it this process's
	Dir          string
	Stdin        io.Reader
	Stdout       io.Writer
	Stderr       io.Writer
	Unprivileged bool // run as [UnprivilegedID], without any capability over the host
	// PidFile is where the program writes the id of the process that does its work, where that is no child of its own, as with podman.
	PidFile string
}

// Process is a program that was started, and the process group it leads.
type Process struct {
	cmd  *exec.Cmd
	main string // Program.PidFile
	done chan struct{}
	err  error // of Wait; valid once done is closed
}

// Start starts a program on the host. It dies with the lab, with this process, and with the context given to [New].
func (h *Host) Start(p Program) (*Process, error) {
	cmd := exec.Command(p.Path, p.Args...)
	cmd.Env, cmd.Dir = p.Env, p.Dir
	cmd.Stdin, cmd.Stdout, cmd.Stderr = p.Stdin, p.Stdout, p.Stderr
	// What a program leaves behind may hold its output open; that must not keep Wait.
	cmd.WaitDelay = 100 * time.Millisecond
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	dieWithThread(cmd.SysProcAttr)
	if p.Unprivileged {
		dropPrivileges(cmd.SysProcAttr, h.ns == nil)
	}
	proc := &Process{cmd: cmd, main: p.PidFile, done: make(chan struct{})}
	if err := h.net.start(h, proc); err != nil {
		return nil, fmt.Errorf("start %s on host %s: %w", p.Path, h.name, err)
	}
	return proc, nil
}

// start holds the lab's lock, so that no program starts while Close kills them.
func (n *Net) start(h *Host, p *Process) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return errors.New("the lab is closed")
	}
	start := p.cmd.Start
	if h.ns != nil {
		start = func() error { return h.ns.onKeeper(p.cmd.Start) }
	}
	if err := start(); err != nil {
		return err
	}
	n.procs = append(n.procs, p)
	stop := context.AfterFunc(n.ctx, p.Kill)
	go func() {
		p.err = p.cmd.Wait()
		stop()
		close(p.done)
	}()
	return nil
}

// Run starts a program and waits for it; its exit code is -1 where a signal ended it. When ctx ends first, the program's
// group is killed and the error is ctx's.
func (h *Host) Run(ctx context.Context, p Program) (int, error) {
	proc, err := h.Start(p)
	if err != nil {
		return -1, err
	}
	return proc.Wait(ctx)
}

// Pid is the id of the process that does the work.
func (p *Process) Pid() int {
	if p.main != "" {
		text, err := os.ReadFile(p.main)
		if pid, bad := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && bad == nil && pid > 1 {
			return pid
		}
	}
	return p.cmd.Process.Pid
}

// Done is closed when the process has ended and been waited for.
func (p *Process) Done() <-chan struct{} { return p.done }

// Signal sends a signal to the process that was started, alone.
func (p *Process) Signal(sig syscall.Signal) error { return p.cmd.Process.Signal(sig) }

// Kill kills the process and its group, and first the one that does the work.
func (p *Process) Kill() {
	select {
	case <-p.done: // the id may be somebody else's by now
	default:
		if main := p.Pid(); main != p.cmd.Process.Pid {
			_ = syscall.Kill(main, syscall.SIGKILL)
		}
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // gone already is as good
	}
}

// Wait waits for the end and gives the exit code, -1 where a signal ended it. When ctx ends first, it kills.
func (p *Process) Wait(ctx context.Context) (int, error) {
	select {
	case <-p.done:
	case <-ctx.Done():
		p.Kill()
		<-p.done
		return -1, ctx.Err()
	}
	var exit *exec.ExitError
	if p.err != nil && !errors.As(p.err, &exit) && !errors.Is(p.err, exec.ErrWaitDelay) {
		return -1, p.err
	}
	return p.cmd.ProcessState.ExitCode(), nil
}
