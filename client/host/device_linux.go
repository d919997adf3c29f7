package host

import (
	"errors"
	"sync"
	"syscall"

	"golang.zx2c4.com/wireguard/tun"
)

// gatherMost is how many packets one Read gathers: what one segmentation batch takes, see [segments].
const gatherMost = segments

// device is the TUN device. It reads and writes by itself what wireguard-go's device would. It joins the event goroutines when it is closed:
// they block for ever on events that nobody reads.
type device struct {
	tun.Device
	raw    syscall.RawConn
	intake *intake // nil, as joint, for a device that takes no large packets: then each Read and Write is wireguard-go's
	joint  *joint
	once   sync.Once
	err    error
	after  func()
}

func newDevice(native tun.Device, after func()) *device {
	d := &device{Device: native, after: after}
	if file := native.File(); file != nil && native.BatchSize() > 1 {
		if raw, err := file.SyscallConn(); err == nil {
			d.raw, d.intake, d.joint = raw, newIntake(raw), newJoint()
		}
	}
	return d
}

// Read gives what the host sends: the segments of one large packet, or as many others as are there. The kernel gives these one by one,
// and each would be encrypted and sent by itself; together they are one system call and one walk through the network.
// One goroutine calls it.
func (d *device) Read(bufs [][]byte, sizes []int, offset int) (n int, err error) {
	if d.intake == nil {
		return d.Device.Read(bufs, sizes, offset)
	}
	for n == 0 && err == nil {
		n, err = d.intake.next(true, bufs, sizes, offset)
	}
	for last := n; err == nil && last == 1 && n < min(gatherMost, len(bufs)); n += last {
		last, err = d.intake.next(false, bufs[n:], sizes[n:], offset)
	}
	return n, err
}

// Write hands packets to the host: segments of one connection that follow on each other as one packet, from where they lie; all else as
// wireguard-go does, which looks for what belongs together among packets that are mixed, and copies it. Goroutines of several peers call it.
func (d *device) Write(bufs [][]byte, offset int) (int, error) {
	if d.joint == nil || offset < vnetLen {
		return d.Device.Write(bufs, offset)
	}
	var failed error
	all, other := len(bufs), 0 // other: of the first packets, those that go by themselves
	for other < len(bufs) {
		n, first := run(bufs[other:], offset)
		if n == 1 {
			other++
			continue
		}
		failed = errors.Join(failed, d.writeOthers(bufs[:other], offset), d.joint.send(d.raw, bufs[other:other+n], offset, first))
		bufs, other = bufs[other+n:], 0
	}
	return all, errors.Join(failed, d.writeOthers(bufs, offset))
}

func (d *device) writeOthers(bufs [][]byte, offset int) error {
	if len(bufs) == 0 {
		return nil
	}
	_, err := d.Device.Write(bufs, offset)
	return err
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
