package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

func TestParseForward(t *testing.T) {
	for text, want := range map[string]Forward{
		"5432:db.internal:5432":           {netip.MustParseAddrPort("127.0.0.1:5432"), "db.internal:5432"},
		"127.0.0.2:1:10.0.0.1:2":          {netip.MustParseAddrPort("127.0.0.2:1"), "10.0.0.1:2"},
		"[::1]:8443:web:443":              {netip.MustParseAddrPort("[::1]:8443"), "web:443"},
		"8443:[fd00::1]:443":              {netip.MustParseAddrPort("127.0.0.1:8443"), "[fd00::1]:443"},
		"":                                {},
		"5432":                            {},
		"5432:db":                         {},
		"5432:db:":                        {},
		"5432:db:0":                       {},
		"5432:db:65536":                   {},
		"0:db:1":                          {},
		"-1:db:1":                         {},
		":db:1":                           {},
		"5432::1":                         {},
		"0.0.0.0:5432:db.internal:5432":   {},
		"10.0.0.1:5432:db.internal:5432":  {},
		"[::]:5432:db.internal:5432":      {},
		"127.0.0.1:5432":                  {},
		"5432:db.internal:5432:further:1": {},
		"[::1:5432:db:1":                  {},
	} {
		got, err := ParseForward(text)
		if got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
		if (err != nil) != (want == Forward{}) || (err != nil && problem.CodeOf(err) != problem.Usage) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func FuzzParseForward(f *testing.F) {
	for _, text := range []string{"5432:db.internal:5432", "127.0.0.2:1:10.0.0.1:2", "[::1]:8443:web:443", "[", "1:2:3:4"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := ParseForward(text)
		if err == nil && (!got.Listen.Addr().IsLoopback() || got.Listen.Port() == 0 || got.Target == "") {
			t.Errorf("%q is taken as %+v", text, got)
		}
	})
}

var ports atomic.Uint32

// freePort is a port that nobody has, at an address of loopback that nobody else is given.
func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf("127.78.%d.1:0", ports.Add(1)%256))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// within grants what leads to inner.
func (o *Options) within(ctx context.Context, target string) ([]netip.AddrPort, error) {
	host, port, _ := strings.Cut(target, ":")
	addrs, err := o.lookup(ctx, host)
	if addr, perr := netip.ParseAddr(host); perr == nil {
		addrs, err = []netip.Addr{addr}, nil
	}
	if err != nil || !o.Inside(addrs[0]) {
		return nil, problem.Wrap(err, problem.FlowDenied, "the grant does not cover "+target, "ask for a rule")
	}
	return []netip.AddrPort{netip.MustParseAddrPort(addrs[0].String() + ":" + port)}, nil
}

// said is the first line that comes out of a port. A reset may be noticed as early as in connecting.
func said(port netip.AddrPort) (string, error) {
	conn, err := net.Dial("tcp", port.String())
	if err != nil {
		return "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return bufio.NewReader(conn).ReadString('\n')
}

// lines are what is logged.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	l <- string(p)
	return len(p), nil
}

// A forward to what is not granted leads nowhere, though this host itself could connect there, and another tunnel's proxy would: what
// a job takes for the network's service must not leave by the runner's own.
func TestForwardStaysInTheTunnel(t *testing.T) {
	outside, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	reached := make(chan struct{})
	go func() {
		defer close(reached)
		if conn, err := outside.Accept(); err == nil {
			fmt.Fprintln(conn, "not the network's")
			conn.Close()
			t.Error("the forward has left the tunnel")
		}
	}()
	logged := make(lines, 8)
	at := freePort(t)
	newRig(t, outside.Addr().String(), func(o *Options) {
		o.NoProxy = true
		o.Forwards = []Forward{{at, outside.Addr().String()}}
		o.Within = o.within
		o.Other = func(context.Context, string) (netip.AddrPort, bool) {
			return outside.Addr().(*net.TCPAddr).AddrPort(), true
		}
		o.Logger = slog.New(slog.NewTextHandler(logged, nil))
	})
	if got, err := said(at); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("said %q, %v", got, err)
	}
	outside.Close()
	<-reached
	if log := <-logged; !strings.Contains(log, "code=flow-denied") || !strings.Contains(log, outside.Addr().String()) || !strings.Contains(log, "ask for a rule") {
		t.Errorf("logged: %s", log)
	}
}

func TestForward(t *testing.T) {
	target, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	go func() {
		for {
			conn, err := target.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(conn, "hello")
			conn.Close()
		}
	}()
	at, dead := freePort(t), freePort(t)
	r := newRig(t, target.Addr().String(), func(o *Options) {
		o.NoProxy = true
		o.Forwards = []Forward{{at, "db.internal:5432"}, {dead, "unknown.internal:1"}}
		o.Within = o.within
	})
	if r.Addr().IsValid() {
		t.Error("a proxy is served as well")
	}
	if got, err := said(at); got != "hello\n" || r.tunnelled.Load() != 1 {
		t.Errorf("the target says %q, %v after %d dials in the tunnel", got, err, r.tunnelled.Load())
	}
	if got, err := said(dead); got != "" || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("what is not granted says %q, %v", got, err)
	}
	if _, err := Listen(Options{NoProxy: true, Forwards: []Forward{{at, "x:1"}}, Dial: r.opts.Dial, Inside: r.opts.Inside, Within: r.opts.Within}); problem.CodeOf(err) != problem.Usage {
		t.Errorf("a port that is taken: %v", err)
	}
}
