package egress

import (
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/culvertnet/culvert/internal/problem"
)

// ask does a request that is to fail, as programs do it.
func ask(t *testing.T, tr *Transport, base string) error {
	t.Helper()
	client := &http.Client{Transport: tr}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err == nil {
		_ = resp.Body.Close()
		t.Fatalf("%s answers", base)
	}
	return err
}

// straight leaves without a proxy, and finds no name.
func straight(t *testing.T) *Transport {
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"} {
		t.Setenv(name, "")
	}
	return New(&http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		host, _, _ := net.SplitHostPort(addr)
		if net.ParseIP(host) == nil {
			return nil, &net.OpError{Op: "dial", Net: network, Err: &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}}
		}
		return new(net.Dialer).DialContext(ctx, network, addr)
	}})
}

func TestFault(t *testing.T) {
	tr := straight(t)
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	go func() {
		for {
			c, err := other.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "SSH-2.0-something else\r\n")
			_, _ = c.Read(make([]byte, 1024))
			_ = c.Close()
		}
	}()
	closed := httptest.NewServer(http.NotFoundHandler())
	closed.Close()
	for name, c := range map[string]struct {
		base, says string
		want       problem.Code
	}{
		"a misspelt name":       {"https://culvret.example.com", "does not exist", problem.UnknownName},
		"an untrusted one":      {secure.URL, "not trusted", problem.Certificate},
		"plain HTTP":            {"https" + strings.TrimPrefix(plain.URL, "http"), "does not speak TLS", problem.NoTLS},
		"another protocol":      {"https://" + other.Addr().String(), "does not speak TLS", problem.NoTLS},
		"nobody":                {closed.URL, "", ""},
		"nobody behind the TLS": {"https" + strings.TrimPrefix(closed.URL, "http"), "", ""},
	} {
		p := tr.Fault(c.base, ask(t, tr, c.base))
		if p == nil {
			if c.want != "" {
				t.Errorf("%s: nothing is wrong", name)
			}
			continue
		}
		if p.Code != c.want || !strings.Contains(p.Message, c.says) || !strings.Contains(p.Message, c.base) || p.Next == "" || problem.Temporary(p) {
			t.Errorf("%s: %v", name, p)
		}
	}
}

// What is wrong with a proxy says nothing about the coordinator behind it.
func TestFaultOfAProxy(t *testing.T) {
	straight := straight(t)
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	for _, proxy := range []string{"http://no-such-proxy.example:3128", "https" + strings.TrimPrefix(plain.URL, "http")} {
		t.Setenv("HTTPS_PROXY", proxy)
		tr := New(&http.Transport{DialContext: straight.ordinary.DialContext})
		const base = "https://culvert.example.com"
		if u := tr.ProxyFor(&url.URL{Scheme: "https", Host: "culvert.example.com"}); u == nil {
			t.Fatal("no proxy is used")
		}
		if err := ask(t, tr, base); tr.Fault(base, err) != nil {
			t.Errorf("%s: %v is called a fault of the coordinator", proxy, err)
		}
	}
}
