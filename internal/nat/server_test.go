package nat

import (
	"context"
	"flag"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/pion/stun/v2"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	prepare()
	_ = flag.Set("test.parallel", "8") // however few processors there are: what is parallel here mostly waits
	goleak.VerifyTestMain(m)
}

func listen(t *testing.T, addr string) *Server {
	t.Helper()
	s, err := Listen(t.Context(), ServerOptions{Addr: addr})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// dial opens a socket of network to the server's port on loopback.
func dial(t *testing.T, s *Server, network, ip string) *net.UDPConn {
	t.Helper()
	to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(ip), s.Addr().(*net.UDPAddr).AddrPort().Port()))
	c, err := net.DialUDP(network, nil, to)
	if err != nil {
		t.Skipf("no %s on loopback here: %v", network, err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(40 * time.Second))
	return c
}

// ask sends a request and gives the answer.
func ask(t *testing.T, c *net.UDPConn, request []byte) []byte {
	t.Helper()
	if _, err := c.Write(request); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, MaxMessage)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

func TestServerAnswersBothFamilies(t *testing.T) {
	s := listen(t, ":0")
	for network, ip := range map[string]string{"udp4": "127.0.0.1", "udp6": "::1"} {
		t.Run(network, func(t *testing.T) {
			c := dial(t, s, network, ip)
			request := BindingRequest(TxID{4, 2})
			answer := ask(t, c, request)
			id, mapped, err := BindingResponse(answer)
			if want := c.LocalAddr().(*net.UDPAddr).AddrPort(); err != nil || mapped != want || id != (TxID{4, 2}) {
				t.Errorf("answer %x, %v (%v), want %v", id, mapped, err, want)
			}
			if len(answer) > len(request) {
				t.Errorf("an answer of %d bytes to a request of %d", len(answer), len(request))
			}
		})
	}
}

func TestServerAnswersPion(t *testing.T) {
	s := listen(t, "127.0.0.1:0")
	c := dial(t, s, "udp4", "127.0.0.1")
	request := stun.MustBuild(stun.TransactionID, stun.BindingRequest, stun.NewSoftware("somebody else's"), stun.Fingerprint)
	m := &stun.Message{Raw: ask(t, c, request.Raw)}
	var mapped stun.XORMappedAddress
	if err := m.Decode(); err != nil {
		t.Fatal(err)
	}
	if err := mapped.GetFrom(m); err != nil || mapped.String() != c.LocalAddr().String() {
		t.Errorf("pion reads %v (%v), want %v", mapped, err, c.LocalAddr())
	}
}

// TestServerDrops sends what must not be answered and then a good request, whose answer must come first: a socket's
// datagrams are taken in order by one reader at least, so the counters tell the rest.
func TestServerDrops(t *testing.T) {
	s := listen(t, "127.0.0.1:0")
	c := dial(t, s, "udp4", "127.0.0.1")
	sm := makeSamples(t)
	small := stun.MustBuild(stun.TransactionID, stun.BindingRequest).Raw
	for _, b := range [][]byte{
		small, {}, []byte("hello"), sm.plain[:30], sm.response, sm.check,
		stun.MustBuild(stun.TransactionID, stun.BindingRequest, stun.RawAttribute{Type: 3, Value: make([]byte, 32)}).Raw, // CHANGE-REQUEST
		stun.MustBuild(stun.TransactionID, stun.NewType(stun.MethodAllocate, stun.ClassRequest)).Raw,
		make([]byte, 3*MaxMessage),
	} {
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if id, _, err := BindingResponse(ask(t, c, sm.plain)); err != nil || id != benchCheck.ID {
		t.Errorf("answer to %x: %v", id, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if got, want := s.Stats(), (ServerStats{Answered: 1, Small: 1, Malformed: 8}); got != want {
		t.Errorf("counted %+v, want %+v", got, want)
	}
}

func TestServerEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s, err := Listen(ctx, ServerOptions{Addr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	s.readers.Wait() // ends with its context
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := Listen(t.Context(), ServerOptions{}); err == nil {
		t.Error("listens without an address")
	}
	again := listen(t, "127.0.0.1:0")
	if _, err := Listen(t.Context(), ServerOptions{Addr: again.Addr().String()}); err == nil {
		t.Error("listens twice on one address")
	}
}

// BenchmarkServer is one client that waits for each answer.
func BenchmarkServer(b *testing.B) {
	s, err := Listen(b.Context(), ServerOptions{Addr: "127.0.0.1:0"})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	c, err := net.DialUDP("udp", nil, s.Addr().(*net.UDPAddr))
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	request, buf := BindingRequest(TxID{1}), make([]byte, MaxMessage)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(request); err != nil {
			b.Fatal(err)
		}
		if _, err := c.Read(buf); err != nil {
			b.Fatal(err)
		}
	}
}
