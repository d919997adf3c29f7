package forward

import (
	"io"
	"net"
	"testing"
)

// BenchmarkThroughput sends one TCP stream through job's stack, wire, gateway's stack and forwarder to a server on
// loopback (up) or from it (down). One operation is a megabyte.
func BenchmarkThroughput(b *testing.B) {
	const op = 1 << 20
	chunk := make([]byte, 256<<10)
	b.Run("up", func(b *testing.B) {
		received := make(chan int64, 1)
		target := server(b, "tcp4", func(c *net.TCPConn) {
			n, _ := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 256<<10))
			received <- n
		})
		c := benchmarkConn(b, target)
		b.SetBytes(op)
		b.ReportAllocs()
		b.ResetTimer()
		for range b.N * op / len(chunk) {
			if _, err := c.Write(chunk); err != nil {
				b.Fatal(err)
			}
		}
		_ = c.(interface{ CloseWrite() error }).CloseWrite()
		if n := <-received; n != int64(b.N)*op {
			b.Fatalf("%d bytes arrived", n)
		}
	})
	b.Run("down", func(b *testing.B) {
		target := server(b, "tcp4", func(c *net.TCPConn) {
			for {
				if _, err := c.Write(chunk); err != nil {
					return
				}
			}
		})
		c := benchmarkConn(b, target)
		b.SetBytes(op)
		b.ReportAllocs()
		b.ResetTimer()
		buf := make([]byte, 256<<10)
		for left := b.N * op; left > 0; {
			n, err := c.Read(buf)
			if err != nil {
				b.Fatal(err)
			}
			left -= n
		}
		b.StopTimer()
		c.Close()
	})
}

func benchmarkConn(b *testing.B, target string) net.Conn {
	b.Helper()
	c, err := newEnv(b, Limits{}).dial(target)
	if err != nil {
		b.Fatal(err)
	}
	return c
}

// BenchmarkConnect opens and closes a flow with one byte each way.
func BenchmarkConnect(b *testing.B) {
	target := server(b, "tcp4", echo)
	e := newEnv(b, Limits{SessionRate: 1 << 20})
	one := []byte{1}
	b.ReportAllocs()
	for b.Loop() {
		c, err := e.dial(target)
		if err != nil {
			b.Fatal(err)
		}
		_, _ = c.Write(one)
		_, _ = io.ReadFull(c, one)
		c.Close()
	}
}
