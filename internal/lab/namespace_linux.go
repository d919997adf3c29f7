package lab

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespace is a network namespace that lives as long as its file is open. One OS thread belongs to it for good: programs
// are started from there, because a parent-death signal follows the thread that forked, not the process.
type namespace struct {
	file   *os.File
	inode  uint64
	handle *netlink.Handle
	work   chan func()
	done   chan struct{}
	once   sync.Once
}

// newNamespace makes an empty namespace whose loopback is up and that forwards nothing.
func newNamespace() (*namespace, error) {
	ns := &namespace{work: make(chan func()), done: make(chan struct{})}
	ready := make(chan error)
	go ns.keep(ready)
	if err := <-ready; err != nil {
		return nil, err
	}
	if err := ns.prepare(); err != nil {
		ns.close()
		return nil, err
	}
	return ns, nil
}

// keep runs on the namespace's own thread. It returns without unlocking it, so that the runtime ends the thread: it
// must never serve other goroutines.
func (ns *namespace) keep(ready chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The main thread stays where it is: /proc/self speaks of it, and other code believes that.
		go ns.keep(ready)
		<-ns.done
		runtime.UnlockOSThread()
		return
	}
	defer close(ns.done)
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		ready <- fmt.Errorf("make a network namespace: %w", err)
		return
	}
	if err := ns.open(); err != nil {
		ready <- err
		return
	}
	ready <- nil
	for f := range ns.work {
		f()
	}
}

func (ns *namespace) open() error {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("hold the network namespace: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return errors.Join(fmt.Errorf("identify the network namespace: %w", err), f.Close())
	}
	ns.file, ns.inode = f, st.Ino
	return nil
}

func (ns *namespace) prepare() error {
	h, err := netlink.NewHandleAt(netns.NsHandle(ns.file.Fd()))
	if err != nil {
		return fmt.Errorf("open netlink in the namespace: %w", err)
	}
	ns.handle = h
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback interface: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring the loopback interface up: %w", err)
	}
	// Best effort, for connections over interfaces that a program makes: the machine has to allow it. Default routes say it anyway.
	_ = ns.sysctl("net/ipv4/tcp_congestion_control", congestion)
	// Best effort: without it IPv6 addresses are unusable for a second after they were added.
	_ = ns.sysctl("net/ipv6/conf/default/accept_dad", "0")
	return nil
}

// sysctl writes a network setting; the kernel takes /proc/sys/net to mean the writing thread's namespace.
func (ns *namespace) sysctl(name, value string) error {
	return ns.do(func() error {
		if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0o644); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
		return nil
	})
}

// do runs f on the caller's goroutine, with its thread in the namespace. Sockets and processes that f makes belong to the
// namespace for good; goroutines that f starts do not run in it.
func (ns *namespace) do(f func() error) error {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("remember the network namespace: %w", err)
	}
	defer home.Close()
	if err := unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter the network namespace: %w", err)
	}
	defer func() {
		// A thread that cannot return stays locked, and ends with its goroutine.
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return f()
}

// onKeeper runs f on the namespace's own thread.
func (ns *namespace) onKeeper(f func() error) error {
	result := make(chan error, 1)
	select {
	case ns.work <- func() { result <- f() }:
		return <-result
	case <-ns.done:
		return errors.New("the lab is closed")
	}
}

// path is where other processes find the namespace.
func (ns *namespace) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.file.Fd()) }

// close lets go of the namespace; it vanishes with its last process and socket. Nobody may use onKeeper any more.
func (ns *namespace) close() {
	ns.once.Do(func() {
		close(ns.work)
		<-ns.done
		if ns.handle != nil {
			ns.handle.Close()
		}
		ns.file.Close()
	})
}
