package forward

import (
	"errors"
	"io"
	"os"
	"syscall"

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
		n, err := syscall.Read(f.fd, b)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case err != nil:
			return 0, os.NewSyscallError("read", err)
		case n == 0:
			return 0, io.ErrUnexpectedEOF
		}
		f.left -= n
		return n, nil
	}
}

// move makes one write to the stack. It runs under the poller; false says that there is nothing to read and it is to wait.
func (f *feed) move(fd uintptr) bool {
	f.sent, f.full, f.err = 0, false, nil
	held, err := unix.IoctlGetInt(int(fd), unix.SIOCINQ)
	if err != nil {
		f.err = os.NewSyscallError("ioctl", err)
		return true
	}
	if held == 0 {
		return f.ended(int(fd))
	}
	f.fd, f.left = int(fd), min(held, streamBuffer)
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

// ended tells a socket that holds nothing yet from one that has ended; false says to wait.
func (f *feed) ended(fd int) bool {
	var one [1]byte
	n, _, err := unix.Recvfrom(fd, one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return false
	case errors.Is(err, unix.EINTR) || n > 0: // something has come meanwhile
	case err != nil:
		f.err = os.NewSyscallError("recvfrom", err)
	default:
		f.err = io.EOF
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
