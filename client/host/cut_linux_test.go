package host

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvertnet/culvert/internal/lab"
)

// TestEstablishedConnectionsAreReset: over loopback in a network namespace of its own, because a reset takes every connection from an
// address, those of other programs too. A connection from another address, one that was opened later and the listener stay.
func TestEstablishedConnectionsAreReset(t *testing.T) {
	inNamespace(t)
	for _, local := range []string{"127.0.0.9", "::1"} {
		l, err := net.Listen("tcp", net.JoinHostPort(local, "0"))
		if err != nil {
			t.Logf("no %s here: %v", local, err)
			continue
		}
		defer l.Close()
		dial := func() (net.Conn, net.Conn) {
			c, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			s, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close(); s.Close() })
			return c, s
		}
		before, _ := dial()
		from := before.LocalAddr().(*net.TCPAddr).AddrPort().Addr()
		others, err := establishedFrom([]netip.Addr{netip.MustParseAddr("192.0.2.1")})
		if err != nil {
			lab.Skip(t, "connections cannot be listed here: %v", err)
		}
		reset, err := establishedFrom([]netip.Addr{from})
		if err != nil {
			t.Fatal(err)
		}
		after, served := dial()
		if err := others(); err != nil {
			t.Error(err)
		}
		if _, err := before.Write([]byte("x")); err != nil {
			t.Errorf("reset by another address's: %v", err)
		}
		if err := reset(); errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) {
			lab.Skip(t, "connections cannot be reset here: %v", err)
		} else if err != nil {
			t.Fatal(err)
		}
		_ = before.SetReadDeadline(time.Now().Add(40 * time.Second))
		if _, err := before.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("from %s: a connection that was open: %v", local, err)
		}
		_, _ = io.WriteString(served, "x")
		_ = after.SetReadDeadline(time.Now().Add(40 * time.Second))
		if _, err := after.Read(make([]byte, 1)); err != nil {
			t.Errorf("from %s: a later connection: %v", local, err)
		}
		if err := reset(); err != nil {
			t.Errorf("reset again: %v", err)
		}
	}
}
