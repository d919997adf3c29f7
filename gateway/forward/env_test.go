package forward

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/netstack/netstacktest"
	"github.com/culvertnet/culvert/internal/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	gateway4 = netip.MustParseAddr("198.18.0.1")
	gateway6 = netip.MustParseAddr("fd63:756c:7665:7274::c612:1")
	job4     = netip.MustParseAddr("198.18.0.2")
	job6     = netip.MustParseAddr("fd63:756c:7665:7274::c612:2")
	other4   = netip.MustParseAddr("198.18.0.3")
	stranger = netip.MustParseAddr("198.18.0.9")
	loopback = netip.MustParseAddr("127.0.0.1")
)

// env is a job's network stack and a gateway's with a wire between them; targets are real servers on loopback.
type env struct {
	t       testing.TB
	job     *netstack.Device // owns the addresses of two sessions and a stranger
	gateway *netstack.Device
	wire    *netstacktest.Wire
	f       *Forwarder
	s       *Session
	scope   *policy.Scope
	grants  *grants
	errors  chan header.ICMPv4 // ICMPv4 errors that the gateway sends
	deaf    atomic.Bool        // nothing reaches the first session's job
}

// grants stands in for the policy: what each scope allows.
type grants struct {
	mu sync.Mutex
	by map[*policy.Scope]func(policy.Flow) bool
}

func (g *grants) scope(allow func(policy.Flow) bool) *policy.Scope {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := new(policy.Scope)
	g.by[s] = allow
	return s
}

func (g *grants) decide(s *policy.Scope, f policy.Flow) policy.Verdict {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.by[s](f) {
		return policy.Verdict{Allowed: true, Rule: "test"}
	}
	return policy.Verdict{Reason: "not granted"}
}

// onLoopback allows 127.0.0.1 and ::1, every port and protocol.
func onLoopback(f policy.Flow) bool { return f.Dst.Addr().IsLoopback() }

func nothing(policy.Flow) bool { return false }

func newEnv(t testing.TB, limits Limits) *env {
	t.Helper()
	e := &env{t: t, wire: new(netstacktest.Wire), grants: &grants{by: map[*policy.Scope]func(policy.Flow) bool{}}}
	e.job = e.device(netstack.Options{Addresses: []netip.Addr{job4, job6, other4, stranger}})
	e.gateway = e.device(netstack.Options{Addresses: []netip.Addr{gateway4, gateway6}, Forward: true})
	f, err := New(Options{Device: e.gateway, Local: []netip.Addr{gateway4, gateway6}, Limits: limits})
	if err != nil {
		t.Fatal(err)
	}
	f.decide = e.grants.decide
	e.f = f
	e.errors = make(chan header.ICMPv4, 16)
	e.wire.Drop = func(fromA bool, packet []byte) bool {
		if ip := header.IPv4(packet); !fromA && packet[0]>>4 == 4 && ip.TransportProtocol() == header.ICMPv4ProtocolNumber {
			e.errors <- append(header.ICMPv4(nil), ip.Payload()...)
		}
		return !fromA && e.deaf.Load() && packet[0]>>4 == 4 && header.IPv4(packet).DestinationAddress() == full(netip.AddrPortFrom(job4, 0)).Addr
	}
	e.wire.Connect(e.job, e.gateway)
	t.Cleanup(e.close)
	e.scope = e.grants.scope(onLoopback)
	e.s = e.add("session-1", job4, job6)
	return e
}

func (e *env) device(opts netstack.Options) *netstack.Device {
	d, err := netstack.New(opts)
	if err != nil {
		e.t.Fatal(err)
	}
	return d
}

func (e *env) close() {
	if err := e.f.Close(); err != nil {
		e.t.Error(err)
	}
	e.job.Close()
	e.gateway.Close()
	e.wire.Wait()
}

func (e *env) add(id string, addrs ...netip.Addr) *Session {
	s, err := e.f.Add(id, addrs, e.scope)
	if err != nil {
		e.t.Fatal(err)
	}
	return s
}

// dial opens a TCP connection from the job's first address, with time enough for a busy machine.
func (e *env) dial(to string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return e.job.DialContext(ctx, "tcp", to)
}

// dialFrom opens a TCP connection from any of the job's addresses.
func (e *env) dialFrom(from netip.Addr, to netip.AddrPort, wait time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	return gonet.DialTCPWithBind(ctx, e.job.Stack(), full(netip.AddrPortFrom(from, 0)), full(to), ipv4.ProtocolNumber)
}

func full(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFromSlice(a.Addr().AsSlice()), Port: a.Port()}
}

// server is a TCP server on loopback that gives each connection to handle.
func server(t testing.TB, network string, handle func(*net.TCPConn)) string {
	t.Helper()
	address := "127.0.0.1:0"
	if network == "tcp6" {
		address = "[::1]:0"
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Skipf("listen on %s: %v", address, err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer c.Close()
				handle(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		conns.Wait()
	})
	return l.Addr().String()
}

// echo sends back what it gets and ends when the other side does.
func echo(c *net.TCPConn) { _, _ = io.Copy(c, c) }

// eventually waits for a condition that other goroutines bring about.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within half a minute", what)
		}
		time.Sleep(time.Millisecond) // polls real sockets and stacks, whose time cannot be faked
	}
}
