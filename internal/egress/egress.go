// Package egress is how HTTP and WebSocket leave a network: straight, or through the proxies that HTTPS_PROXY, HTTP_PROXY and
// NO_PROXY name, with the credentials in their URLs.
//
// Everything goes through net/http but one thing: a WebSocket over plain HTTP, which a proxy would take for a request of its
// own and answer itself. It is given a tunnel by CONNECT, as browsers do (RFC 6455, section 4.1).
package egress

import (
	"bufio"
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"

	"golang.org/x/net/http/httpproxy"

	"github.com/culvertnet/culvert/internal/cork"
	"github.com/culvertnet/culvert/internal/problem"
)

// Transport does requests through the environment's proxies. It is safe for concurrent use.
type Transport struct {
	ordinary *http.Transport
	upgrades *http.Transport // WebSockets over plain HTTP
	proxy    func(*url.URL) (*url.URL, error)
	proxies  map[string]bool // "host:port" of those that the environment names
}

// New makes a transport that dials and encrypts as base does; base's own choice of proxies is not used. The environment is
// read here, not once for the whole process.
func New(base *http.Transport) *Transport {
	environment := httpproxy.FromEnvironment()
	t := &Transport{ordinary: base.Clone(), upgrades: base.Clone(), proxy: environment.ProxyFunc(), proxies: map[string]bool{}}
	for _, name := range []string{environment.HTTPProxy, environment.HTTPSProxy} {
		if u, err := url.Parse(name); err == nil && u.Host != "" {
			t.proxies[hostPort(u)] = true
		}
	}
	t.ordinary.DialContext = cork.Dialer(t.joining(base.DialContext))
	t.ordinary.Proxy = func(r *http.Request) (*url.URL, error) { return t.proxy(r.URL) }
	t.ordinary.OnProxyConnectResponse = func(_ context.Context, proxy *url.URL, _ *http.Request, resp *http.Response) error {
		return refused(proxy, resp)
	}
	t.upgrades.Proxy = nil
	t.upgrades.DialContext = t.connect
	return t
}

// ProxyFor gives the proxy through which a URL is reached, nil for none. Its credentials are left out.
func (t *Transport) ProxyFor(u *url.URL) *url.URL {
	proxy, err := t.proxy(u)
	if err != nil || proxy == nil {
		return nil
	}
	return &url.URL{Scheme: proxy.Scheme, Host: proxy.Host}
}

// RoundTrip does one request.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme == "http" && strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		return t.upgrades.RoundTrip(r)
	}
	return t.ordinary.RoundTrip(r)
}

// CloseIdleConnections closes what is open and not in use.
func (t *Transport) CloseIdleConnections() {
	t.ordinary.CloseIdleConnections()
	t.upgrades.CloseIdleConnections()
}

// connect opens a connection to a server of plain HTTP, through a tunnel where a proxy is in between.
func (t *Transport) connect(ctx context.Context, network, addr string) (net.Conn, error) {
	proxy, err := t.proxy(&url.URL{Scheme: "http", Host: addr})
	if err != nil {
		return nil, err
	}
	dial := t.ordinary.DialContext
	if proxy == nil {
		return dial(ctx, network, addr)
	}
	if proxy.Scheme != "http" {
		return nil, problem.New(problem.Usage, "a WebSocket over plain HTTP cannot pass a proxy of the scheme "+proxy.Scheme,
			"use https for the coordinator, or a proxy of the scheme http")
	}
	conn, err := dial(ctx, network, hostPort(proxy))
	if err != nil {
		return nil, err
	}
	if err := tunnel(ctx, conn, proxy, addr); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// hostPort is where a proxy is dialled.
func hostPort(proxy *url.URL) string {
	port := proxy.Port()
	if port == "" {
		port = map[string]string{"https": "443", "socks5": "1080", "socks5h": "1080"}[proxy.Scheme]
	}
	return net.JoinHostPort(proxy.Hostname(), cmp.Or(port, "80"))
}

// tunnel asks a proxy to connect to addr (RFC 9110, section 9.3.6).
func tunnel(ctx context.Context, conn net.Conn, proxy *url.URL, addr string) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: addr}, Host: addr, Header: http.Header{}}
	if u := proxy.User; u != nil {
		password, _ := u.Password()
		req.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(u.Username()+":"+password)))
	}
	if err := req.Write(conn); err != nil {
		return fmt.Errorf("ask the proxy %s: %w", proxy.Host, err)
	}
	// The server behind it says nothing before it is asked, so nothing is read too far.
	resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 4<<10), req)
	if err != nil {
		return fmt.Errorf("ask the proxy %s: %w", proxy.Host, err)
	}
	return refused(proxy, resp)
}

// refused says why a proxy did not let us through, nil where it did. For a wrong password some (tinyproxy) answer 401 instead of 407.
func refused(proxy *url.URL, resp *http.Response) error {
	auth := resp.StatusCode == http.StatusProxyAuthRequired || resp.StatusCode == http.StatusUnauthorized
	switch {
	case resp.StatusCode/100 == 2:
		return nil
	case auth && proxy.User == nil:
		return problem.New(problem.Failed, fmt.Sprintf("the proxy %s wants a user and a password", proxy.Host),
			"put them into HTTPS_PROXY, like http://user:password@proxy.example.com:3128")
	case auth:
		return problem.New(problem.Failed, fmt.Sprintf("the proxy %s does not take the user and password that it is given", proxy.Host),
			"correct them in HTTPS_PROXY; special characters are written as %XX")
	}
	return problem.New(problem.Unreachable, fmt.Sprintf("the proxy %s does not let us through: %d %s", proxy.Host, resp.StatusCode,
		http.StatusText(resp.StatusCode)), "ask whoever runs it to allow CONNECT to the coordinator, or name the coordinator in NO_PROXY")
}
