package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/culvertnet/culvert/client/agent"
	"github.com/culvertnet/culvert/internal/problem"
)

// launched marks the process that runs the tunnel in the background. Its value is when the command began, in Unix
// nanoseconds. That process has three pipes: on standard input, which ends when the parent does; on standard output, where its
// result goes as JSON; and the parent's own standard error, which it lets go of when it is up.
const launched = "CULVERT_LAUNCHED"

// trackingID is the variable by which GitHub's runner finds what a job left behind. A tunnel outlives its step.
const trackingID = "RUNNER_TRACKING_ID"

// maxResult bounds what the child may say, in bytes.
const maxResult = 1 << 20

// endLimit is how long a cancelled child may take to leave before it is killed.
const endLimit = 800 * time.Millisecond

// launch starts this very command again in the background and waits for its result.
func launch(ctx context.Context, env environment) (*agent.Ready, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	args := append(append([]string{}, env.args...), "--foreground", "--json")
	cmd := exec.Command(program, args...)
	cmd.Env = childEnviron(os.Environ(), env.started)
	cmd.SysProcAttr = detached()
	if file, ok := env.stderr.(*os.File); ok {
		cmd.Stderr = file // not a pipe of ours, which would have to be copied
	}
	lifeline, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	defer lifeline.Close()
	result, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the tunnel in the background: %w", err)
	}
	line := make(chan []byte, 1)
	go func() { line <- readLine(result) }() // ends with the child's standard output
	select {
	case text := <-line:
		return childSaid(cmd, text)
	case <-ctx.Done():
		_ = lifeline.Close() // tells the child
		end(cmd, line)
		return nil, problem.Wrap(ctx.Err(), problem.Cancelled, "cancelled before the tunnel was up", "")
	}
}

// childEnviron is our environment without what would have the runner end the child, and with the mark.
func childEnviron(environ []string, started time.Time) []string {
	kept := make([]string, 0, len(environ)+1)
	for _, entry := range environ {
		name, _, _ := strings.Cut(entry, "=")
		if name != trackingID && name != launched {
			kept = append(kept, entry)
		}
	}
	return append(kept, launched+"="+strconv.FormatInt(started.UnixNano(), 10))
}

func readLine(r io.Reader) []byte {
	text, _ := bufio.NewReader(io.LimitReader(r, maxResult)).ReadBytes('\n')
	return text
}

// childSaid turns the child's line into a result: Ready, a problem document, or nothing where it died.
func childSaid(cmd *exec.Cmd, text []byte) (*agent.Ready, error) {
	var ready agent.Ready
	if err := json.Unmarshal(text, &ready); err == nil && ready.Session != "" {
		_ = cmd.Process.Release() // it goes on without us
		return &ready, nil
	}
	var p problem.Error
	err := json.Unmarshal(bytes.TrimSpace(text), &p)
	died := cmd.Wait()
	if err == nil && p.Message != "" {
		return nil, &p
	}
	return nil, problem.Wrap(died, problem.Failed, fmt.Sprintf("the background process ended without a word (%v)", died),
		"run the command with --foreground to see why")
}

// end waits for a child that has been told to leave, and kills it when it does not.
func end(cmd *exec.Cmd, line <-chan []byte) {
	kill := time.AfterFunc(endLimit, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	<-line
	_ = cmd.Wait()
}

// inherit takes over what the process that launched this one has passed on.
func (e *environment) inherit() {
	began, err := strconv.ParseInt(e.getenv(launched), 10, 64)
	if err != nil {
		return
	}
	e.launched, e.started = true, time.Unix(0, began)
	_ = os.Unsetenv(launched)
}

var errOrphaned = errors.New("the process that started this one is gone")

// attach ties us to the process that launched us, if one did: its end is our end, until detach. letGo then closes the
// streams that we share with it.
func attach(ctx context.Context, env environment) (_ context.Context, detach func()) {
	if !env.launched {
		return ctx, func() {}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	detached := make(chan struct{})
	go func() { // ends with the other process
		_, _ = io.Copy(io.Discard, env.stdin)
		select {
		case <-detached:
		default:
			cancel(errOrphaned)
		}
	}()
	return ctx, func() { close(detached) }
}
