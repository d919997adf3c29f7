package egress

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/cork"
)

// Small writes to a proxy wait this long for the next one, so that they leave in one segment. Many proxies keep TCP_NODELAY off: of two
// small segments they hold the second back until the far end has acknowledged the first, which takes a round trip and often 40 ms
// more. The end of a TLS handshake and the first request are such a pair, or an acknowledgement and the answer that follows it.
const (
	joinFor  = 2 * time.Millisecond
	joinSize = 1200 // bytes; more is written at once

	// The end of a TLS handshake waits longer, until there is the request that always follows.
	finishFor        = 30 * time.Millisecond
	changeCipherSpec = 20 // begins the client's last flight (RFC 8446, appendix D.4)
)

// joined is a connection to a proxy.
type joined struct {
	net.Conn
	quick func() // acknowledges what was received at once

	mu    sync.Mutex
	held  []byte
	timer *time.Timer
	err   error // of writing what was held
}

func join(below net.Conn) *joined {
	j := &joined{Conn: below, quick: func() {}}
	if t, ok := below.(*net.TCPConn); ok {
		j.quick = cork.Acknowledger(t)
	}
	j.timer = time.AfterFunc(time.Hour, j.flush)
	j.timer.Stop()
	return j
}

// quickSize is the size of reads, in bytes, that are acknowledged at once: a proxy that keeps TCP_NODELAY off holds back what
// follows a small segment, on the way to us as well. Where much comes in it does not matter.
const quickSize = 4 << 10

// Read reads from the connection below.
func (j *joined) Read(p []byte) (int, error) {
	n, err := j.Conn.Read(p)
	if 0 < n && n <= quickSize {
		j.quick()
	}
	return n, err
}

// NetConn gives the connection below, as [crypto/tls.Conn] does.
func (j *joined) NetConn() net.Conn { return j.Conn }

// Write writes p, at once or within joinFor. The error of a write that came later is given by the next one.
func (j *joined) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err != nil {
		return 0, j.err
	}
	if len(j.held)+len(p) < joinSize {
		switch {
		case len(j.held) == 0 && len(p) > 0 && p[0] == changeCipherSpec:
			j.timer.Reset(finishFor)
		case len(j.held) == 0 || j.held[0] == changeCipherSpec:
			j.timer.Reset(joinFor)
		}
		j.held = append(j.held, p...)
		return len(p), nil
	}
	if len(j.held) == 0 {
		return j.Conn.Write(p)
	}
	j.held = append(j.held, p...)
	if j.send(); j.err != nil {
		return 0, j.err
	}
	return len(p), nil
}

// send writes what is held. mu is held.
func (j *joined) send() {
	if len(j.held) > 0 && j.err == nil {
		_, j.err = j.Conn.Write(j.held)
	}
	if j.held = j.held[:0]; cap(j.held) > 4*joinSize {
		j.held = nil
	}
}

func (j *joined) flush() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.send()
}

// Close sends what is held and closes the connection. It does not wait for a write that does not get on.
func (j *joined) Close() error {
	j.timer.Stop()
	if j.mu.TryLock() {
		if len(j.held) > 0 {
			_ = j.SetWriteDeadline(time.Now().Add(time.Second))
			j.send()
		}
		j.mu.Unlock()
	}
	return j.Conn.Close()
}

// joining makes a dialler of one that joins small writes to proxies; to all else it dials as before.
func (t *Transport) joining(dial dialFunc) dialFunc {
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err == nil && t.proxies[addr] {
			conn = join(conn)
		}
		return conn, err
	}
}

type dialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)
