package lab

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
)

// The environment variable by which [Enter] knows what this process is.
const (
	enterEnv   = "CULVERT_LAB"
	enterProbe = "probe" // try whether a lab can be built, and end
	enterChild = "child" // already inside
)

// Enter makes this process able to build labs. Call it first in main or TestMain. As root it returns at once. Otherwise it
// runs the same program again as root of new user, network and mount namespaces, passes on its input, output and
// signals, and ends with its exit code. Where that is impossible it returns an error that names the reason.
func Enter() error { return EnterThen(func() {}) }

// EnterThen is [Enter] for a program that has something to tidy up: last is called before this process ends because
// another one has done its work.
func EnterThen(last func()) error {
	switch os.Getenv(enterEnv) {
	case enterProbe:
		if err := try(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	case enterChild:
		if err := loopback(); err != nil {
			return err
		}
		return os.Unsetenv(enterEnv)
	}
	direct := Available()
	if direct == nil {
		return nil
	}
	if err := probe(); err != nil {
		return fmt.Errorf("%w; in a user namespace: %w", direct, err)
	}
	code, err := again(enterChild, nil)
	if err != nil {
		return err
	}
	last()
	os.Exit(code)
	return nil
}

// loopback brings the loopback interface up, which a new network namespace has down.
func loopback() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("bring the loopback interface up: %w", err)
	}
	return nil
}

// probe tries in a child whether a lab can be built inside a user namespace.
func probe() error {
	var out bytes.Buffer
	code, err := again(enterProbe, &out)
	if err != nil {
		return err
	}
	if code != 0 {
		return errors.New(strings.TrimSpace(out.String()))
	}
	return nil
}

// again runs this program as root of a new user namespace. With out set it gets no input and both outputs go there.
func again(role string, out *bytes.Buffer) (int, error) {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), enterEnv+"="+role)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if out != nil {
		cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, out, out
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig:   syscall.SIGKILL,
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	defer func() { signal.Stop(signals); close(signals) }()
	runtime.LockOSThread() // the parent-death signal is tied to the thread that forks
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("the kernel does not let this user make user namespaces: %w", err)
	}
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s)
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	if code := cmd.ProcessState.ExitCode(); code >= 0 {
		return code, nil
	}
	return 1, nil // ended by a signal
}

// Available reports why this process cannot build a lab, or nil.
var Available = sync.OnceValue(try)

// try builds the smallest network that uses everything a lab needs, and takes it down again.
func try() error {
	a, err := newNamespace()
	if err != nil {
		return err
	}
	defer a.close()
	if err := a.sysctl("net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	b, err := newNamespace()
	if err != nil {
		return err
	}
	defer b.close()
	near := end{ns: a, name: wan, addr: address{v4: netip.MustParsePrefix("203.0.113.1/30")}}
	far := end{ns: b, name: "eth0", addr: address{v4: netip.MustParsePrefix("203.0.113.2/30")}}
	if err := vethPair(near, far, linkMTU); err != nil {
		return err
	}
	return a.rule(func(r *rules) {
		r.public, r.lan = near.addr.Addr(), near.addr.v4
		Easy.rules(r)
	})
}
