package host

import (
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
)

// gatherMost is how many packets one Read gathers: what one segmentation batch takes, see [segments].
const gatherMost = segments

// device is the TUN device. It gathers what is there in one Read, and joins the event goroutines when it is closed: they block for ever
// on events that nobody reads.
type device struct {
	tun.Device
	raw   syscall.RawConn // nil where there is none: then each Read is one of the kernel's
	once  sync.Once
	err   error
	after func()

	ready bool // of the last look; Read's
	look  func(fd uintptr)
}

func newDevice(native tun.Device, after func()) *device {
	d := &device{Device: native, after: after}
	if file := native.File(); file != nil {
		d.raw, _ = file.SyscallConn()
	}
	d.look = func(fd uintptr) { d.ready = readable(fd) }
	return d
}

// Read gives what the host sends: the segments of one large packet, or as many others as are there. The kernel gives these one by one,
// and each would be encrypted and sent by itself; together they are one system call and one walk through the network.
// One goroutine calls it.
func (d *device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	n, err := d.Device.Read(bufs, sizes, offset)
	for last := n; err == nil && last == 1 && n < min(gatherMost, len(bufs)) && d.waits(); n += last {
		last, err = d.Device.Read(bufs[n:], sizes[n:], offset)
	}
	return n, err
}

// waits tells whether a Read would find something at once.
func (d *device) waits() bool {
	d.ready = false
	return d.raw != nil && d.raw.Control(d.look) == nil && d.ready
}

// readable asks the kernel without waiting, and so without telling the scheduler.
func readable(fd uintptr) bool {
	ask := unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	var now unix.Timespec
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&ask)), 1, uintptr(unsafe.Pointer(&now)), 0, 0, 0)
	return errno == 0 && n == 1 && ask.Revents == unix.POLLIN
}

// Close implements [tun.Device].
func (d *device) Close() error {
	d.once.Do(func() {
		d.err = d.Device.Close()
		for range d.Device.Events() {
		}
		d.after()
	})
	return d.err
}
