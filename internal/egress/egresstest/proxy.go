// Package egresstest is an HTTP proxy for tests, on loopback.
package egresstest

import (
	"encoding/base64"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"
)

// Proxy takes CONNECT and plain requests, with basic authentication where it has a user. Names need not exist: it knows
// where they lead.
type Proxy struct {
	User, Password string
	Hosts          map[string]string // "host:port" as it is asked for → "IP:port"

	server *httptest.Server
	mu     sync.Mutex
	asked  []string
	conns  map[net.Conn]struct{}
	wait   sync.WaitGroup
}

// Start starts a proxy that ends with the test.
func Start(t testing.TB, p *Proxy) *Proxy {
	t.Helper()
	p.conns = map[net.Conn]struct{}{}
	p.server = httptest.NewServer(p)
	t.Cleanup(func() {
		p.Cut()
		p.server.Close()
		p.wait.Wait()
	})
	return p
}

// URL is what HTTPS_PROXY has to be, credentials included.
func (p *Proxy) URL() string {
	u, _ := url.Parse(p.server.URL)
	if p.User != "" {
		u.User = url.UserPassword(p.User, p.Password)
	}
	return u.String()
}

// Asked are the targets of CONNECT that were let through so far.
func (p *Proxy) Asked() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.asked...)
}

// Cut ends every tunnel.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.Close()
	}
}

// ServeHTTP serves one request.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte(p.User+":"+p.Password))
	if p.User != "" && r.Header.Get("Proxy-Authorization") != want {
		w.Header().Set("Proxy-Authenticate", `Basic realm="test"`)
		http.Error(w, "who are you?", http.StatusProxyAuthRequired)
		return
	}
	if r.Method != http.MethodConnect {
		p.forward(w, r)
		return
	}
	target, ok := p.Hosts[r.Host]
	if !ok {
		http.Error(w, "not there", http.StatusForbidden)
		return
	}
	p.tunnel(w, r.Host, target)
}

// forward does a plain request, and passes no upgrade on, like any proxy.
func (p *Proxy) forward(w http.ResponseWriter, r *http.Request) {
	target, ok := p.Hosts[r.Host]
	if !ok {
		http.Error(w, "not there", http.StatusForbidden)
		return
	}
	out := r.Clone(r.Context())
	out.RequestURI, out.URL.Host = "", target
	for _, h := range []string{"Connection", "Upgrade", "Proxy-Authorization"} {
		out.Header.Del(h)
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(out)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	maps.Copy(w.Header(), resp.Header)
	w.WriteHeader(resp.StatusCode)
	_, _ = io.Copy(w, resp.Body)
}

func (p *Proxy) tunnel(w http.ResponseWriter, name, target string) {
	there, err := net.Dial("tcp", target)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	here, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		_ = there.Close()
		return
	}
	p.mu.Lock()
	p.asked = append(p.asked, name)
	p.conns[here], p.conns[there] = struct{}{}, struct{}{}
	p.mu.Unlock()
	_, _ = io.WriteString(here, "HTTP/1.1 200 Connection established\r\n\r\n")
	pour := func(to, from net.Conn, r io.Reader) {
		_, _ = io.Copy(to, r)
		_, _ = to.Close(), from.Close()
	}
	p.wait.Go(func() { pour(there, here, buffered) })
	p.wait.Go(func() { pour(here, there, there) })
}
