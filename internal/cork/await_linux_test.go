package cork_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http/httptest"
	"sync"
	"testing"

	"github.com/culvertnet/culvert/internal/cork"
)

// TestDry: a read that would have to wait says so, TLS goes on after it, also in the middle of a record, and whoever awaits what comes
// next is woken by it.
func TestDry(t *testing.T) {
	web := httptest.NewUnstartedServer(nil)
	web.StartTLS()
	defer web.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var sender sync.WaitGroup
	defer sender.Wait()
	steps, want := make(chan int), bytes.Repeat([]byte("word"), 200) // one record
	defer close(steps)
	sender.Go(func() {
		raw, err := l.Accept()
		if err != nil {
			return
		}
		defer raw.Close()
		held := &halves{Conn: raw, steps: steps}
		server := tls.Server(held, &tls.Config{Certificates: web.TLS.Certificates, SessionTicketsDisabled: true})
		if server.Handshake() == nil {
			held.slow = true
			_, _ = server.Write(want)
		}
	})
	dialled, err := cork.Dialer(nil)(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialled.Close()
	client, below := tls.Client(dialled, &tls.Config{InsecureSkipVerify: true}), cork.Of(dialled) //nolint:gosec // a test of reads
	if err := client.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 2 { // nothing, then half a record
		below.Dry(true)
		if n, err := client.Read(make([]byte, 16)); n != 0 || !errors.Is(err, cork.ErrDry) {
			t.Fatalf("a read gave %d bytes and %v", n, err)
		}
		below.Dry(false)
		steps <- 1
		below.Await()
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(client, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("what came is not what was sent: %v", err)
	}
}

// halves writes in two steps once it is slow.
type halves struct {
	net.Conn
	steps <-chan int
	slow  bool
}

func (h *halves) Write(p []byte) (int, error) {
	if !h.slow {
		return h.Conn.Write(p)
	}
	<-h.steps
	n, err := h.Conn.Write(p[:len(p)/2])
	if err != nil {
		return n, err
	}
	<-h.steps
	m, err := h.Conn.Write(p[n:])
	return n + m, err
}

// TestAwaitEnds: a connection that ends wakes who awaits, and reading it says so.
func TestAwaitEnds(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := cork.Dialer(nil)(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	other, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	other.Close()
	below := cork.Of(c)
	below.Await()
	below.Dry(true)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the end of a connection reads as %v", err)
	}
	c.Close()
	below.Await()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a closed connection reads as %v", err)
	}
}
