package egress

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/internal/egress/egresstest"
	"github.com/culvertnet/culvert/internal/problem"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server answers "hello" and echoes on a WebSocket.
func server(t *testing.T, start func(http.Handler) *httptest.Server) *httptest.Server {
	t.Helper()
	s := start(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			_, _ = io.WriteString(w, "hello")
			return
		}
		conn, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer conn.CloseNow()
		kind, msg, err := conn.Read(r.Context())
		if err == nil {
			_ = conn.Write(r.Context(), kind, msg)
		}
		_, _, _ = conn.Read(r.Context())
	}))
	t.Cleanup(s.Close)
	return s
}

// transport is ours to a server whose certificate is for example.com, as httptest makes it.
func transport(t *testing.T, s *httptest.Server) *Transport {
	t.Helper()
	pool := x509.NewCertPool()
	if s.Certificate() != nil {
		pool.AddCert(s.Certificate())
	}
	tr := New(&http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: pool}})
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

// echo sends a word over a WebSocket and wants it back.
func echo(t *testing.T, tr *Transport, url string) error {
	t.Helper()
	conn, _, err := websocket.Dial(t.Context(), url, &websocket.DialOptions{HTTPClient: &http.Client{Transport: tr}})
	if err != nil {
		return err
	}
	defer conn.CloseNow()
	if err := conn.Write(t.Context(), websocket.MessageText, []byte("word")); err != nil {
		return err
	}
	if _, got, err := conn.Read(t.Context()); err != nil || string(got) != "word" {
		return fmt.Errorf("got %q: %w", got, err)
	}
	return conn.Close(websocket.StatusNormalClosure, "")
}

func get(t *testing.T, tr *Transport, url string) error {
	t.Helper()
	resp, err := (&http.Client{Transport: tr, Timeout: time.Minute}).Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "hello" {
		return fmt.Errorf("%s: %q: %w", resp.Status, body, err)
	}
	return nil
}

// TestThroughAProxy: requests and WebSockets, encrypted and not, pass a proxy that wants a password, to a host whose name
// only the proxy knows.
func TestThroughAProxy(t *testing.T) {
	secure, plain := server(t, httptest.NewTLSServer), server(t, httptest.NewServer)
	p := egresstest.Start(t, &egresstest.Proxy{User: "us er", Password: "p@ss:word/", Hosts: map[string]string{
		"example.com:443": secure.Listener.Addr().String(), "example.com:80": plain.Listener.Addr().String(),
		"example.com": plain.Listener.Addr().String(),
	}})
	t.Setenv("HTTPS_PROXY", p.URL())
	t.Setenv("HTTP_PROXY", p.URL())
	tr := transport(t, secure)
	for name, try := range map[string]func() error{
		"https": func() error { return get(t, tr, "https://example.com/") },
		"wss":   func() error { return echo(t, tr, "https://example.com/") },
		"http":  func() error { return get(t, tr, "http://example.com/") },
		"ws":    func() error { return echo(t, tr, "http://example.com/") },
	} {
		if err := try(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := strings.Join(p.Asked(), " "); strings.Count(got, "example.com:443") != 2 || strings.Count(got, "example.com:80") != 1 {
		t.Errorf("the proxy was asked for %s", got)
	}
	if u := tr.ProxyFor(&url.URL{Scheme: "https", Host: "example.com"}); u == nil || u.User != nil || !strings.HasPrefix(p.URL(), "http://us%20er") {
		t.Errorf("the proxy is %v", u)
	}
}

func TestProxyRefuses(t *testing.T) {
	s := server(t, httptest.NewTLSServer)
	p := egresstest.Start(t, &egresstest.Proxy{User: "user", Password: "right", Hosts: map[string]string{"example.com:443": s.Listener.Addr().String()}})
	with := func(user *url.Userinfo) string {
		u, _ := url.Parse(p.URL())
		u.User = user
		return u.String()
	}
	for _, c := range []struct {
		name, proxy, url string
		code             problem.Code
		want             string
	}{
		{"no password", with(nil), "https://example.com/", problem.Failed, "wants a user and a password"},
		{"a wrong one", with(url.UserPassword("user", "wr0ng")), "https://example.com/", problem.Failed, "does not take"},
		{"another host", p.URL(), "https://example.com:444/", problem.Unreachable, "403"},
		{"over SOCKS", "socks5://127.0.0.1:1", "https://example.com/", "", ""},
	} {
		t.Setenv("HTTPS_PROXY", c.proxy)
		t.Setenv("HTTP_PROXY", c.proxy)
		tr := transport(t, s)
		plain := strings.Replace(c.url, "https:", "http:", 1)
		for how, try := range map[string]func() error{
			"https": func() error { return get(t, tr, c.url) },
			"wss":   func() error { return echo(t, tr, c.url) },
			"ws":    func() error { return echo(t, tr, plain) },
		} {
			err := try()
			p, _ := errors.AsType[*problem.Error](err)
			if c.code == "" { // nobody is there
				if err == nil || how == "ws" && problem.CodeOf(p) != problem.Usage {
					t.Errorf("%s over %s: got %v", c.name, how, err)
				}
				continue
			}
			if p == nil || p.Code != c.code || !strings.Contains(p.Message, c.want) {
				t.Errorf("%s over %s: got %v", c.name, how, p)
			}
			if text := fmt.Sprintf("%+v", p); strings.Contains(text, "wr0ng") {
				t.Errorf("%s over %s shows the password: %s", c.name, how, text)
			}
		}
	}
}

// TestPastTheProxy: what NO_PROXY names and this machine itself are reached straight.
func TestPastTheProxy(t *testing.T) {
	s := server(t, httptest.NewServer)
	t.Setenv("HTTP_PROXY", "http://192.0.2.1:9") // would not answer
	t.Setenv("HTTPS_PROXY", "http://192.0.2.1:9")
	t.Setenv("NO_PROXY", "inside.example,10.0.0.0/8")
	tr := transport(t, s)
	if err := get(t, tr, s.URL); err != nil {
		t.Error(err)
	}
	if err := echo(t, tr, s.URL); err != nil {
		t.Error(err)
	}
	for host, want := range map[string]bool{"a.inside.example": false, "10.1.2.3:80": false, "outside.example": true} {
		for _, scheme := range []string{"http", "https"} {
			if got := tr.ProxyFor(&url.URL{Scheme: scheme, Host: host}) != nil; got != want {
				t.Errorf("%s://%s by a proxy: %t, want %t", scheme, host, got, want)
			}
		}
	}
}

func TestWhatAProxyRefuses(t *testing.T) {
	with, without := &url.URL{Host: "proxy:1", User: url.UserPassword("a", "b")}, &url.URL{Host: "proxy:1"}
	for _, c := range []struct {
		proxy  *url.URL
		status int
		want   string
	}{
		{with, 407, "does not take the user and password"},
		{with, 401, "does not take the user and password"},
		{without, 407, "wants a user and a password"},
		{without, 401, "wants a user and a password"},
		{with, 403, "does not let us through: 403 Forbidden"},
	} {
		err := refused(c.proxy, &http.Response{StatusCode: c.status})
		if err == nil || !strings.Contains(err.Error(), c.want) || problem.Temporary(err) != (c.status == 403) {
			t.Errorf("%d: %v", c.status, err)
		}
	}
	if err := refused(with, &http.Response{StatusCode: 200}); err != nil {
		t.Error(err)
	}
}
