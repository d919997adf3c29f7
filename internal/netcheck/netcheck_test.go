package netcheck

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/culvertnet/culvert/internal/egress"
	"github.com/culvertnet/culvert/internal/egress/egresstest"
	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// patience bounds a check in a test. What is expected to answer does so at once; only a very busy machine needs it.
const patience = 30 * time.Second

// coordinator is one on loopback, with a real relay.
type coordinator struct {
	*httptest.Server
	relay *relay.Server
	info  wire.Info
	other http.Handler // instead of everything, where set
}

// newCoordinator starts one. start is httptest.NewServer or NewTLSServer.
func newCoordinator(t *testing.T, start func(http.Handler) *httptest.Server) *coordinator {
	t.Helper()
	public, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &coordinator{}
	c.relay, err = relay.New(t.Context(), relay.Options{UDP: "127.0.0.1:0", Probe: "127.0.0.1:0", Keys: []ed25519.PublicKey{public}, Sockets: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.relay.Close() })
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+wire.PathInfo, func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(c.info) })
	mux.Handle("GET "+wire.PathRelay, c.relay)
	c.Server = start(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c.other != nil {
			c.other.ServeHTTP(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(c.Close)
	udp := fmt.Sprintf(":%d", c.relay.Addr().Port())
	c.info = wire.Info{
		Version: wire.Version, STUN: []string{udp, fmt.Sprintf(":%d", c.relay.ProbeAddr().Port())},
		Relays: []wire.Relay{{Name: "coordinator", UDP: udp, URL: c.URL + wire.PathRelay}},
	}
	return c
}

func (c *coordinator) check(t *testing.T, change func(*Options)) *Report {
	t.Helper()
	opts := Options{Coordinator: c.URL, UDPTimeout: patience}
	if change != nil {
		change(&opts)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	r, err := Run(ctx, opts)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// silent is a UDP address that swallows everything.
func silent(t *testing.T) string {
	t.Helper()
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn.LocalAddr().String()
}

func TestOnLoopback(t *testing.T) {
	c := newCoordinator(t, httptest.NewServer)
	r := c.check(t, nil)
	if !r.Coordinator.Reachable || r.Coordinator.Error != "" || r.Coordinator.RTT <= 0 || r.Coordinator.TLS != nil || r.Coordinator.Address != c.Listener.Addr().String() {
		t.Errorf("coordinator %+v", r.Coordinator)
	}
	if !r.UDP.Works || len(r.UDP.Servers) != 2 || r.UDP.Servers[0].Server != c.relay.Addr() || r.UDP.Servers[0].Mapped == nil || r.UDP.Servers[1].RTT <= 0 {
		t.Errorf("udp %+v", r.UDP)
	}
	if n := r.NAT; n.Present || n.Mapping != wire.MappingEasy || n.Filtering != nat.AddressDependent || n.Destinations != 2 {
		t.Errorf("nat %+v", n)
	}
	if r.IPv4.Public == nil || r.IPv4.Public.Addr() != netip.MustParseAddr("127.0.0.1") || r.IPv6.Public != nil {
		t.Errorf("ipv4 %+v, ipv6 %+v", r.IPv4, r.IPv6)
	}
	if len(r.Relays) != 1 || r.Relays[0].Name != "coordinator" || !r.Relays[0].UDP.Works || !r.Relays[0].WebSocket.Works ||
		r.Relays[0].UDP.RTT <= 0 || r.Relays[0].WebSocket.RTT <= 0 {
		t.Errorf("relays %+v", r.Relays)
	}
	if r.MTU != nil && r.MTU.Bytes != 1500 {
		t.Errorf("mtu %+v", r.MTU)
	}
	if p := r.Tunnel.Paths; !r.Tunnel.Possible || p.Public != PathDirect || p.Hard != PathDirect {
		t.Errorf("tunnel %+v", r.Tunnel)
	}
	var text bytes.Buffer
	if err := r.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"gets out, 2 of 2 servers answer", "none, filtering address-dependent", "relay coordinator", "direct paths to every gateway"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, text.String())
		}
	}
}

func TestTLS(t *testing.T) {
	c := newCoordinator(t, httptest.NewTLSServer)
	c.Config.ErrorLog = log.New(io.Discard, "", 0)
	r := c.check(t, func(o *Options) { o.UDPTimeout = 100 * time.Millisecond })
	if r.Coordinator.Reachable || !strings.Contains(r.Coordinator.Error, "is not trusted") || !strings.Contains(r.Coordinator.Error, `issued by "Acme Co`) ||
		!strings.Contains(r.Coordinator.Next, "SSL_CERT_FILE") {
		t.Errorf("coordinator %+v", r.Coordinator)
	}
	if r.Tunnel.Possible || r.Tunnel.Paths.Public != PathNone || len(r.Tunnel.Meaning) != 1 {
		t.Errorf("tunnel %+v", r.Tunnel)
	}
	pool := x509.NewCertPool()
	pool.AddCert(c.Certificate())
	r = c.check(t, func(o *Options) {
		o.Transport = egress.New(&http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}})
	})
	if got := r.Coordinator.TLS; !r.Coordinator.Reachable || got == nil || got.Version != "TLS 1.3" || got.Issuer != "Acme Co" || !got.Expires.Equal(c.Certificate().NotAfter) {
		t.Errorf("coordinator %+v, %+v", r.Coordinator, got)
	}
	if way := r.Relays[0].WebSocket; !way.Works {
		t.Errorf("websocket %+v", way)
	}
}

// The only way out is a proxy that wants a password, which no report shows.
func TestThroughAProxy(t *testing.T) {
	c := newCoordinator(t, httptest.NewServer)
	proxy := egresstest.Start(t, &egresstest.Proxy{User: "runner", Password: "opensesame", Hosts: map[string]string{
		"culvert.example.com": c.Listener.Addr().String(), "culvert.example.com:80": c.Listener.Addr().String(),
	}})
	for _, name := range []string{"https_proxy", "http_proxy", "HTTP_PROXY", "HTTPS_PROXY"} {
		t.Setenv(name, proxy.URL())
	}
	t.Setenv("NO_PROXY", "internal.example.com")
	c.info.STUN, c.info.Relays = []string{silent(t)}, []wire.Relay{{Name: "coordinator", URL: "http://culvert.example.com/v1/relay"}}
	r := c.check(t, func(o *Options) {
		o.Coordinator, o.InsecureHTTP, o.UDPTimeout = "http://culvert.example.com", true, 100*time.Millisecond
	})
	if !r.Coordinator.Reachable || r.Proxy == nil || r.Proxy.NoProxy != "internal.example.com" || !r.Relays[0].WebSocket.Works || r.UDP.Works {
		t.Errorf("coordinator %+v, proxy %+v, relays %+v", r.Coordinator, r.Proxy, r.Relays)
	}
	if p := r.Tunnel.Paths; p.Public != PathWebSocket {
		t.Errorf("tunnel %+v", r.Tunnel)
	}
	var text bytes.Buffer
	if err := errors.Join(r.WriteText(&text), json.NewEncoder(&text).Encode(r)); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(text.String(), "opensesame") || strings.Contains(text.String(), "runner:") {
		t.Errorf("the report holds the password: %s", text.String())
	}
}

// UDP that gets nowhere costs its time and nothing else.
func TestWithoutUDP(t *testing.T) {
	c := newCoordinator(t, httptest.NewServer)
	hole := silent(t)
	c.info.STUN = []string{hole, "nowhere..invalid:3478", "no port"}
	c.info.Relays[0].UDP = hole
	c.info.Relays = append(c.info.Relays, wire.Relay{Name: "evil\x1b[2J", URL: "http://127.0.0.1:1/v1/relay", UDP: "nowhere..invalid:3478"})
	r := c.check(t, func(o *Options) { o.UDPTimeout = 300 * time.Millisecond })
	if r.UDP.Works || r.NAT.Mapping != "" || r.NAT.Filtering != "" || r.MTU != nil || r.IPv4.Public != nil {
		t.Errorf("udp %+v, nat %+v, mtu %v", r.UDP, r.NAT, r.MTU)
	}
	first, second := r.Relays[0], r.Relays[1]
	if first.UDP.Works || first.UDP.Error != "no answer" || !first.WebSocket.Works {
		t.Errorf("relay %+v, %+v", first.UDP, first.WebSocket)
	}
	if second.Name != "evil [2J" || second.UDP.Works || second.WebSocket.Works || second.WebSocket.Error == "" {
		t.Errorf("relay %+v, %+v, %+v", second, second.UDP, second.WebSocket)
	}
	if p := r.Tunnel.Paths; !r.Tunnel.Possible || p.Public != PathWebSocket || p.Hard != PathWebSocket {
		t.Errorf("tunnel %+v", r.Tunnel)
	}
}

// A STUN server is no relay, and neither is any other WebSocket.
func TestWhatIsNoRelay(t *testing.T) {
	c := newCoordinator(t, httptest.NewServer)
	chat := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		protocols := []string{relay.Protocol}
		if r.URL.Path == "/other" {
			protocols = []string{"chat"}
		}
		conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: protocols})
		if err != nil {
			return
		}
		defer conn.CloseNow()
		_ = conn.Write(r.Context(), websocket.MessageBinary, []byte("hello"))
		_, _, _ = conn.Read(r.Context())
	}))
	defer chat.Close()
	c.info.Relays = []wire.Relay{
		{Name: "stun", UDP: c.info.STUN[1]},
		{Name: "chat", URL: chat.URL + "/other"},
		{Name: "strange", URL: chat.URL + "/strange"},
		{Name: "page", URL: c.URL + wire.PathInfo},
		{Name: "file", URL: "file:///etc/passwd"},
		{Name: "plain", URL: "http://relay.example.com/v1/relay"},
	}
	r := c.check(t, nil)
	if way := r.Relays[0].UDP; way.Works || way.Error != "what answers there is no relay" {
		t.Errorf("a STUN server: %+v", way)
	}
	for _, got := range r.Relays[1:] {
		if got.WebSocket.Works || got.WebSocket.Error == "" {
			t.Errorf("%s: %+v", got.Name, got.WebSocket)
		}
	}
	if r.Tunnel.Paths.Hard != PathDirect {
		t.Errorf("tunnel %+v", r.Tunnel)
	}
}

func TestWhatIsNoCoordinator(t *testing.T) {
	for name, c := range map[string]struct {
		handler http.HandlerFunc
		want    string
	}{
		"a page":     {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") }, "what answers is not Culvert's API"},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/login", http.StatusFound) }, "the server answered 302 Found"},
		"a problem": {func(w http.ResponseWriter, _ *http.Request) {
			problem.Write(w, problem.New(problem.RateLimited, "too many", "wait"))
		}, "too many"},
		"endless": {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"stun":["`, strings.Repeat("x", 1<<20)) }, "what answers is not Culvert's API"},
	} {
		t.Run(name, func(t *testing.T) {
			server := newCoordinator(t, httptest.NewServer)
			server.other = c.handler
			r := server.check(t, func(o *Options) { o.UDPTimeout = 100 * time.Millisecond })
			if r.Coordinator.Reachable || !strings.Contains(r.Coordinator.Error, c.want) || r.Tunnel.Possible {
				t.Errorf("coordinator %+v", r.Coordinator)
			}
		})
	}
}

func TestNothingThere(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	url := "http://" + l.Addr().String()
	_ = l.Close()
	for _, where := range []string{url, "https://nowhere..invalid"} {
		r, err := Run(t.Context(), Options{Coordinator: where, UDPTimeout: 100 * time.Millisecond})
		if err != nil || r.Coordinator.Reachable || r.Coordinator.Error == "" || r.Coordinator.Next == "" || r.Tunnel.Possible {
			t.Errorf("%s: %+v, %v", where, r, err)
		}
	}
}

func TestOptions(t *testing.T) {
	for _, url := range []string{"", "culvert.example.com", "ftp://culvert.example.com", "https://u:p@culvert.example.com", "http://culvert.example.com", "https://x/?a=b", "https://"} {
		_, err := Run(t.Context(), Options{Coordinator: url})
		if problem.CodeOf(err) != problem.Usage || strings.Contains(fmt.Sprint(err), "u:p") {
			t.Errorf("%q: %v", url, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Run(ctx, Options{Coordinator: "http://127.0.0.1:1"}); problem.CodeOf(err) != problem.Cancelled {
		t.Errorf("cancelled: %v", err)
	}
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"plain": "plain", "a\nb": "a b", "\x1b[31m": " [31m", "ü": "ü", "\u202ex": " x",
		strings.Repeat("é", 150): strings.Repeat("é", 100) + "…",
	} {
		if got := Printable(in); got != want {
			t.Errorf("%q: %q", in, got)
		}
	}
}
