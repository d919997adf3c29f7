//go:build !linux

package forward

import (
	"bytes"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"

	"github.com/culvertnet/culvert/internal/netstack"
)

var streams = sync.Pool{New: func() any { return &buffer{make([]byte, streamBuffer)} }}

// pour copies from the target to the job until the target has sent all, which is io.EOF, or something fails.
func (r *relay) pour(writable <-chan struct{}) error {
	var reader bytes.Reader
	src, err := newSource(r.conn, &streams, true, func(b []byte) error {
		r.carried(len(b))
		return r.send(b, &reader, writable)
	})
	for err == nil {
		err = src.next()
	}
	return err
}

// send writes all of b to the job.
func (r *relay) send(b []byte, src *bytes.Reader, writable <-chan struct{}) error {
	for len(b) > 0 {
		src.Reset(b)
		n, terr := r.ep.Write(src, tcpip.WriteOptions{})
		b = b[n:]
		if n > 0 && !r.window.wrote(int(n)) {
			r.choke()
		}
		switch terr.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			r.await(writable)
		default:
			return netstack.Errno(terr)
		}
	}
	return nil
}
