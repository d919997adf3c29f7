package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/internal/problem"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// inner is an address "inside the tunnel". What is dialled there goes to the test's own servers.
var inner = netip.MustParseAddr("10.77.0.5")

// rig is a proxy whose tunnel ends on loopback.
type rig struct {
	*Server
	tunnelled atomic.Int64 // dials through the tunnel
}

// newRig starts a proxy; everything inside leads to target.
func newRig(t *testing.T, target string, change func(*Options)) *rig {
	t.Helper()
	r := &rig{}
	opts := Options{
		Inside: func(a netip.Addr) bool { return a == inner },
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			r.tunnelled.Add(1)
			var d net.Dialer
			return d.DialContext(ctx, network, target)
		},
		lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
			if host == "db.internal" {
				return []netip.Addr{inner}, nil
			}
			return nil, errors.New("no such host")
		},
	}
	if change != nil {
		change(&opts)
	}
	var err error
	if r.Server, err = Listen(opts); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// echoServer answers with what it gets, half-close included.
func echoServer(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(conn, conn)
				_ = conn.Close()
			}()
		}
	}()
	return listener.Addr().String()
}

// closedPort is a port of loopback that nobody listens on.
func closedPort(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

func connect(t *testing.T, r *rig) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", r.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(40 * time.Second))
	return conn.(*net.TCPConn)
}

// socks sends greeting and request and gives the reply code.
func socks(t *testing.T, conn net.Conn, request []byte) byte {
	t.Helper()
	if _, err := conn.Write(append([]byte{5, 1, 0}, request...)); err != nil {
		t.Fatal(err)
	}
	var head [2]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil || head != [2]byte{5, 0} {
		t.Fatalf("method = %v, %v", head, err)
	}
	var reply [10]byte
	if _, err := io.ReadFull(conn, reply[:]); err != nil {
		t.Fatal(err)
	}
	return reply[1]
}

func byName(name string, port uint16) []byte {
	return append(append([]byte{5, 1, 0, 3, byte(len(name))}, name...), byte(port>>8), byte(port))
}

func byAddr(addr netip.Addr, port uint16) []byte {
	kind := byte(addressIPv4)
	if addr.Is6() {
		kind = addressIPv6
	}
	return append(append([]byte{5, 1, 0, kind}, addr.AsSlice()...), byte(port>>8), byte(port))
}

func TestSOCKSCarriesBothWaysAndHalfCloses(t *testing.T) {
	r := newRig(t, echoServer(t), nil)
	for name, request := range map[string][]byte{"address": byAddr(inner, 5432), "name": byName("db.internal", 5432)} {
		t.Run(name, func(t *testing.T) {
			conn := connect(t, r)
			if reply := socks(t, conn, request); reply != replyDone {
				t.Fatalf("reply = %d", reply)
			}
			sent := make([]byte, 1<<20)
			rand.New(rand.NewSource(1)).Read(sent)
			go func() {
				_, _ = conn.Write(sent)
				_ = conn.CloseWrite()
			}()
			got, err := io.ReadAll(conn)
			if err != nil || sha256.Sum256(got) != sha256.Sum256(sent) {
				t.Errorf("%d of %d bytes came back, %v", len(got), len(sent), err)
			}
		})
	}
	if n := r.tunnelled.Load(); n != 2 {
		t.Errorf("%d dials through the tunnel", n)
	}
}

func TestSOCKSRefusals(t *testing.T) {
	denied := func(context.Context, string, netip.AddrPort) error {
		return problem.New(problem.FlowDenied, "no rule", "")
	}
	for name, c := range map[string]struct {
		request []byte
		explain func(context.Context, string, netip.AddrPort) error
		want    byte
	}{
		"refused":         {byAddr(inner, 1), nil, replyRefused},
		"denied":          {byAddr(inner, 1), denied, replyNotAllowed},
		"unknown name":    {byName("nowhere.invalid", 1), nil, replyHostUnreachable},
		"port 0":          {byAddr(inner, 0), nil, replyAddressUnsupported},
		"bind":            {append([]byte{5, 2}, byAddr(inner, 1)[2:]...), nil, replyCommandUnsupported},
		"udp associate":   {append([]byte{5, 3}, byAddr(inner, 1)[2:]...), nil, replyCommandUnsupported},
		"unknown address": {[]byte{5, 1, 0, 9, 0, 0, 0, 0, 0, 0}, nil, replyAddressUnsupported},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, closedPort(t), func(o *Options) { o.Explain = c.explain })
			if got := socks(t, connect(t, r), c.request); got != c.want {
				t.Errorf("reply = %d, want %d", got, c.want)
			}
		})
	}
}

func TestSOCKSWantsNoAuthentication(t *testing.T) {
	r := newRig(t, closedPort(t), nil)
	conn := connect(t, r)
	_, _ = conn.Write([]byte{5, 1, 2}) // user name and password only
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(got, []byte{5, 0xff}) {
		t.Errorf("answer = %v, %v", got, err)
	}
}

func TestHTTPConnect(t *testing.T) {
	r := newRig(t, echoServer(t), nil)
	conn := connect(t, r)
	// What follows the request in the same segment belongs to the target already.
	_, _ = io.WriteString(conn, "CONNECT db.internal:443 HTTP/1.1\r\nHost: db.internal:443\r\n\r\nearly")
	_ = conn.CloseWrite()
	got, err := io.ReadAll(conn)
	if want := "HTTP/1.1 200 Connection established\r\n\r\nearly"; err != nil || string(got) != want {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestHTTPRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		request string
		explain error
		want    int
		says    string
	}{
		"refused":      {"CONNECT 10.77.0.5:1 HTTP/1.1\r\nHost: x\r\n\r\n", nil, 502, "refused the connection"},
		"denied":       {"CONNECT 10.77.0.5:1 HTTP/1.1\r\nHost: x\r\n\r\n", problem.New(problem.FlowDenied, "the grant does not cover it", ""), 403, "the grant does not cover it"},
		"plain denied": {"GET http://10.77.0.5:1/ HTTP/1.1\r\nHost: 10.77.0.5:1\r\n\r\n", problem.New(problem.FlowDenied, "the grant does not cover it", ""), 403, "the grant does not cover it"},
		"unknown name": {"CONNECT nowhere.invalid:1 HTTP/1.1\r\nHost: x\r\n\r\n", nil, 502, "does not resolve"},
		"not a proxy":  {"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", nil, 400, "this is a proxy"},
		"no port":      {"CONNECT 10.77.0.5 HTTP/1.1\r\nHost: x\r\n\r\n", nil, 400, "not host:port"},
		"large header": {"GET http://10.77.0.5/ HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("a", 2*maxHeader) + "\r\n\r\n", nil, 431, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, closedPort(t), func(o *Options) {
				o.Explain = func(context.Context, string, netip.AddrPort) error { return c.explain }
			})
			conn := connect(t, r)
			_, _ = io.WriteString(conn, c.request)
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
			if resp.StatusCode != c.want || !strings.Contains(string(body), c.says) {
				t.Errorf("got %d %q", resp.StatusCode, body)
			}
		})
	}
}

func TestPlainHTTPThroughTheTunnel(t *testing.T) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s forwarded=%q", r.Host, r.URL, r.Header.Get("X-Forwarded-For"))
	}))
	defer web.Close()
	r := newRig(t, strings.TrimPrefix(web.URL, "http://"), nil)
	proxyURL, err := url.Parse("http://" + r.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{Proxy: http.ProxyURL(proxyURL)}
	defer transport.CloseIdleConnections()
	for range 2 { // the second over the same connection
		resp, err := (&http.Client{Transport: transport}).Get("http://db.internal/a?b=c")
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if string(body) != `db.internal /a?b=c forwarded=""` {
			t.Errorf("got %q", body)
		}
	}
}

func TestOutsideIsDialledDirectly(t *testing.T) {
	r := newRig(t, closedPort(t), nil)
	target := netip.MustParseAddrPort(echoServer(t))
	conn := connect(t, r)
	if reply := socks(t, conn, byAddr(target.Addr(), target.Port())); reply != replyDone {
		t.Fatalf("reply = %d", reply)
	}
	_, _ = io.WriteString(conn, "hi")
	_ = conn.CloseWrite()
	if got, _ := io.ReadAll(conn); string(got) != "hi" {
		t.Errorf("got %q", got)
	}
	if n := r.tunnelled.Load(); n != 0 {
		t.Errorf("%d dials through the tunnel", n)
	}
}

func TestCurl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("no curl here")
	}
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "hello "+r.Host)
	}))
	defer web.Close()
	r := newRig(t, strings.TrimPrefix(web.URL, "http://"), nil)
	addr := r.Addr().String()
	for _, args := range [][]string{
		{"--proxy", "http://" + addr},
		{"--proxy", "http://" + addr, "--proxytunnel"},
		{"--proxy", "socks5h://" + addr},
	} {
		cmd := exec.Command(curl, append(args, "-sS", "--max-time", "10", "http://db.internal/")...)
		if out, err := cmd.CombinedOutput(); err != nil || string(out) != "hello db.internal" {
			t.Errorf("curl %v: %q, %v", args, out, err)
		}
	}
	cmd := exec.Command(curl, "-sS", "--max-time", "10", "http://db.internal/")
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, Environ(r.Addr())...)
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "hello db.internal" {
		t.Errorf("curl by environment: %q, %v", out, err)
	}
}

func TestIdleConnectionsEnd(t *testing.T) {
	r := newRig(t, echoServer(t), func(o *Options) { o.Idle = 90 * time.Millisecond })
	conn := connect(t, r)
	if reply := socks(t, conn, byAddr(inner, 1)); reply != replyDone {
		t.Fatalf("reply = %d", reply)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read from an idle connection: %v", err)
	}
}

func TestCloseEndsWhatIsOpen(t *testing.T) {
	r := newRig(t, echoServer(t), nil)
	open := connect(t, r)
	if reply := socks(t, open, byAddr(inner, 1)); reply != replyDone {
		t.Fatalf("reply = %d", reply)
	}
	tunnel := connect(t, r)
	_, _ = io.WriteString(tunnel, "CONNECT 10.77.0.5:1 HTTP/1.1\r\nHost: x\r\n\r\n")
	if _, err := http.ReadResponse(bufio.NewReader(tunnel), &http.Request{Method: http.MethodConnect}); err != nil {
		t.Fatal(err)
	}
	silent := connect(t, r) // has not said what it wants
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for _, conn := range []net.Conn{open, tunnel, silent} {
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("still open: %v", err)
		}
	}
	r.Server, _ = Listen(Options{Dial: r.opts.Dial, Inside: r.opts.Inside}) // for the cleanup
}

func TestOnlyLoopback(t *testing.T) {
	for _, listen := range []string{"0.0.0.0:0", ":1080", "192.0.2.1:1080", "[::]:0", "localhost:0", "nonsense"} {
		_, err := Listen(Options{Listen: listen, Dial: (&net.Dialer{}).DialContext, Inside: func(netip.Addr) bool { return true }})
		if problem.CodeOf(err) != problem.Usage {
			t.Errorf("%s: %v", listen, err)
		}
	}
}

func FuzzReadRequest(f *testing.F) {
	f.Add(byAddr(inner, 80))
	f.Add(byName("db.internal", 5432))
	f.Add(byAddr(netip.MustParseAddr("2001:db8::1"), 443))
	f.Add([]byte{5, 1, 0, 3, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		target, err := readRequest(bytes.NewReader(data))
		if err != nil {
			return
		}
		if _, _, err := net.SplitHostPort(target); err != nil {
			t.Errorf("%x gives %q: %v", data, target, err)
		}
	})
}
