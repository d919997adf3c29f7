package forward

import (
	"errors"
	"os"
	"syscall"
	"unsafe"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// sink writes to the target's socket straight from the stack's buffers: the stack reads into it. So bytes are copied once,
// what the target does not take stays in the stack, where it is counted, and a flow that waits holds no buffer.
type sink struct {
	r    *relay
	raw  syscall.RawConn
	move func(uintptr) bool // s.try, made once

	fd   int
	sent int   // of the last try
	full bool  // the socket takes no more for now
	fail error // of the socket
	terr tcpip.Error
}

var errFull = errors.New("the socket takes no more for now")

// Write is called by the stack with its connection locked: it does not block. What it does not take, the stack keeps.
func (s *sink) Write(b []byte) (int, error) {
	for {
		wrote, _, errno := syscall.RawSyscall(syscall.SYS_WRITE, uintptr(s.fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		n := int(wrote)
		switch {
		case errno == syscall.EINTR:
			continue
		case errno == syscall.EAGAIN:
			s.full = true
			return 0, errFull
		case errno != 0:
			s.fail = os.NewSyscallError("write", errno)
			return 0, s.fail
		case n < len(b):
			s.full = true
			return n, errFull
		}
		return n, nil
	}
}

// try makes one read from the stack. It runs under the poller; false says that the socket is full and it is to wait.
func (s *sink) try(fd uintptr) bool {
	s.fd, s.sent, s.full, s.fail = int(fd), 0, false, nil
	var res tcpip.ReadResult
	res, s.terr = s.r.ep.Read(s, tcpip.ReadOptions{})
	s.sent = res.Count
	if s.full && s.sent == 0 {
		s.r.giveUp() // it is the target that the flow waits for
		return false
	}
	return true
}

// drain gives what copies all that the job has sent so far.
func (r *relay) drain() (func() error, error) {
	raw, err := r.conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &sink{r: r, raw: raw}
	s.move = s.try
	return s.drain, nil
}

func (s *sink) drain() error {
	for {
		if err := s.raw.Write(s.move); err != nil {
			return err
		}
		if s.sent > 0 {
			s.r.took(s.sent)
		}
		if s.fail != nil {
			return writeError(s.fail)
		}
		if s.terr != nil {
			return readError(s.terr)
		}
	}
}
