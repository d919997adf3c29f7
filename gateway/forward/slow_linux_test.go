package forward

import (
	"context"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSlowTargetHoldsUpNoOther: the socket of one flow is full, as it is on a slow link, for as long as it likes. The session's other
// flows go on, and nothing of the first is lost that the stack has taken.
func TestSlowTargetHoldsUpNoOther(t *testing.T) {
	e := newEnv(t, Limits{})
	socks, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn // one that nobody reads from, as yet, takes few datagrams
	for i, fd := range socks {
		file := os.NewFile(uintptr(fd), "pair")
		if ends[i], err = net.FileConn(file); err != nil {
			t.Fatal(err)
		}
		file.Close()
	}
	defer ends[1].Close()
	const slow = 9
	e.f.dial = func(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
		if to.Port() == slow {
			return ends[0], nil
		}
		return dial(ctx, network, to)
	}
	first := e.udp(netip.AddrPortFrom(loopback, slow).String())
	sent := uint64(0)
	eventually(t, "the socket is full", func() bool {
		_, _ = first.Write([]byte("datagram"))
		sent++
		up := e.s.Counts().BytesUp / 8
		return up > 0 && sent > up+20
	})
	second := e.udp(udpEcho(t).LocalAddr().String())
	for range 3 * udpTurn {
		exchange(t, second, []byte("the other flow"))
	}
	buf := make([]byte, 64)
	for range sent {
		_ = ends[1].SetReadDeadline(time.Now().Add(30 * time.Second))
		if n, err := ends[1].Read(buf); err != nil || string(buf[:n]) != "datagram" {
			t.Fatalf("%q, %v", buf[:n], err)
		}
	}
}
