package agent

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvertnet/culvert/client/agent/agenttest"
	"github.com/culvertnet/culvert/client/host"
	"github.com/culvertnet/culvert/client/proxy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

var ports atomic.Uint32

// freePort is a port that nobody has, at an address of loopback that nobody else is given.
func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf("127.77.%d.1:0", ports.Add(1)%256))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// fewHosts knows this host alone.
func fewHosts(_ context.Context, host string) ([]netip.Addr, error) {
	if host == "localhost" || host == "127.0.0.1" {
		return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

// through asks for the service behind a forward.
func through(t *testing.T, at netip.AddrPort) (string, error) {
	t.Helper()
	conn, err := net.Dial("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n")
	said, err := io.ReadAll(conn)
	return string(said), err
}

// A forward whose target nothing grants ends up at once, and says which one and what to do. One of the targets is a listener of this host,
// which the forward must not reach.
func TestForwardOutsideTheGrant(t *testing.T) {
	outside, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	reached := make(chan struct{})
	go func() {
		defer close(reached)
		if conn, err := outside.Accept(); err == nil {
			conn.Close()
			t.Error("a forward has left the tunnel")
		}
	}()
	denied := wire.ReachResult{Verdict: wire.FlowDenied, Reason: "not granted"}
	for target, verdict := range map[string]wire.ReachResult{
		outside.Addr().String(): {Verdict: wire.Reachable},
		"10.78.0.1:80":          {Verdict: wire.Reachable}, // no route leads there
		"10.77.0.5:81":          denied,                    // a route does, but the gateway says no to the port
		"web.internal:81":       denied,
		"nowhere.invalid:80":    {Verdict: wire.Reachable}, // neither granted nor known here
	} {
		t.Run(target, func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t)
			w.Gateway.Names = agenttest.ServiceNames()
			w.Gateway.Verdict = verdict
			opts := options(t, w)
			opts.lookup = fewHosts
			at := freePort(t)
			opts.Forwards = []proxy.Forward{{Listen: at, Target: target}}
			p := start(t, opts).failure(t)
			if p.Code != problem.FlowDenied || p.Code.Exit() != problem.ExitDenied || p.Next == "" {
				t.Errorf("error = %v", p)
			}
			if !strings.Contains(p.Message, target) || !strings.Contains(p.Message, "--forward from "+at.String()) {
				t.Errorf("which forward? %v", p)
			}
			if len(w.Joins()) != 1 || len(w.Ended()) != 1 {
				t.Errorf("%d joins, %d ends: a denial is not tried again, and the session is given back", len(w.Joins()), len(w.Ended()))
			}
		})
	}
	t.Cleanup(func() {
		outside.Close()
		<-reached
	})
}

// What is granted is forwarded, by name and by address, whether it answers yet or not; and nothing before there is a tunnel.
func TestForwards(t *testing.T) {
	w := agenttest.New(t)
	w.Gateway.Names = agenttest.ServiceNames()
	w.Gateway.Verdict = wire.ReachResult{Verdict: wire.Unreachable, Reason: "connection refused"}
	opts := options(t, w)
	byName, byAddr := freePort(t), freePort(t)
	opts.Forwards = []proxy.Forward{{Listen: byName, Target: "web.internal:8080"}, {Listen: byAddr, Target: "10.77.0.5:8080"}}
	early := make(chan error, 1)
	opts.Tokens = slowTokens(func() bool {
		select {
		case err := <-early:
			early <- err
			return true
		default:
			return false
		}
	})
	r := start(t, opts)
	_, err := r.within(context.Background(), "10.77.0.5:8080")
	early <- err
	if problem.CodeOf(err) != problem.NotUp {
		t.Errorf("before the tunnel is up: %v", err)
	}
	r.up(t)
	for _, at := range []netip.AddrPort{byName, byAddr} {
		if got, err := through(t, at); err != nil || !strings.HasSuffix(got, "hello") {
			t.Errorf("through %s: %q, %v", at, got, err)
		}
	}
}

// What stays outside the tunnel on this host, though it is granted, is no forward's either, and the error says why.
func TestForwardToWhatStaysOutside(t *testing.T) {
	w := agenttest.New(t)
	opts := options(t, w)
	opts.Direct = []string{"10.77.1.0/24"}
	opts.lookup = fewHosts
	r := start(t, opts)
	r.up(t)
	r.routes.mu.Lock()
	r.routes.left = []host.Yield{{Prefix: netip.MustParsePrefix("10.77.2.0/24")}}
	r.routes.mu.Unlock()
	for target, want := range map[string]string{
		"10.77.1.1:80": "kept outside the tunnel by --direct", "10.77.2.1:80": "directly connected", "10.78.0.1:80": "does not cover",
		"localhost:80": "localhost:80 (127.0.0.1)",
	} {
		if _, err := r.within(context.Background(), target); problem.CodeOf(err) != problem.FlowDenied || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", target, err)
		}
	}
	for target, want := range map[string]string{
		"10.77.1.1:80": "leave it out of --wait-for", "10.77.2.1:80": "leave it out of --wait-for", "10.78.0.1:80": "ask for a rule",
	} {
		err := r.outsideOf(target, netip.MustParseAddrPort(target).Addr(), waiting)
		if p := problem.From(err); p.Code != problem.FlowDenied || !strings.Contains(p.Next, want) || strings.Contains(p.Next, "forward") {
			t.Errorf("waiting for %s: %v", target, err)
		}
	}
}

// The proxy speaks of the name that a program has asked for. Its service address, which no rule and no person knows, is for the gateway.
func TestDenialsNameTheName(t *testing.T) {
	w := agenttest.New(t)
	w.Gateway.Names = agenttest.ServiceNames()
	w.Gateway.Verdict = wire.ReachResult{Verdict: wire.FlowDenied, Reason: "not granted"}
	r := start(t, options(t, w))
	at, err := url.Parse("http://" + r.up(t).Proxy)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", at.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "CONNECT web.internal:81 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	said, err := io.ReadAll(conn)
	if err != nil || !strings.Contains(string(said), "the grant does not cover web.internal:81: not granted") || strings.Contains(string(said), agenttest.Service.String()) {
		t.Errorf("said %q, %v", said, err)
	}
	if asked := w.Gateway.Asked(); len(asked) != 1 || asked[0] != "web.internal:81" {
		t.Errorf("the gateway was asked about %q", asked)
	}
}

// A forward whose name nobody resolves, because DNS is silent, is named when the time is up.
func TestForwardBehindSilentDNS(t *testing.T) {
	opts := options(t, agenttest.New(t))
	opts.Forwards = []proxy.Forward{{Listen: freePort(t), Target: "db.internal:5432"}}
	opts.Timeout = 5 * time.Second
	opts.lookup = func(ctx context.Context, _ string) ([]netip.Addr, error) {
		<-ctx.Done()
		return nil, &net.DNSError{Err: "i/o timeout", Name: "db.internal", IsTimeout: true, UnwrapErr: ctx.Err()}
	}
	p := start(t, opts).failure(t)
	for _, want := range []string{"not up within 5s: ", "--forward from " + opts.Forwards[0].Listen.String(), `"db.internal"`} {
		if !strings.Contains(p.Message, want) {
			t.Errorf("%q does not say %q", p.Message, want)
		}
	}
	if p.Code != problem.Timeout || p.Next == "" {
		t.Errorf("code %s, next %q", p.Code, p.Next)
	}
}
