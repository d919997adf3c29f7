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

func TestPaddedRequest(t *testing.T) {
	s := listen(t, "127.0.0.1:0")
	for _, size := range []int{0, 20, 24, 28, 552, 1280, 1452, 1472, 1473, MaxMessage, MaxMessage + 1} {
		b := PaddedRequest(TxID{1}, size)
		if want := max(headerSize, min(size, MaxMessage)&^3); len(b) != want || !IsSTUN(b) {
			t.Errorf("%d bytes for a size of %d", len(b), size)
		}
		if len(b) < len(BindingRequest(TxID{})) {
			continue // too small for its answer
		}
		c := dial(t, s, "udp4", "127.0.0.1")
		if id, mapped, err := BindingResponse(ask(t, c, b)); err != nil || id != (TxID{1}) || mapped != addrOf(c.LocalAddr()) {
			t.Errorf("the answer to %d bytes is %v (%v)", len(b), mapped, err)
		}
	}
}

// The answer comes from another port where that is asked for, and is no larger than the request.
func TestServerChangesPort(t *testing.T) {
	s := listen(t, "127.0.0.1:0")
	conn := socket(t)
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	for _, change := range []bool{false, true} {
		request := ChangeRequest(TxID{7}, change)
		if _, err := conn.WriteTo(request, s.Addr()); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, MaxMessage)
		n, from, err := conn.ReadFrom(b)
		if err != nil {
			t.Fatal(err)
		}
		id, mapped, err := BindingResponse(b[:n])
		if err != nil || id != (TxID{7}) || mapped != addrOf(conn.LocalAddr()) || n > len(request) {
			t.Errorf("%d bytes, %v, %v", n, mapped, err)
		}
		if changed := addrOf(from) != addrOf(s.Addr()); changed != change {
			t.Errorf("asked to change: %v, but the answer is from %v", change, from)
		}
	}
	settle(t, s, ServerStats{Answered: 2})
	if _, ok := AppendBindingResponse(nil, ChangeRequest(TxID{7}, false), addrOf(conn.LocalAddr())); ok {
		t.Error("a server with one port alone answers")
	}
}

func TestServerDropsChangesItCannotMake(t *testing.T) {
	s := listen(t, "127.0.0.1:0")
	c := dial(t, s, "udp4", "127.0.0.1")
	address, long := ChangeRequest(TxID{7}, false), ChangeRequest(TxID{7}, false)
	address[headerSize+attrHeader+3] = changeAddr
	long[headerSize+3] = 8 // its value now reaches into the next attribute
	for _, b := range [][]byte{address, long} {
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	ask(t, c, BindingRequest(TxID{8}))
	settle(t, s, ServerStats{Malformed: 2, Answered: 1})
}

// settle waits until a server has counted this and no more. Its readers serve in any order, and count an answer when it is on its way.
func settle(t *testing.T, s *Server, want ServerStats) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); s.Stats() != want; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("stats %+v, want %+v", s.Stats(), want)
		}
	}
}

func TestFiltering(t *testing.T) {
	server, port, addr := netip.MustParseAddrPort("203.0.113.1:1"), netip.MustParseAddrPort("203.0.113.1:2"), netip.MustParseAddrPort("203.0.113.2:1")
	answer := func(from netip.AddrPort) Answer { return Answer{Observation{Server: server, Mapped: from}, from, nil} }
	none, ignored := Answer{Observation: Observation{Server: server}}, Answer{Observation: Observation{Server: server}, From: server}
	for name, c := range map[string]struct {
		usual, changed []Answer
		want           Dependence
	}{
		"nobody":                       {want: DependenceUnknown},
		"silence":                      {[]Answer{none}, []Answer{none}, DependenceUnknown},
		"does not know the wish":       {[]Answer{answer(server)}, []Answer{ignored}, DependenceUnknown},
		"nothing comes through":        {[]Answer{answer(server)}, []Answer{none}, AddressAndPortDependent},
		"another port comes through":   {[]Answer{none}, []Answer{answer(port)}, AddressDependent},
		"another host comes through":   {[]Answer{none}, []Answer{answer(addr)}, EndpointIndependent},
		"one of two servers knows it":  {[]Answer{answer(server), answer(server)}, []Answer{ignored, none}, AddressAndPortDependent},
		"what passes weighs more":      {[]Answer{answer(server), none}, []Answer{none, answer(port)}, AddressDependent},
		"and more, and in other order": {[]Answer{none, answer(server)}, []Answer{answer(port), none}, AddressDependent},
	} {
		if got := filtering(c.usual, c.changed); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestProbeFilteringWithoutServers(t *testing.T) {
	if got, err := ProbeFiltering(t.Context(), socket(t), socket(t), nil); got != DependenceUnknown || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}
