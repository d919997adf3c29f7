package lab

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// wire is a link with delay and loss: a TAP device at each end and this process between them. Frames cross with
// their virtio header, so that segmentation offload survives and a wire carries a gigabit; with loss, frames are single
// packets, so that one loss is one packet.
type wire struct {
	taps [2]*os.File
	done sync.WaitGroup
	// Dropped counts frames that found the queue full, both ways.
	dropped atomic.Uint64
}

const (
	virtioHeader = 10       // struct virtio_net_hdr, in bytes
	maxFrame     = 68 << 10 // a TSO frame of 64 KiB with all its headers
	smallFrame   = 2 << 10  // what fits a link's MTU
	wireQueue    = 16384    // frames on their way in one direction
)

// frame is one frame on its way. Its buffer goes back into the pool of its size.
type frame struct {
	due int64 // CLOCK_MONOTONIC, in nanoseconds
	buf *[]byte
	len int
}

var (
	smallFrames = sync.Pool{New: func() any { b := make([]byte, smallFrame); return &b }}
	largeFrames = sync.Pool{New: func() any { b := make([]byte, maxFrame); return &b }}
)

func newWire(a, b end, link Link) (*wire, error) {
	w := &wire{}
	for i, e := range []end{a, b} {
		tap, err := openTAP(e, link.Loss == 0)
		if err != nil {
			return nil, errors.Join(err, w.close())
		}
		w.taps[i] = tap
		if err := e.setMTU(link.mtu()); err != nil {
			return nil, errors.Join(err, w.close())
		}
	}
	if err := configurePair(a, b); err != nil {
		return nil, errors.Join(err, w.close())
	}
	w.run(w.taps[0], w.taps[1], link)
	w.run(w.taps[1], w.taps[0], link)
	return w, nil
}

// openTAP makes a TAP device in e's namespace that lives as long as the file.
func openTAP(e end, offload bool) (tap *os.File, err error) {
	err = e.ns.do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open /dev/net/tun: %w", err)
		}
		if err := configureTAP(fd, e.name, offload); err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		tap = os.NewFile(uintptr(fd), e.name)
		return nil
	})
	return tap, err
}

func configureTAP(fd int, name string, offload bool) error {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("interface name %q: %w", name, err)
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return fmt.Errorf("make TAP device %s: %w", name, err)
	}
	if !offload {
		return nil
	}
	const tso = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tso|unix.TUN_F_USO4|unix.TUN_F_USO6) == nil {
		return nil
	}
	// Before Linux 6.2 there is no USO.
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tso); err != nil {
		return fmt.Errorf("turn on offloads of %s: %w", name, err)
	}
	return nil
}

// run carries frames one way.
func (w *wire) run(from, to *os.File, link Link) {
	queue := make(chan frame, wireQueue)
	w.done.Go(func() { w.read(from, queue, link) })
	w.done.Go(func() { write(to, queue) })
}

func (w *wire) read(from *os.File, queue chan<- frame, link Link) {
	defer close(queue)
	scratch := make([]byte, maxFrame)
	for {
		n, err := from.Read(scratch)
		if err != nil {
			return // closed
		}
		if n <= virtioHeader || link.Loss > 0 && rand.Float64() < link.Loss {
			continue
		}
		pool := &largeFrames
		if n <= smallFrame {
			pool = &smallFrames
		}
		buf := pool.Get().(*[]byte)
		copy(*buf, scratch[:n])
		select {
		case queue <- frame{monotonic() + int64(link.Delay), buf, n}:
		default:
			w.dropped.Add(1)
			pool.Put(buf)
		}
	}
}

// write holds its own OS thread, which sleeps to the absolute time at which each frame is due: the runtime's timers
// are a millisecond too coarse for that on a busy machine.
func write(to *os.File, queue <-chan frame) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for f := range queue {
		sleepUntil(f.due)
		_, _ = to.Write((*f.buf)[:f.len]) // an interface that is down loses frames, as a cable does
		if len(*f.buf) == smallFrame {
			smallFrames.Put(f.buf)
		} else {
			largeFrames.Put(f.buf)
		}
	}
}

func monotonic() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail for this clock
	return ts.Nano()
}

func sleepUntil(due int64) {
	if due <= monotonic() {
		return
	}
	ts := unix.NsecToTimespec(due)
	for unix.ClockNanosleep(unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME, &ts, nil) == unix.EINTR {
		continue
	}
}

// close removes both devices and waits for what is on its way.
func (w *wire) close() error {
	var errs []error
	for _, tap := range w.taps {
		if tap != nil {
			errs = append(errs, tap.Close())
		}
	}
	w.done.Wait()
	return errors.Join(errs...)
}
