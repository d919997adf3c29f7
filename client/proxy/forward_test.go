package proxy

import (
	"bufio"
	"fmt"
	"net"
	"net/netip"
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

// freePort is a port of loopback that nobody had a moment ago.
func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort()
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
	})
	if r.Addr().IsValid() {
		t.Error("a proxy is served as well")
	}
	said := func(port netip.AddrPort) string {
		conn, err := net.Dial("tcp", port.String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		line, _ := bufio.NewReader(conn).ReadString('\n')
		return line
	}
	if got := said(at); got != "hello\n" || r.tunnelled.Load() != 1 {
		t.Errorf("the target says %q after %d dials in the tunnel", got, r.tunnelled.Load())
	}
	if got := said(dead); got != "" {
		t.Errorf("what does not resolve says %q", got)
	}
	if _, err := Listen(Options{NoProxy: true, Forwards: []Forward{{at, "x:1"}}, Dial: r.opts.Dial, Inside: r.opts.Inside}); problem.CodeOf(err) != problem.Usage {
		t.Errorf("a port that is taken: %v", err)
	}
}
