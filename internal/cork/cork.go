// Package cork has connections that can hold back what is written to them, so that it leaves in one piece.
//
// crypto/tls writes each record of 16 KiB by itself. With a message of 64 KiB that is five system calls, and as many walks of a
// short segment through the kernel, where one would do: a third of what relaying over TLS costs. So the connection below TLS holds the
// records back until the message is complete.
package cork

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
)

// Conn is a connection that holds back what is written between [Conn.Cork] and [Conn.Uncork]. Without them it is the connection below it.
// Any goroutine may write, as with every [net.Conn]; one at a time may cork.
type Conn struct {
	net.Conn

	mu     sync.Mutex
	held   *[]byte     // nil unless corked
	busy   atomic.Bool // Uncork is writing
	broken error       // of a write on the way

	dry atomic.Bool // reads do not wait
}

// ErrDry is what a read gives that would have to wait, see [Conn.Dry]. TLS takes it for a passing fault and can be read again.
var ErrDry net.Error = dryError{}

type dryError struct{}

// Error is for logs: nobody waits for it.
func (dryError) Error() string { return "there is nothing to read yet" }

// Timeout is true, so that crypto/tls lets the connection be read again ([net.Error]).
func (dryError) Timeout() bool { return true }

// Temporary is true: what there is to read may come at any moment.
func (dryError) Temporary() bool { return true }

// most is how much is held back: a message of a relay's, 64 KiB and some, with what TLS adds.
const most = 144 << 10

var buffers = sync.Pool{New: func() any { b := make([]byte, 0, most); return &b }}

// New makes a connection that can be corked.
func New(below net.Conn) *Conn { return &Conn{Conn: below} }

// Of finds the corkable connection below a connection such as a [crypto/tls.Conn]; nil where there is none.
func Of(conn net.Conn) *Conn {
	for conn != nil {
		if c, ok := conn.(*Conn); ok {
			return c
		}
		above, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			return nil
		}
		conn = above.NetConn()
	}
	return nil
}

// NetConn gives the connection below, as [crypto/tls.Conn] does.
func (c *Conn) NetConn() net.Conn { return c.Conn }

// Write writes p, or holds it back.
func (c *Conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held == nil {
		return c.Conn.Write(p)
	}
	if len(*c.held)+len(p) > most {
		c.flush()
	}
	if c.broken != nil {
		return 0, c.broken
	}
	if len(p) > most {
		return c.Conn.Write(p)
	}
	*c.held = append(*c.held, p...)
	return len(p), nil
}

// Dry makes reads give [ErrDry] instead of waiting, until it is called with false. It is for the goroutine that reads: where a layer
// above has nothing left either, it can return from there and wait in [Conn.Await].
func (c *Conn) Dry(on bool) { c.dry.Store(on) }

// Read reads from the connection below.
func (c *Conn) Read(p []byte) (int, error) {
	if c.dry.Load() {
		return c.readDry(p)
	}
	return c.Conn.Read(p)
}

// Cork holds back what is written from now on.
func (c *Conn) Cork() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held == nil {
		c.held = buffers.Get().(*[]byte)
		c.broken = nil
	}
}

// Uncork writes what was held back. Its error is that of writing, also of what was written on the way.
func (c *Conn) Uncork() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held == nil {
		return nil
	}
	c.flush()
	buffers.Put(c.held)
	c.held = nil
	return c.broken
}

// flush writes what is held. mu is held.
func (c *Conn) flush() {
	if len(*c.held) > 0 && c.broken == nil {
		c.busy.Store(true)
		_, c.broken = c.Conn.Write(*c.held)
		c.busy.Store(false)
	}
	*c.held = (*c.held)[:0]
}

// Interrupt closes the connection if Uncork is waiting for the other side to take something: TLS, which knows nothing of that, would wait
// with it in order to say goodbye.
func (c *Conn) Interrupt() {
	if c.busy.Load() {
		_ = c.Conn.Close()
	}
}

// Listener accepts connections that can be corked.
func Listener(l net.Listener) net.Listener { return listener{l} }

type listener struct{ net.Listener }

// Accept gives the next connection.
func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return New(c), nil
}

// Dialer makes dial give connections that can be corked; nil is [net.Dialer]'s.
func Dialer(dial func(ctx context.Context, network, addr string) (net.Conn, error)) func(ctx context.Context, network, addr string) (net.Conn, error) {
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return New(c), nil
	}
}
