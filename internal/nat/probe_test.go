package nat

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

func socket(t *testing.T) net.PacketConn {
	t.Helper()
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func addrOf(a net.Addr) netip.AddrPort { return plain(a.(*net.UDPAddr).AddrPort()) }

// mute takes datagrams and answers as script says, in order; then not at all.
func mute(t *testing.T, script ...func(request []byte, from netip.AddrPort) (answer []byte, by net.PacketConn)) netip.AddrPort {
	t.Helper()
	conn := socket(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, MaxMessage)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if len(script) == 0 {
				continue
			}
			answer, by := script[0](buf[:n], addrOf(from))
			script = script[1:]
			if by == nil {
				by = conn
			}
			_, _ = by.WriteTo(answer, from)
		}
	}()
	t.Cleanup(func() { _ = conn.Close(); <-done })
	return addrOf(conn.LocalAddr())
}

func TestProbeComparesServers(t *testing.T) {
	conn := socket(t)
	servers := []netip.AddrPort{addrOf(listen(t, "127.0.0.1:0").Addr()), addrOf(listen(t, "127.0.0.1:0").Addr())}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	seen, err := Probe(ctx, conn, servers)
	if err != nil || len(seen) != 2 {
		t.Fatalf("%v, %v", seen, err)
	}
	for i, o := range seen {
		if o.Server != servers[i] || o.Mapped != addrOf(conn.LocalAddr()) || o.RTT <= 0 {
			t.Errorf("observation %+v", o)
		}
	}
	if b := Classify(seen, []netip.AddrPort{addrOf(conn.LocalAddr())}); b.Mapping != wire.MappingEasy || !b.Direct {
		t.Errorf("loopback is %+v", b)
	}
}

// Nothing but the answer of whom was asked, to what was asked, counts. Lost requests are repeated.
func TestProbeTakesOnlyAnswers(t *testing.T) {
	right := netip.MustParseAddrPort("198.51.100.7:4000")
	wrong := netip.MustParseAddrPort("198.51.100.66:666")
	answer := func(request []byte, seen netip.AddrPort) []byte {
		b, _ := AppendBindingResponse(nil, request, seen)
		return b
	}
	other := socket(t)
	server := mute(t,
		func([]byte, netip.AddrPort) ([]byte, net.PacketConn) { return []byte("junk"), nil },
		func(b []byte, _ netip.AddrPort) ([]byte, net.PacketConn) { return answer(b, wrong), other },
		func([]byte, netip.AddrPort) ([]byte, net.PacketConn) {
			return answer(BindingRequest(TxID{9}), wrong), nil
		},
		func(b []byte, _ netip.AddrPort) ([]byte, net.PacketConn) { return answer(b, right), nil },
	)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	seen, err := Probe(ctx, socket(t), []netip.AddrPort{server})
	if err != nil || len(seen) != 1 || seen[0].Mapped != right {
		t.Fatalf("%v, %v", seen, err)
	}
}

func TestProbeGivesWhatItHas(t *testing.T) {
	silent, answering := mute(t), addrOf(listen(t, "127.0.0.1:0").Addr())
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	seen, err := Probe(ctx, socket(t), []netip.AddrPort{silent, answering})
	if ctx.Err() == nil {
		t.Fatal("did not wait for the silent server")
	}
	// On a machine busy enough nobody answers in time.
	if err != nil || len(seen) > 1 || len(seen) == 1 && seen[0].Server != answering {
		t.Fatalf("%v, %v", seen, err)
	}
}

func TestProbeWithoutAWayOut(t *testing.T) {
	conn := socket(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	// An IPv4 socket cannot send there.
	if seen, err := Probe(ctx, conn, []netip.AddrPort{netip.MustParseAddrPort("[2001:db8::1]:3478")}); err == nil {
		t.Errorf("got %v", seen)
	}
	if seen, err := Probe(ctx, conn, nil); err != nil || seen != nil {
		t.Errorf("asking nobody gives %v, %v", seen, err)
	}
	_ = conn.Close()
	if _, err := Probe(ctx, conn, []netip.AddrPort{addrOf(conn.LocalAddr())}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a closed socket gives %v", err)
	}
}
