package cork

import (
	"errors"
	"io"
	"syscall"
)

// below gives what the connection's reads can be done with directly; nil where it is no socket of the system.
func (c *Conn) below() syscall.RawConn {
	s, ok := c.Conn.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// Await returns when there is something to read, or an error to be read. Whoever waits here needs little stack, and TLS no buffer.
func (c *Conn) Await() {
	raw := c.below()
	if raw == nil {
		return
	}
	var one [1]byte
	_ = raw.Read(func(fd uintptr) bool {
		for {
			_, _, err := syscall.Recvfrom(int(fd), one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
			if !errors.Is(err, syscall.EINTR) {
				return !errors.Is(err, syscall.EAGAIN)
			}
		}
	})
}

// readDry reads what is there; [ErrDry] if that is nothing.
func (c *Conn) readDry(p []byte) (n int, err error) {
	raw := c.below()
	if raw == nil || len(p) == 0 {
		return c.Conn.Read(p)
	}
	failed := raw.Read(func(fd uintptr) bool {
		for {
			if n, err = syscall.Read(int(fd), p); !errors.Is(err, syscall.EINTR) {
				return true
			}
		}
	})
	switch {
	case failed != nil:
		return 0, failed
	case errors.Is(err, syscall.EAGAIN):
		return 0, ErrDry
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}
