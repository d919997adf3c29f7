package kernel

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespace is a network namespace that lives as long as its file, or a socket in it, is open: no longer than the process.
type namespace struct {
	file   *os.File
	handle *netlink.Handle
}

const threadNamespace = "/proc/thread-self/ns/net"

// newNamespace makes an empty one whose loopback interface is up.
func newNamespace() (*namespace, error) {
	ns := &namespace{}
	err := abroad(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() (err error) {
		ns.file, err = os.Open(threadNamespace)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	ns.handle, err = netlink.NewHandleAt(netns.NsHandle(ns.file.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		ns.close()
		return nil, fmt.Errorf("open netlink in the namespace: %w", err)
	}
	lo, err := ns.handle.LinkByName("lo")
	if err == nil {
		err = ns.handle.LinkSetUp(lo)
	}
	if err != nil {
		ns.close()
		return nil, fmt.Errorf("bring the loopback interface up: %w", err)
	}
	return ns, nil
}

// do runs f on a thread that is in the namespace: sockets that it makes belong there for good.
func (ns *namespace) do(f func() error) error {
	return abroad(func() error { return unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNET) }, f)
}

// abroad has go change the thread's network namespace, runs f there, and comes back.
func abroad(leave, f func() error) (err error) {
	runtime.LockOSThread()
	home, err := os.Open(threadNamespace)
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	if err := leave(); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() {
		// A thread that cannot return stays locked, and ends with its goroutine, which must not go on as if it were at home.
		if stuck := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); stuck != nil {
			err = errors.Join(err, fmt.Errorf("return to the host's network namespace: %w", stuck))
			return
		}
		runtime.UnlockOSThread()
	}()
	return f()
}

// sysctl writes a network setting; the kernel takes /proc/sys/net to mean the writing thread's namespace.
func (ns *namespace) sysctl(name, value string) error {
	return ns.do(func() error { return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0o644) })
}

func (ns *namespace) close() {
	if ns.handle != nil {
		ns.handle.Close()
	}
	_ = ns.file.Close()
}
