package egress

import (
	"bytes"
	"errors"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// recorded keeps the writes that reach it.
type recorded struct {
	net.Conn
	mu     sync.Mutex
	writes [][]byte
	closed bool
	err    error
}

func (c *recorded) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, c.err
	}
	c.writes = append(c.writes, bytes.Clone(p))
	return len(p), nil
}

func (c *recorded) SetWriteDeadline(time.Time) error { return nil }

func (c *recorded) Close() error { c.closed = true; return nil }

func (c *recorded) texts() (out []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, w := range c.writes {
		out = append(out, string(w))
	}
	return out
}

func TestSmallWritesToAProxyLeaveTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := &recorded{}
		j := join(below)
		write := func(p []byte) {
			t.Helper()
			if n, err := j.Write(p); n != len(p) || err != nil {
				t.Fatal(n, err)
			}
		}
		write([]byte("one "))
		time.Sleep(joinFor / 2)
		write([]byte("two"))
		if got := below.texts(); len(got) != 0 {
			t.Fatalf("written at once: %q", got)
		}
		time.Sleep(joinFor)
		large := bytes.Repeat([]byte("x"), joinSize)
		write(large)
		write([]byte("head "))
		write(large)
		write([]byte("last"))
		if err := j.Close(); err != nil || !below.closed {
			t.Error("not closed", err)
		}
		time.Sleep(time.Second)
		want := []string{"one two", string(large), "head " + string(large), "last"}
		got := below.texts()
		if len(got) != len(want) {
			t.Fatalf("%d writes, want %d", len(got), len(want))
		}
		for i := range want {
			if got[i] != want[i] {
				t.Errorf("write %d has %d bytes, want %d", i, len(got[i]), len(want[i]))
			}
		}
	})
}

// The end of a TLS handshake waits for the request that follows it, and for it alone.
func TestHandshakesEndLeavesWithTheRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := &recorded{}
		j := join(below)
		end := string([]byte{changeCipherSpec}) + "finished "
		write := func(p string) {
			t.Helper()
			if _, err := j.Write([]byte(p)); err != nil {
				t.Fatal(err)
			}
		}
		write(end)
		time.Sleep(finishFor - time.Millisecond)
		write("request")
		time.Sleep(2 * joinFor)
		write(end)
		time.Sleep(finishFor + time.Millisecond)
		if got := below.texts(); len(got) != 2 || got[0] != end+"request" || got[1] != end {
			t.Errorf("written: %q", got)
		}
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestAFailureIsToldWithTheNextWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed := errors.New("failed")
		j := join(&recorded{err: failed})
		if _, err := j.Write([]byte("lost")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * joinFor)
		if _, err := j.Write([]byte("next")); !errors.Is(err, failed) {
			t.Errorf("got %v", err)
		}
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
}
