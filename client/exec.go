package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/culvertnet/culvert/client/control"
	"github.com/culvertnet/culvert/client/proxy"
	"github.com/culvertnet/culvert/internal/problem"
)

// execCommand runs a program.
type execCommand struct {
	Command []string `arg:"" passthrough:"" name:"CMD" help:"The program and its arguments, after --."`
}

func (c *execCommand) run(ctx context.Context, _ environment, flags common) error {
	argv := c.Command
	if len(argv) > 0 && argv[0] == "--" {
		argv = argv[1:]
	}
	if len(argv) == 0 {
		return problem.New(problem.Usage, "there is no program to run", "write culvert exec -- CMD")
	}
	var st control.Status // of the last with a proxy, which leads to the others' networks as well
	for _, name := range flags.all(ctx) {
		now, err := readStatus(ctx, name)
		if err != nil {
			return err
		}
		if now.State != control.Up && now.State != control.Rejoining {
			return problem.New(problem.NotUp, fmt.Sprintf("the tunnel named %q is %s, not up", name, now.State),
				"wait for `culvert up` to return")
		}
		if now.Proxy != "" || st.State == "" {
			st = now
		}
	}
	program, err := exec.LookPath(argv[0])
	if err != nil {
		return notRun(argv[0], err)
	}
	return replace(program, argv, execEnviron(os.Environ(), st))
}

// Exit codes for a program that does not run at all, as shells, env and nohup have them (POSIX.1-2017, Shell Command Language, 2.8.2). All
// others are the program's own, or say that there is no tunnel.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// notRun is the error for a program that cannot be run.
func notRun(name string, err error) error {
	if errors.Is(err, exec.ErrNotFound) && lies(name) {
		err = fmt.Errorf("%s: %w", name, fs.ErrPermission)
	}
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		return withExit{problem.Wrap(err, problem.NotFound, fmt.Sprintf("the program cannot be run: %v", err), "check its name and PATH"), exitNotFound}
	}
	return withExit{problem.Wrap(err, problem.Failed, fmt.Sprintf("the program cannot be run: %v", err),
		"check that it is a program for this system, and that this user may execute it"), exitNotExecutable}
}

// lies reports whether a file of this name lies in PATH, though none that may be executed.
func lies(name string) bool {
	if filepath.Base(name) != name {
		return false
	}
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		if info, err := os.Stat(filepath.Join(dir, name)); err == nil && info.Mode().IsRegular() {
			return true
		}
	}
	return false
}

// execEnviron points the program at the proxy where the tunnel has one. A tunnel with an interface needs nothing.
func execEnviron(environ []string, st control.Status) []string {
	addr, err := netip.ParseAddrPort(st.Proxy)
	if err != nil {
		return environ
	}
	own := proxy.Environ(addr)
	names := make(map[string]bool, len(own))
	for _, entry := range own {
		name, _, _ := strings.Cut(entry, "=")
		names[name] = true
	}
	kept := make([]string, 0, len(environ)+len(own))
	for _, entry := range environ {
		if name, _, _ := strings.Cut(entry, "="); !names[name] {
			kept = append(kept, entry)
		}
	}
	return append(kept, own...)
}
