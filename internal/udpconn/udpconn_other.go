//go:build !linux

package udpconn

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
)

type platform struct{}

func prepare(_ syscall.RawConn, opts *Options) error {
	if opts.ReusePort {
		return errors.New("several sockets on one port need Linux")
	}
	return nil
}

func (c *Conn) setUp(opts *Options) error {
	_ = c.udp.SetReadBuffer(opts.Buffer)
	_ = c.udp.SetWriteBuffer(opts.Buffer)
	return nil
}

// Stats knows nothing here.
func (c *Conn) Stats() Stats { return Stats{} }

// Batch is room for one datagram. One goroutine uses it at a time.
type Batch struct {
	conn *Conn
	buf  [maxDatagram]byte
	d    Datagram
	n    int
}

// NewBatch makes room for one datagram, whatever size is: there is no batching here.
func (c *Conn) NewBatch(int) *Batch { return &Batch{conn: c} }

// Read waits for a datagram. Its error is [net.ErrClosed] once the socket is closed; after any other a later read may
// succeed.
func (b *Batch) Read() error {
	b.n = 0
	n, from, err := b.conn.udp.ReadFromUDPAddrPort(b.buf[:])
	if err != nil {
		if errors.Is(err, net.ErrClosed) {
			return net.ErrClosed
		}
		return fmt.Errorf("receive: %w", err)
	}
	b.d = Datagram{Data: b.buf[:n:n], Segment: n, From: unmap(from)}
	b.n = 1
	return nil
}

// Poll is Read that does not wait: without an error there may be nothing.
func (b *Batch) Poll() error {
	if err := b.conn.udp.SetReadDeadline(time.Now()); err != nil {
		return err
	}
	defer b.conn.udp.SetReadDeadline(time.Time{})
	if err := b.Read(); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}

// Len is how many datagrams the last read gave.
func (b *Batch) Len() int { return b.n }

// Datagram gives the i-th.
func (b *Batch) Datagram(int) Datagram { return b.d }

// Queue sends datagrams. One goroutine uses it at a time.
type Queue struct {
	conn *Conn

	Sent    uint64 // datagrams that the system took
	Dropped uint64 // datagrams that it could not send
}

// NewQueue makes a queue, which sends at once whatever size is: there is no batching here.
func (c *Conn) NewQueue(int) *Queue { return &Queue{conn: c} }

// Add sends data to an address: one datagram, or a run of datagrams of size segment, of which the last may be shorter.
// The system chooses what to send it from.
func (q *Queue) Add(data []byte, segment int, to netip.AddrPort, _ netip.Addr) {
	if segment <= 0 || segment > len(data) {
		segment = len(data)
	}
	for len(data) > 0 {
		n := min(segment, len(data))
		if _, err := q.conn.udp.WriteToUDPAddrPort(data[:n], to); err != nil {
			q.Dropped++
		} else {
			q.Sent++
		}
		data = data[n:]
	}
}

// Flush does nothing: Add has sent all.
func (q *Queue) Flush() {}

// FlushWait does nothing: Add has sent all, and waited for the system to take it.
func (q *Queue) FlushWait(time.Duration) {}
