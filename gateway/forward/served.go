package forward

import (
	"net"
	"net/netip"
	"sync"

	"github.com/culvertnet/culvert/internal/policy"
)

// Serve counts a connection to one of the gateway's own services like any flow of the session that it comes from: against the
// session's limits, and reset when it ends. A connection that may not be is closed, and nil returned.
func (f *Forwarder) Serve(c net.Conn) net.Conn {
	from, err := netip.ParseAddrPort(c.RemoteAddr().String())
	to, terr := netip.ParseAddrPort(c.LocalAddr().String())
	s := f.session(from.Addr().Unmap().WithZone(""))
	if err != nil || terr != nil || s == nil {
		abort(c)
		return nil
	}
	key := flowKey{policy.TCP, from, to}
	fl, why, known := s.enter(key, f.limits.TCPIdle, func(flowKey) judgement {
		return judgement{Verdict: policy.Verdict{Allowed: true}, served: true}
	})
	if fl == nil || known {
		if !known {
			s.deny(key, why)
		}
		abort(c)
		return nil
	}
	served := &servedConn{Conn: c, fl: fl}
	served.done = sync.OnceFunc(fl.close)
	if !fl.onReset(func() { abort(c) }) {
		served.done()
		return nil
	}
	return served
}

// abort resets a connection where it can be reset.
func abort(c net.Conn) {
	if a, ok := c.(interface{ Abort() }); ok {
		a.Abort()
	}
	_ = c.Close()
}

// servedConn is a connection to the gateway itself. Its bytes are not those of the private network, and are not counted.
type servedConn struct {
	net.Conn
	fl   *flow
	done func()
}

// Read reads what the job sends.
func (c *servedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.fl.touch()
	return n, err
}

// Write sends to the job.
func (c *servedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.fl.touch()
	return n, err
}

// Close closes the connection and gives its place back.
func (c *servedConn) Close() error {
	defer c.done()
	return c.Conn.Close()
}
