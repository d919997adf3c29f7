package forward

import (
	"io"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"

	"github.com/culvertnet/culvert/internal/netstack"
)

// feed reads from the target's socket straight into the stack's buffers: it is the payload of a write to the stack, as long
// as what the socket holds at that moment. So bytes are copied once, and a flow that waits holds no buffer.
type feed struct {
	r    *relay
	fd   int
	left int   // what the socket holds, bytes
	sent int   // of the last write
	full bool  // the stack has no room
	err  error // io.EOF when the target has sent all
}

// Len is what one write takes at most.
func (f *feed) Len() int { return f.left }

// Read is called by the stack for no more than Len bytes, which are there: it does not block.
func (f *feed) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for {
		// A raw call, because it does not wait, see [udpconn.Batch].
		n, _, errno := syscall.RawSyscall(syscall.SYS_READ, uintptr(f.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		switch {
		case errno == syscall.EINTR:
			continue
		case errno != 0:
			return 0, os.NewSyscallError("read", errno)
		case n == 0:
			return 0, io.ErrUnexpectedEOF
		}
		f.left -= int(n)
		return int(n), nil
	}
}

// move makes one write to the stack. It runs under the poller; false says that there is nothing to read and it is to wait.
func (f *feed) move(fd uintptr) bool {
	f.fd, f.left, f.sent, f.full, f.err = int(fd), 0, 0, false, nil
	for f.left == 0 {
		// Looking at so much without a buffer copies nothing, and says what the socket holds, or that it has ended (tcp(7), MSG_TRUNC).
		held, _, errno := syscall.RawSyscall6(unix.SYS_RECVFROM, fd, 0, streamBuffer, unix.MSG_PEEK|unix.MSG_TRUNC|unix.MSG_DONTWAIT, 0, 0)
		switch {
		case errno == unix.EAGAIN:
			return false
		case errno == unix.EINTR:
		case errno != 0:
			f.err = os.NewSyscallError("recvfrom", errno)
			return true
		case held == 0:
			f.err = io.EOF
			return true
		}
		f.left = int(held)
	}
	n, terr := f.r.ep.Write(f, tcpip.WriteOptions{})
	f.sent = int(n)
	switch terr.(type) {
	case nil:
	case *tcpip.ErrWouldBlock:
		f.full = true
	default:
		f.err = netstack.Errno(terr)
	}
	return true
}

// pour copies from the target to the job until the target has sent all, which is io.EOF, or something fails.
func (r *relay) pour(writable <-chan struct{}) error {
	raw, err := r.conn.SyscallConn()
	if err != nil {
		return err
	}
	f := &feed{r: r}
	move := f.move
	for {
		if err := raw.Read(move); err != nil {
			return err
		}
		if f.sent > 0 {
			r.carried(f.sent)
		}
		if f.err != nil {
			return f.err
		}
		if f.full {
			r.await(writable)
		} else if f.sent > 0 && !r.window.wrote(f.sent) {
			r.choke()
		}
	}
}
