package forward

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/wire"
)

func roundTrip(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	_ = c.SetReadDeadline(time.Now().Add(40 * time.Second))
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatalf("read: %v", err)
	}
	if string(got) != text {
		t.Fatalf("got %q, want %q", got, text)
	}
}

func TestTCPAllowed(t *testing.T) {
	for _, network := range []string{"tcp4", "tcp6"} {
		t.Run(network, func(t *testing.T) {
			target := server(t, network, echo)
			e := newEnv(t, Limits{})
			c, err := e.dial(target)
			if err != nil {
				t.Fatal(err)
			}
			roundTrip(t, c, "through the tunnel")
			eventually(t, "the flow is counted", func() bool {
				return e.s.Counts() == wire.FlowCounts{Open: 1, Allowed: 1, BytesUp: 18, BytesDn: 18}
			})
			c.Close()
			eventually(t, "the flow ends", func() bool { return e.s.Counts().Open == 0 })
		})
	}
}

// TestTCPRefusals: what a job sees of a flow that does not come about, and how fast.
func TestTCPRefusals(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	l.Close()
	for _, c := range []struct {
		name, to string
		want     error
		denied   uint64
		failed   uint64
	}{
		{"denied", "10.1.2.3:80", syscall.ECONNREFUSED, 1, 0},
		{"denied ipv6", "[fd00::1]:80", syscall.ECONNREFUSED, 1, 0},
		{"refused", closed, syscall.ECONNREFUSED, 0, 1},
		{"gateway's own address", "198.18.0.1:22", syscall.ECONNREFUSED, 0, 0},
		{"another session", "198.18.0.3:80", syscall.ECONNREFUSED, 1, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := newEnv(t, Limits{})
			if c.name == "another session" { // the job's stack owns it, so that the packet has to be made a stranger's
				e.job.SetAddresses([]netip.Addr{job4, job6})
			}
			start := time.Now()
			_, err := e.dial(c.to)
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if took := time.Since(start); took > time.Second {
				t.Errorf("took %v: a refusal is no timeout", took)
			}
			eventually(t, "the flow is gone", func() bool { return e.s.Counts().Open == 0 })
			if n := e.s.Counts(); n.Denied != c.denied || n.Failed != c.failed {
				t.Errorf("counts: %+v", n)
			}
		})
	}
}

// TestTCPUnreachable: an address of TEST-NET that the host has no way to gives an ICMP error, not a reset. A dial that
// times out at once stands in for a network that swallows packets.
func TestTCPUnreachable(t *testing.T) {
	e := newEnv(t, Limits{DialTimeout: time.Nanosecond})
	e.s.SetScope(e.grants.scope(func(policy.Flow) bool { return true }))
	for _, to := range []string{"192.0.2.1:80", "[2001:db8::1]:80"} {
		_, err := e.dial(to)
		if !errors.Is(err, syscall.EHOSTUNREACH) && !errors.Is(err, syscall.ENETUNREACH) {
			t.Errorf("%s: got %v, want host or network unreachable", to, err)
		}
	}
	if n := e.s.Counts(); n.Failed != 2 || n.Denied != 0 {
		t.Errorf("counts: %+v", n)
	}
}

// TestTCPHalfClose: each side can end its half while the other goes on.
func TestTCPHalfClose(t *testing.T) {
	target := server(t, "tcp4", func(c *net.TCPConn) { // counts until the job has ended, then answers
		n, _ := io.Copy(io.Discard, c)
		fmt.Fprintf(c, "%d bytes", n)
	})
	e := newEnv(t, Limits{})
	c, err := e.dial(target)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(c, "twelve bytes")
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if err != nil || string(got) != "12 bytes" {
		t.Errorf("got %q, %v", got, err)
	}
	c.Close()
	eventually(t, "the flow ends", func() bool { return e.s.Counts().Open == 0 })

	early := server(t, "tcp4", func(c *net.TCPConn) { // ends its half at once, then listens
		_ = c.CloseWrite()
		_, _ = io.Copy(io.Discard, c)
	})
	c, err = e.dial(early)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the target's end: %v", err)
	}
	if _, err := io.WriteString(c, "still talking"); err != nil {
		t.Errorf("the job's half: %v", err)
	}
	c.Close()
	eventually(t, "the flow ends", func() bool { return e.s.Counts().Open == 0 })
}

// TestTCPTransfer sends 100 MB each way at the same time and compares checksums.
func TestTCPTransfer(t *testing.T) {
	const size = 100 << 20
	sums := make(chan [32]byte, 1)
	target := server(t, "tcp4", func(c *net.TCPConn) {
		var work sync.WaitGroup
		got := sha256.New()
		work.Go(func() { _, _ = io.Copy(got, c) })
		_, _ = io.Copy(c, random(2, size))
		_ = c.CloseWrite()
		work.Wait()
		sums <- sum(got)
	})
	e := newEnv(t, Limits{})
	c, err := e.dial(target)
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		_, _ = io.Copy(c, random(1, size))
		_ = c.(interface{ CloseWrite() error }).CloseWrite()
	})
	down := sha256.New()
	if n, err := io.Copy(down, c); n != size || err != nil {
		t.Errorf("down: %d bytes, %v", n, err)
	}
	work.Wait()
	if sum(down) != sumOf(2, size) {
		t.Error("down: wrong checksum")
	}
	if <-sums != sumOf(1, size) {
		t.Error("up: wrong checksum")
	}
	if n := e.s.Counts(); n.BytesUp != size || n.BytesDn != size {
		t.Errorf("counts: %+v", n)
	}
	c.Close()
}

func random(seed byte, n int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{seed}), n)
}

func sumOf(seed byte, n int64) [32]byte {
	h := sha256.New()
	_, _ = io.Copy(h, random(seed, n))
	return sum(h)
}

func sum(h hash.Hash) [32]byte { return [32]byte(h.Sum(nil)) }

func TestTCPManyFlows(t *testing.T) {
	target := server(t, "tcp4", echo)
	e := newEnv(t, Limits{})
	var work sync.WaitGroup
	for i := range 200 {
		work.Go(func() {
			c, err := e.dial(target)
			if err != nil {
				t.Errorf("flow %d: %v", i, err)
				return
			}
			defer c.Close()
			text := fmt.Sprintf("flow %d", i)
			got := make([]byte, len(text))
			_, _ = io.WriteString(c, text)
			if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
				t.Errorf("flow %d: got %q, %v", i, got, err)
			}
		})
	}
	work.Wait()
	eventually(t, "the flows end", func() bool { return e.s.Counts().Open == 0 })
	if n := e.s.Counts(); n.Allowed != 200 {
		t.Errorf("counts: %+v", n)
	}
	if n := e.f.flows.Load(); n != 0 {
		t.Errorf("%d flows counted in all", n)
	}
}

func TestTCPLimits(t *testing.T) {
	target := server(t, "tcp4", echo)
	for name, limits := range map[string]Limits{
		"session": {SessionFlows: 2},
		"total":   {TotalFlows: 2},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, limits)
			for range 2 {
				if _, err := e.dial(target); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := e.dial(target); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("the third flow: %v", err)
			}
			if n := e.s.Counts(); n.Open != 2 || n.Limited != 1 || n.Denied != 0 {
				t.Errorf("counts: %+v", n)
			}
		})
	}
}

// TestLastFlowsAreForOthers: a session that takes all that it can get leaves the last quarter of the gateway's flows to one that has fewer.
func TestLastFlowsAreForOthers(t *testing.T) {
	target := netip.MustParseAddrPort(server(t, "tcp4", echo))
	e := newEnv(t, Limits{TotalFlows: 8})
	e.add("session-2", other4)
	for i, want := range []error{nil, nil, nil, nil, nil, nil, syscall.ECONNREFUSED} {
		if _, err := e.dialFrom(job4, target, 20*time.Second); (err == nil) != (want == nil) {
			t.Fatalf("flow %d of the first: %v, want %v", i+1, err, want)
		}
	}
	for i := range 2 {
		if _, err := e.dialFrom(other4, target, 20*time.Second); err != nil {
			t.Errorf("flow %d of the second: %v", i+1, err)
		}
	}
}

// TestTCPRate: a flow over the rate is not refused but waits for the job's next SYN.
func TestTCPRate(t *testing.T) {
	target := server(t, "tcp4", echo)
	e := newEnv(t, Limits{SessionRate: 1})
	if _, err := e.dial(target); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if _, err := e.dial(target); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took < 500*time.Millisecond {
		t.Errorf("the second flow came after %v, at a rate of one a second", took)
	}
}

// reset waits for a connection to be reset.
func reset(t *testing.T, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(40 * time.Second))
	_, err := c.Read(make([]byte, 1))
	var timeout net.Error
	if err == nil || err == io.EOF || errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("read gave %v, want a reset", err)
	}
}

// talking gives a connection over which both sides have spoken, and how the target saw it end.
func talking(t *testing.T) (e *env, c net.Conn, ended <-chan error) {
	t.Helper()
	end := make(chan error, 1)
	target := server(t, "tcp4", func(c *net.TCPConn) {
		_, err := io.Copy(c, c)
		end <- err
	})
	e = newEnv(t, Limits{})
	c, err := e.dial(target)
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c, "x")
	return e, c, end
}

func TestResets(t *testing.T) {
	for name, end := range map[string]func(*env){
		"removed": func(e *env) { e.f.Remove(e.s) },
		"rescope": func(e *env) { e.s.SetScope(e.grants.scope(nothing)) },
		"idle":    func(e *env) { e.f.sweep(time.Now().Add(3 * time.Hour)) },
		"closed":  func(e *env) { e.f.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			e, c, ended := talking(t)
			end(e)
			reset(t, c)
			if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the target saw %v, want a reset", err)
			}
			eventually(t, "the flow ends", func() bool { return e.s.Counts().Open == 0 })
		})
	}
}

// TestResetIsNoEnd: a flow whose reset has come to the target only so far is not ended in good order towards the job, or what was
// cut off would look whole.
func TestResetIsNoEnd(t *testing.T) {
	e, c, ended := talking(t)
	fl, seen := e.s.open()[0], make(chan struct{})
	fl.mu.Lock()
	last := len(fl.abort) - 1 // the job's side
	fl.abort = slices.Insert(fl.abort, last, func() { <-seen })
	fl.mu.Unlock()
	var resetting sync.WaitGroup
	resetting.Go(func() { fl.reset(wire.CauseIdle) })
	defer resetting.Wait()
	defer close(seen)
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the target saw %v, want a reset", err)
	}
	_ = c.(interface{ CloseWrite() error }).CloseWrite() // has the gateway find out that the target is gone
	reset(t, c)
}

// TestRescopeKeeps: a flow that the new scope still gives goes on.
func TestRescopeKeeps(t *testing.T) {
	target := server(t, "tcp4", echo)
	e := newEnv(t, Limits{})
	c, err := e.dial(target)
	if err != nil {
		t.Fatal(err)
	}
	e.s.SetScope(e.grants.scope(onLoopback))
	e.f.sweep(time.Now())
	roundTrip(t, c, "still there")
}

// TestTargetResets: a target that resets is seen to reset; one that answers and closes early is heard out.
func TestTargetResets(t *testing.T) {
	target := server(t, "tcp4", func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 1))
		_ = c.SetLinger(0)
	})
	e := newEnv(t, Limits{})
	c, err := e.dial(target)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(c, "x")
	reset(t, c)
}

func TestSourcesAndSessions(t *testing.T) {
	target := netip.MustParseAddrPort(server(t, "tcp4", echo))
	e := newEnv(t, Limits{})
	if _, err := e.dialFrom(stranger, target, 300*time.Millisecond); err == nil {
		t.Error("a source without a session got through")
	}
	if n := e.gateway.Stats().Filtered; n == 0 {
		t.Error("the stranger's packets were not counted")
	}
	second := e.add("session-2", other4)
	c, err := e.dialFrom(other4, target, 20*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c, "second")
	if a, b := e.s.Counts().Allowed, second.Counts().Allowed; a != 0 || b != 1 {
		t.Errorf("flows: %d and %d, want 0 and 1", a, b)
	}
	if _, err := e.f.Add("session-3", []netip.Addr{other4}, e.scope); err == nil {
		t.Error("an address was given twice")
	}
	if _, err := e.f.Add("session-4", []netip.Addr{gateway4}, e.scope); err == nil {
		t.Error("the gateway's own address was given away")
	}
	e.f.Remove(second)
	e.f.Remove(second)
	reset(t, c)
	if _, err := e.dialFrom(other4, target, 300*time.Millisecond); err == nil {
		t.Error("a removed session got through")
	}
}

// TestGatewayServes: what the gateway listens on at its own address is served, not forwarded.
func TestGatewayServes(t *testing.T) {
	e := newEnv(t, Limits{})
	at := netip.AddrPortFrom(gateway4, wire.InsidePort)
	l, err := e.gateway.ListenTCP(at)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	seen := make(chan string, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		seen <- c.RemoteAddr().(*net.TCPAddr).IP.String()
		_, _ = io.Copy(c, c)
		c.Close()
	}()
	c, err := e.dial(at.String())
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c, "inside")
	if got := <-seen; got != job4.String() {
		t.Errorf("the gateway sees the job at %s, want %s", got, job4)
	}
	if n := e.s.Counts(); n.Allowed+n.Denied != 0 {
		t.Errorf("a local connection was counted as a flow: %+v", n)
	}
	c.Close()
}

func at(a netip.AddrPort) Target { return Target{Addr: a.Addr(), Port: a.Port()} }

func TestReach(t *testing.T) {
	target := netip.MustParseAddrPort(server(t, "tcp4", echo))
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := netip.MustParseAddrPort(l.Addr().String())
	l.Close()
	e := newEnv(t, Limits{})
	if r := e.s.Reach(at(target)); r.Verdict != wire.Reachable || r.RTT <= 0 || r.Rule != "test" {
		t.Errorf("reachable: %+v", r)
	}
	if r := e.s.Reach(at(closed)); r.Verdict != wire.Unreachable || r.Reason != "connection refused" {
		t.Errorf("closed port: %+v", r)
	}
	if r := e.s.Reach(at(netip.MustParseAddrPort("10.0.0.1:80"))); r.Verdict != wire.FlowDenied || r.Reason != "not granted" || r.Next == "" {
		t.Errorf("denied: %+v", r)
	}
	if n := e.s.Counts(); n.Open != 0 || n.Allowed != 2 || n.Denied != 1 || n.Failed != 1 {
		t.Errorf("counts: %+v", n)
	}
	e.f.Remove(e.s)
	if r := e.s.Reach(at(target)); r.Verdict != wire.FlowDenied || r.Next != "" { // no policy opens it again
		t.Errorf("after the end: %+v", r)
	}
}

// TestCloseUnderTraffic tears everything down in the middle of transfers, device first or forwarder first.
func TestCloseUnderTraffic(t *testing.T) {
	target := server(t, "tcp4", echo)
	for _, first := range []string{"forwarder", "device"} {
		t.Run(first, func(t *testing.T) {
			e := newEnv(t, Limits{})
			var work sync.WaitGroup
			for range 8 {
				c, err := e.dial(target)
				if err != nil {
					t.Fatal(err)
				}
				work.Go(func() { _, _ = io.Copy(c, random(1, 1<<30)) })
				work.Go(func() { _, _ = io.Copy(io.Discard, c) })
			}
			eventually(t, "traffic flows", func() bool { return e.s.Counts().BytesDn > 4<<20 })
			if first == "device" {
				e.gateway.Close()
			}
			e.f.Close()
			e.job.Close()
			work.Wait()
		})
	}
}

// TestUnreadBytesCountAsAFlow: a job that closes its half and reads nothing makes the gateway hold what the target sent.
func TestUnreadBytesCountAsAFlow(t *testing.T) {
	const size = 512 << 10
	target := server(t, "tcp4", func(c *net.TCPConn) { _, _ = c.Write(make([]byte, size)) })
	e := newEnv(t, Limits{})
	var wq waiter.Queue
	ep, terr := e.job.Stack().NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &wq)
	if terr != nil {
		t.Fatal(terr)
	}
	ep.SocketOptions().SetReceiveBufferSize(4096, true)
	c := gonet.NewTCPConn(&wq, ep)
	defer c.Close()
	ep.Connect(full(netip.MustParseAddrPort(target)))
	eventually(t, "the job connects", func() bool { return tcp.EndpointState(ep.State()) == tcp.StateEstablished })
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the gateway takes what the target sends", func() bool { return e.s.Counts().BytesDn == size })
	time.Sleep(100 * time.Millisecond) // nothing is to happen
	if open := e.s.Counts().Open; open != 1 {
		t.Errorf("%d flows are open while bytes wait for the job", open)
	}
	if n, err := io.Copy(io.Discard, c); n != size || err != nil {
		t.Errorf("the job reads %d bytes, %v", n, err)
	}
	eventually(t, "the flow ends", func() bool { return e.s.Counts().Open == 0 })
}
