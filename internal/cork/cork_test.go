package cork_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/internal/cork"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// counted counts the writes that reach it and keeps what was written.
type counted struct {
	net.Conn
	mu     sync.Mutex
	writes int
	got    bytes.Buffer
	err    error
}

func (c *counted) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, c.err
	}
	c.writes++
	return c.got.Write(p)
}

func TestHoldsBack(t *testing.T) {
	below := &counted{}
	c := cork.New(below)
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<10)
	for _, step := range []struct {
		name   string
		pieces int
		size   int
		writes int // that reach the connection below
	}{
		{"a message", 4, 16 << 10, 1},
		{"nothing", 0, 0, 0},
		{"more than is held", 20, 10 << 10, 2},
	} {
		below.writes = 0
		below.got.Reset()
		c.Cork()
		for range step.pieces {
			if n, err := c.Write(want[:step.size]); n != step.size || err != nil {
				t.Fatal(n, err)
			}
		}
		if err := c.Uncork(); err != nil {
			t.Fatal(err)
		}
		if below.writes != step.writes || !bytes.Equal(below.got.Bytes(), bytes.Repeat(want[:step.size], step.pieces)) {
			t.Errorf("%s: %d bytes in %d writes, want %d in %d", step.name, below.got.Len(), below.writes, step.pieces*step.size, step.writes)
		}
	}
	below.writes = 0
	for range 3 {
		_, _ = c.Write(want)
	}
	if below.writes != 3 {
		t.Errorf("3 writes without a cork became %d", below.writes)
	}
}

// TestFailure: the error of a write that was held back comes with Uncork, and is forgotten with the next Cork.
func TestFailure(t *testing.T) {
	failed := errors.New("failed")
	below := &counted{err: failed}
	c := cork.New(below)
	c.Cork()
	if _, err := c.Write([]byte("word")); err != nil {
		t.Errorf("what is held back fails at once: %v", err)
	}
	if err := c.Uncork(); !errors.Is(err, failed) {
		t.Errorf("Uncork gives %v", err)
	}
	below.err = nil
	c.Cork()
	_, _ = c.Write([]byte("word"))
	if err := c.Uncork(); err != nil || below.got.String() != "word" {
		t.Errorf("%q, %v", &below.got, err)
	}
}

// TestUnderTLS: a message of many records leaves in one write, and comes out whole.
func TestUnderTLS(t *testing.T) {
	web := httptest.NewUnstartedServer(nil)
	web.StartTLS()
	defer web.Close()
	a, b := net.Pipe()
	below := &piped{Conn: a}
	server := tls.Server(cork.New(below), &tls.Config{Certificates: web.TLS.Certificates})
	client := tls.Client(b, &tls.Config{InsecureSkipVerify: true}) //nolint:gosec // a test of writes
	want := bytes.Repeat([]byte("culvert "), 8<<10)
	var reader sync.WaitGroup
	got := make([]byte, len(want))
	reader.Go(func() { _, _ = io.ReadFull(client, got) })
	if err := server.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	c := cork.Of(server)
	if c == nil {
		t.Fatal("there is nothing to cork below TLS")
	}
	before := below.writes
	c.Cork()
	if _, err := server.Write(want); err != nil {
		t.Fatal(err)
	}
	if err := c.Uncork(); err != nil {
		t.Fatal(err)
	}
	reader.Wait()
	if n := below.writes - before; n != 1 || !bytes.Equal(got, want) {
		t.Errorf("%d writes, equal %t", n, bytes.Equal(got, want))
	}
	_ = b.Close()
	_ = a.Close()
}

// piped counts writes; one goroutine writes.
type piped struct {
	net.Conn
	writes int
}

func (p *piped) Write(b []byte) (int, error) {
	p.writes++
	return p.Conn.Write(b)
}

// TestInterrupt: whoever waits in Uncork for a peer that takes nothing is set free, and nothing else is disturbed.
func TestInterrupt(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	c := cork.New(a)
	c.Interrupt()
	if err := a.SetDeadline(time.Time{}); err != nil {
		t.Fatalf("an idle connection was closed: %v", err)
	}
	c.Cork()
	_, _ = c.Write([]byte("word"))
	done := make(chan error)
	go func() { done <- c.Uncork() }()
	for {
		c.Interrupt()
		select {
		case err := <-done:
			if err == nil {
				t.Error("Uncork wrote to a peer that takes nothing")
			}
			return
		case <-time.After(time.Millisecond):
		}
	}
}

// TestEnds: what is accepted and what is dialled can be corked, and other connections cannot.
func TestEnds(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l = cork.Listener(l)
	defer l.Close()
	dial := cork.Dialer(nil)
	a, err := dial(context.Background(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if cork.Of(a) == nil || cork.Of(b) == nil || cork.Of(tls.Client(a, nil)) == nil {
		t.Error("there is nothing to cork")
	}
	if p, q := net.Pipe(); cork.Of(p) != nil || cork.Of(nil) != nil {
		t.Error("a pipe can be corked")
		_ = q
	}
	_ = l.Close()
	if _, err := l.Accept(); err == nil {
		t.Error("a closed listener accepts")
	}
	if _, err := dial(context.Background(), "tcp", l.Addr().String()); err == nil {
		t.Error("a closed listener is reached")
	}
}
