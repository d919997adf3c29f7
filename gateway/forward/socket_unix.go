//go:build unix

package forward

import (
	"errors"
	"io"
	"os"
	"syscall"
)

// next waits for data, reads it and hands it on. It returns io.EOF at the end of a stream.
//
// What is read is handed on after the poller has let go of the socket: closing it would wait for that.
func (s *source) next() error {
	s.buf, s.n, s.err = nil, 0, nil
	if err := s.raw.Read(s.attempt); err != nil {
		return err
	}
	if s.buf == nil {
		return s.err
	}
	defer s.pool.Put(s.buf)
	return s.use(s.buf.b[:s.n])
}

// try reads without blocking; false says that there is nothing and the poller is to wait.
func (s *source) try(fd uintptr) bool {
	buf := s.pool.Get().(*buffer)
	n, err := syscall.Read(int(fd), buf.b)
	for errors.Is(err, syscall.EINTR) {
		n, err = syscall.Read(int(fd), buf.b)
	}
	if err == nil && (n > 0 || !s.stream) {
		s.buf, s.n = buf, n
		return true
	}
	s.pool.Put(buf)
	switch {
	case errors.Is(err, syscall.EAGAIN):
		return false
	case err == nil:
		s.err = io.EOF
	default:
		s.err = os.NewSyscallError("read", err)
	}
	return true
}
