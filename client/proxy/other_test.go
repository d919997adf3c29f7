package proxy

import (
	"context"
	"io"
	"net/netip"
	"testing"
)

// What is another tunnel's goes by that tunnel's proxy, by name and by address; what that one cannot reach is refused as one's own would be.
func TestAnotherTunnelsProxy(t *testing.T) {
	far := newRig(t, echoServer(t), nil)
	near := newRig(t, closedPort(t), func(o *Options) {
		o.Inside = func(netip.Addr) bool { return false }
		o.Other = func(_ context.Context, host string) (netip.AddrPort, bool) {
			return far.Addr(), host == "db.internal" || host == "gone.internal" || host == inner.String()
		}
	})
	for name, request := range map[string][]byte{"name": byName("db.internal", 80), "address": byAddr(inner, 80)} {
		conn := connect(t, near)
		if code := socks(t, conn, request); code != 0 {
			t.Fatalf("by %s: reply %d", name, code)
		}
		got := make([]byte, 5)
		if _, err := conn.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
			t.Errorf("by %s: %q, %v", name, got, err)
		}
	}
	if far.tunnelled.Load() != 2 || near.tunnelled.Load() != 0 {
		t.Errorf("%d went through the other tunnel, %d through this one", far.tunnelled.Load(), near.tunnelled.Load())
	}
	if code := socks(t, connect(t, near), byName("gone.internal", 80)); code == 0 {
		t.Error("what the other tunnel cannot reach is let through")
	}
}
