package names

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/culvertnet/culvert/internal/wire"
)

// server answers every A query with one address, over UDP and TCP, and remembers what it was asked.
type server struct {
	addr   netip.Addr
	listen netip.AddrPort

	mu    sync.Mutex
	asked []string
	wait  sync.WaitGroup
}

// listenBoth listens on UDP and TCP on one port, which somebody may have for one of them.
func listenBoth(t *testing.T, address string) (net.PacketConn, net.Listener) {
	t.Helper()
	for try := 1; ; try++ {
		packets, err := net.ListenPacket("udp", address)
		if err != nil {
			t.Fatal(err)
		}
		stream, err := net.Listen("tcp", packets.LocalAddr().String())
		if err == nil {
			return packets, stream
		}
		packets.Close()
		if try == 16 {
			t.Fatal(err)
		}
	}
}

func newServer(t *testing.T, listen string, addr string) *server {
	t.Helper()
	s := &server{addr: netip.MustParseAddr(addr)}
	packets, stream := listenBoth(t, listen)
	s.listen = packets.LocalAddr().(*net.UDPAddr).AddrPort()
	s.wait.Go(func() {
		buf := make([]byte, maxMessage)
		for {
			n, from, err := packets.ReadFrom(buf)
			if err != nil {
				return
			}
			if answer := s.answer(buf[:n]); answer != nil {
				_, _ = packets.WriteTo(answer, from)
			}
		}
	})
	s.wait.Go(func() {
		for {
			conn, err := stream.Accept()
			if err != nil {
				return
			}
			if query, err := readFramed(conn); err == nil {
				_ = writeFramed(conn, s.answer(query))
			}
			conn.Close()
		}
	})
	t.Cleanup(func() {
		packets.Close()
		stream.Close()
		s.wait.Wait()
	})
	return s
}

func (s *server) answer(query []byte) []byte {
	header, question, err := parseQuery(query)
	if err != nil {
		return nil
	}
	s.mu.Lock()
	s.asked = append(s.asked, question.Name.String())
	s.mu.Unlock()
	msg := dnsmessage.Message{Header: dnsmessage.Header{ID: header.ID, Response: true}, Questions: []dnsmessage.Question{question}}
	if question.Type == dnsmessage.TypeA {
		msg.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: question.Name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET, TTL: 1},
			Body:   &dnsmessage.AResource{A: s.addr.As4()},
		}}
	}
	packed, err := msg.Pack()
	if err != nil {
		return nil
	}
	return packed
}

func (s *server) saw(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Contains(s.asked, name)
}

func itoa(port uint16) string { return strconv.Itoa(int(port)) }

// resolver asks one server, over network.
func resolver(network, at string) *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, network, at)
	}}
}

var testNames = wire.Names{
	Servers: []netip.Addr{netip.MustParseAddr("198.18.0.1")}, Exact: []string{"db.internal"}, Suffixes: []string{"svc.corp"},
	Services: []netip.Prefix{netip.MustParsePrefix("198.19.0.0/16")},
}

func TestForwarderSplits(t *testing.T) {
	gateway, system := newServer(t, "127.0.0.1:0", "198.19.0.7"), newServer(t, "127.0.0.1:0", "192.0.2.80")
	f := startTest(t, gateway, system)
	for _, network := range []string{"udp", "tcp"} {
		r := resolver(network, net.JoinHostPort("127.0.0.1", itoa(f.port())))
		for name, want := range map[string]string{"db.internal.": "198.19.0.7", "A.svc.corp.": "198.19.0.7", "github.com.": "192.0.2.80", "svc.corp.": "192.0.2.80"} {
			got, err := r.LookupNetIP(t.Context(), "ip4", name)
			if err != nil || len(got) != 1 || got[0].Unmap().String() != want {
				t.Errorf("%s over %s: %v, %v", name, network, got, err)
			}
		}
	}
	if gateway.saw("github.com.") || gateway.saw("svc.corp.") || system.saw("db.internal.") {
		t.Errorf("the gateway was asked for %v, the system's server for %v", gateway.asked, system.asked)
	}
}

func startTest(t *testing.T, gateway, system *server) *forwarder {
	t.Helper()
	names := testNames
	names.Servers = []netip.Addr{gateway.listen.Addr()}
	s, _ := newScope(names, nil)
	f := &forwarder{scope: s, upstream: func() []netip.AddrPort { return []netip.AddrPort{system.listen} }, log: slog.New(slog.DiscardHandler), tunnel: gateway.listen.Port()}
	if err := startForwarder(t.Context(), "127.0.0.1:0", f); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.close)
	return f
}

// A gateway may answer with service addresses only: any other would turn a granted name into a way to anywhere.
func TestForwarderDoesNotBelieveOtherAddresses(t *testing.T) {
	gateway, system := newServer(t, "127.0.0.1:0", "140.82.121.4"), newServer(t, "127.0.0.1:0", "192.0.2.80")
	f := startTest(t, gateway, system)
	got, err := resolver("udp", net.JoinHostPort("127.0.0.1", itoa(f.port()))).LookupNetIP(t.Context(), "ip4", "db.internal.")
	if err == nil {
		t.Errorf("got %v", got)
	}
	if !gateway.saw("db.internal.") {
		t.Error("the gateway was not even asked")
	}
}

func TestForwarderIgnoresWhatIsNoQuery(t *testing.T) {
	gateway, system := newServer(t, "127.0.0.1:0", "198.19.0.7"), newServer(t, "127.0.0.1:0", "192.0.2.80")
	f := startTest(t, gateway, system)
	query := pack(t, dnsmessage.Message{Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("db.internal."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}})
	response := pack(t, dnsmessage.Message{Header: dnsmessage.Header{Response: true}})
	for _, msg := range [][]byte{nil, {0}, query[:11], query[:len(query)-3], response} {
		if answer := f.answer("udp", msg); answer != nil {
			t.Errorf("%x was answered with %x", msg, answer)
		}
	}
	if f.answer("udp", query) == nil {
		t.Error("a query was not answered")
	}
}

func pack(t *testing.T, m dnsmessage.Message) []byte {
	t.Helper()
	data, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func FuzzForwarder(f *testing.F) {
	f.Add([]byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x02db\x08internal\x00\x00\x01\x00\x01"))
	f.Add([]byte("\x00\x01\x81\x80\x00\x01\x00\x01\x00\x00\x00\x00\x00\x00\x01\x00\x01\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x00\x00\x04\xc6\x13\x00\x07"))
	s, _ := newScope(testNames, nil)
	f.Fuzz(func(t *testing.T, msg []byte) {
		forwarder := &forwarder{scope: s, upstream: func() []netip.AddrPort { return nil }, log: slog.New(slog.DiscardHandler)}
		forwarder.scope.servers = nil
		if answer := forwarder.answer("udp", msg); answer != nil {
			if _, _, err := parseQuery(msg); err != nil {
				t.Errorf("no query, but an answer: %x", answer)
			}
		}
		forwarder.credible(msg)
	})
}
