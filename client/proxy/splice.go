package proxy

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// bufferSize lets one read take what the tunnel's receive offload has merged, in bytes.
const bufferSize = 128 << 10

var buffers = sync.Pool{New: func() any { b := make([]byte, bufferSize); return &b }}

// splice carries bytes both ways until both sides have ended, one has failed, or nothing has moved for idle. When one side
// ends, the other is told (TCP FIN) and may go on talking.
func splice(a, b net.Conn, idle time.Duration) {
	var moved atomic.Int64
	stop := watchIdle(&moved, idle, func() { _, _ = a.Close(), b.Close() })
	defer stop()
	var wait sync.WaitGroup
	for _, pair := range [][2]net.Conn{{a, b}, {b, a}} {
		wait.Go(func() {
			if err := carry(pair[0], pair[1], &moved); err != nil {
				_, _ = a.Close(), b.Close()
			}
		})
	}
	wait.Wait()
}

// carry copies from src to dst until src ends and then ends dst's half.
func carry(dst, src net.Conn, moved *atomic.Int64) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := src.Read(*buf)
		if n > 0 {
			moved.Add(int64(n))
			if _, err := dst.Write((*buf)[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return closeWrite(dst)
		case err != nil:
			return err
		}
	}
}

// watchIdle calls expire once the counter has stood still for idle, give or take a third. The result stops it.
func watchIdle(moved *atomic.Int64, idle time.Duration, expire func()) (stop func()) {
	done := make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() {
		tick := time.NewTicker(idle / 3)
		defer tick.Stop()
		for last, still := int64(0), 0; ; {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			if now := moved.Load(); now != last {
				last, still = now, 0
			} else if still++; still == 3 {
				expire()
			}
		}
	})
	return func() { close(done); wait.Wait() }
}

// closeWrite ends one half of a connection where it can, and all of it where it cannot.
func closeWrite(conn net.Conn) error {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return conn.Close()
}
