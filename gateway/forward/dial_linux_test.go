package forward

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDialTCP: a connection carries both ways, half-closes and takes its options; one that is refused says so.
func TestDialTCP(t *testing.T) {
	for _, network := range []string{"tcp4", "tcp6"} {
		to := netip.MustParseAddrPort(server(t, network, echo))
		conn, err := dialTCP(t.Context(), to)
		if err != nil {
			t.Fatal(err)
		}
		c := conn.(tcpConn)
		if remote(c) != to {
			t.Errorf("connected to %v, want %v", c.RemoteAddr(), to)
		}
		if own := c.LocalAddr().(*net.TCPAddr); !own.IP.IsLoopback() || own.Port == 0 {
			t.Errorf("the own address is %v", own)
		}
		_, err = io.WriteString(c, "question")
		if err = errors.Join(err, c.CloseWrite()); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); string(got) != "question" || err != nil {
			t.Errorf("got %q, %v", got, err)
		}
		(&relay{conn: c}).keepTarget()
		raw, _ := c.SyscallConn()
		_ = raw.Control(func(fd uintptr) {
			for option, want := range map[int]int{unix.TCP_NODELAY: 1, unix.TCP_KEEPIDLE: 60, unix.TCP_KEEPINTVL: 15, unix.TCP_KEEPCNT: 8} {
				if got, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, option); got != want || err != nil {
					t.Errorf("option %d is %d, %v, want %d", option, got, err, want)
				}
			}
			if on, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE); on == 0 || err != nil {
				t.Errorf("no keepalives: %v", err)
			}
		})
		resetConn(c)
		if err := c.CloseWrite(); err == nil {
			t.Error("a closed connection can be closed once more")
		}
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	to := netip.MustParseAddrPort(l.Addr().String())
	_ = l.Close()
	if _, err = dialTCP(t.Context(), to); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a closed port: %v", err)
	}
	to = netip.AddrPortFrom(netip.AddrFrom16(to.Addr().As16()), to.Port())
	if _, err = dialTCP(t.Context(), to); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a closed port of a mapped address: %v", err)
	}
}

// TestDialTCPEnds: a dial that is not answered ends with its context.
func TestDialTCPEnds(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	to := netip.AddrPortFrom(loopback, uint16(name.(*unix.SockaddrInet4).Port))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	const dials = 8 // more than the queue of who never accepts
	results := make(chan error, dials)
	var work sync.WaitGroup
	for range dials {
		work.Go(func() {
			c, err := dialTCP(ctx, to)
			if err == nil {
				_ = c.Close()
			}
			results <- err
		})
	}
	if err := <-results; err != nil {
		t.Errorf("the first dial: %v", err)
	}
	cancel()
	work.Wait()
	close(results)
	ended := 0
	for err := range results {
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if err != nil {
			ended++
		}
	}
	if ended == 0 {
		t.Error("every dial was answered")
	}
}

// TestDialNoBroadcast: no socket of a flow sends to all hosts of a network, which this one is of as well.
func TestDialNoBroadcast(t *testing.T) {
	conn, err := dial(t.Context(), "udp", netip.MustParseAddrPort("127.255.255.255:9"))
	if !errors.Is(err, syscall.EACCES) {
		t.Errorf("connected to a broadcast address: %v, %v", conn, err)
	}
	if err == nil {
		_ = conn.Close()
	}
}
