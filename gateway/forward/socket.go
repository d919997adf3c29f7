package forward

import (
	"net"
	"sync"
	"syscall"
)

// source reads from a socket of the operating system. It takes a buffer only when there is something to read and gives
// it back at once, because a session may have thousands of flows that wait.
type source struct {
	conn   net.Conn
	raw    syscall.RawConn
	pool   *sync.Pool // of *buffer
	stream bool       // nothing read means the end
	use    func([]byte) error

	attempt func(uintptr) bool // s.try, made once
	buf     *buffer            // what it has read, n bytes
	n       int
	err     error
}

type buffer struct{ b []byte }

// Copying takes large pieces: one system call moves as much as the stack sends as four segments.
const (
	streamBuffer = 256 << 10
	maxDatagram  = 65535
)

var datagrams = sync.Pool{New: func() any { return &buffer{make([]byte, maxDatagram)} }}

// socket is what TCP and UDP connections of package net share.
type socket interface {
	net.Conn
	syscall.Conn
}

// tcpConn is what the forwarder needs of a TCP connection. That of package net is one.
type tcpConn interface {
	socket
	CloseWrite() error
	SetLinger(seconds int) error
	SetKeepAliveConfig(net.KeepAliveConfig) error
}

// newSource makes a source that hands what it reads to use, which must not keep it.
func newSource(conn socket, pool *sync.Pool, stream bool, use func([]byte) error) (*source, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &source{conn: conn, raw: raw, pool: pool, stream: stream, use: use}
	s.attempt = s.try
	return s, nil
}
