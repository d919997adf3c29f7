package relayd

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/coordinator/certs/certstest"
	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// coordinator is one that signs, the n-th.
func coordinator(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, ed25519.SeedSize))
}

func publicKey(n byte) string {
	return base64.RawURLEncoding.EncodeToString(coordinator(n).Public().(ed25519.PublicKey))
}

// rig is a relay on loopback with its file.
type rig struct {
	*Server
	file  string
	log   *buffer
	roots *x509.CertPool
}

type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

const plain = "udp: 127.0.0.1:0\nprobe: off\nlisten: 127.0.0.1:0\n"

func newRig(t *testing.T, text string, reload time.Duration) *rig {
	t.Helper()
	r := &rig{file: filepath.Join(t.TempDir(), "relay.yaml"), log: &buffer{}, roots: x509.NewCertPool()}
	r.roots.AddCert(certstest.Write(t, filepath.Dir(r.file), "relay"))
	r.write(t, text)
	cfg, err := config.LoadStandalone(r.file)
	if err != nil {
		t.Fatal(err)
	}
	if r.Server, err = New(Options{Config: cfg, Reload: reload, Logger: slog.New(slog.NewTextHandler(r.log, nil))}); err != nil {
		t.Fatal(err)
	}
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *rig) write(t *testing.T, text string) {
	t.Helper()
	if !strings.Contains(text, "ticket_keys") {
		text = "ticket_keys: [" + publicKey(1) + "]\n" + text
	}
	next := r.file + ".new"
	if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, r.file); err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}

// bind opens a WebSocket and binds a session of the n-th coordinator's, and gives the relay's code.
func (r *rig) bind(t *testing.T, n byte, header http.Header) (code int, s *relay.Stream) {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: r.roots}}
	t.Cleanup(transport.CloseIdleConnections)
	scheme := "http"
	if r.opts.Config.TLS != nil {
		scheme = "https"
	}
	url := fmt.Sprintf("%s://%s%s", scheme, r.Addr(), wire.PathRelay)
	s, err := relay.Dial(t.Context(), relay.DialOptions{URL: url, HTTP: &http.Client{Transport: transport}, Header: header})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	holder, err := wire.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	secret, err := relay.Sign(coordinator(n), relay.Claims{
		Session: holder.Public().SessionID(), Key: holder.Public(), Issued: time.Now(), Expires: time.Now().Add(time.Hour),
	})
	if err != nil {
		t.Fatal(err)
	}
	ticket, err := relay.DecodeTicket(secret)
	if err != nil {
		t.Fatal(err)
	}
	k, err := relay.DeriveBindKey(holder, s.Offer().Key)
	if err != nil {
		t.Fatal(err)
	}
	s.SendSTUN(relay.AppendBind(nil, relay.Bind{ID: nat.TxID{1}, Nonce: s.Offer().Nonce, Ticket: ticket}, &k))
	msg, err := s.Receive()
	if err != nil {
		t.Fatal(err)
	}
	blocks := relay.WalkBlocks(msg)
	blocks.Next()
	a, ok := relay.ParseAnswer(blocks.Data)
	if !ok {
		t.Fatalf("no answer: %x", msg)
	}
	return a.Code, s
}

func get(t *testing.T, addr net.Addr, path string) (int, string) {
	t.Helper()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Get("http://" + addr.String() + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body)
}

func TestServes(t *testing.T) {
	r := newRig(t, plain+"metrics: 127.0.0.1:0\n", 0)
	if code, _ := r.bind(t, 1, nil); code != 0 {
		t.Fatalf("a good ticket gets %d", code)
	}
	if code, _ := r.bind(t, 2, nil); code != relay.CodeTicket {
		t.Fatalf("another coordinator's gets %d", code)
	}
	if status, body := get(t, r.Addr(), "/healthz"); status != http.StatusOK || body != "ok\n" {
		t.Errorf("health: %d %q", status, body)
	}
	if status, body := get(t, r.Addr(), "/metrics"); status != http.StatusNotFound || !strings.Contains(body, string(problem.NotFound)) {
		t.Errorf("metrics where everybody asks: %d %q", status, body)
	}
	status, body := get(t, r.MetricsAddr(), "/metrics")
	for _, want := range []string{
		"culvert_relay_sessions 1", "culvert_relay_websockets 2", `culvert_relay_binds_total{result="ok"} 1`,
		`culvert_relay_binds_total{result="refused"} 1`, `culvert_relay_dropped_packets_total{reason="queue"} 0`,
	} {
		if status != http.StatusOK || !strings.Contains(body, want+"\n") {
			t.Errorf("metrics lack %s: %d\n%s", want, status, body)
		}
	}
}

func TestTLSAndTheProbePort(t *testing.T) {
	r := newRig(t, "udp: 127.0.0.1:0\nprobe: 127.0.0.1:0\nlisten: 127.0.0.1:0\ntls: {cert: c.pem, key: k.pem}\n", 0)
	if code, _ := r.bind(t, 1, nil); code != 0 {
		t.Fatalf("refused with %d", code)
	}
	for _, to := range []string{r.UDPAddr().String(), r.probe.Addr().String()} {
		c, err := net.Dial("udp", to)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		seen, err := nat.Probe(t.Context(), packetConn{c.(*net.UDPConn)}, []netip.AddrPort{netip.MustParseAddrPort(to)})
		if err != nil || len(seen) != 1 || seen[0].Mapped.String() != c.LocalAddr().String() {
			t.Errorf("%s: %v, %v", to, seen, err)
		}
	}
}

// packetConn lets a connected socket pass for one that is not.
type packetConn struct{ *net.UDPConn }

func (p packetConn) WriteTo(b []byte, _ net.Addr) (int, error) { return p.Write(b) }

// Who comes through a trusted proxy is one source by what the proxy says, not by the proxy's address.
func TestTrustedProxies(t *testing.T) {
	r := newRig(t, plain+"trusted_proxies: [127.0.0.1]\nlimits: {websockets: 500}\n", 0)
	for i := range 70 { // more than one source may have open without a binding
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+r.Addr().String()+wire.PathRelay, nil)
		for k, v := range map[string]string{
			"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
			"Sec-WebSocket-Protocol": relay.Protocol, "X-Forwarded-For": fmt.Sprintf("192.0.2.%d", i),
		} {
			req.Header.Set(k, v)
		}
		resp, err := (&http.Transport{}).RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("the %dth source gets %s", i, resp.Status)
		}
	}
}

func TestReload(t *testing.T) {
	r := newRig(t, plain, time.Millisecond)
	if code, _ := r.bind(t, 2, nil); code != relay.CodeTicket {
		t.Fatalf("the second coordinator's ticket gets %d", code)
	}
	r.write(t, fmt.Sprintf("ticket_keys: [%s, %s]\n", publicKey(1), publicKey(2))+plain)
	eventually(t, "the key is taken", func() bool { return strings.Contains(r.log.String(), "keys have changed") })
	if code, _ := r.bind(t, 2, nil); code != 0 {
		t.Fatalf("the second coordinator's ticket gets %d", code)
	}
	r.write(t, "ticket_keys: [nonsense]\n"+plain)
	eventually(t, "the broken file is refused", func() bool { return strings.Contains(r.log.String(), "is refused and the old one stays") })
	if code, _ := r.bind(t, 2, nil); code != 0 {
		t.Fatalf("after a broken change: %d", code)
	}
	r.write(t, fmt.Sprintf("ticket_keys: [%s]\nname: other\n", publicKey(1))+plain)
	eventually(t, "the rest waits", func() bool { return strings.Contains(r.log.String(), "wait for a restart") })
	if code, _ := r.bind(t, 2, nil); code != relay.CodeTicket {
		t.Fatalf("a coordinator that is gone: %d", code)
	}
}

func TestStartLeavesNothingOpen(t *testing.T) {
	busy := newRig(t, plain+"metrics: 127.0.0.1:0\n", 0)
	probe, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer probe.Close()
	for name, text := range map[string]string{
		"udp":     fmt.Sprintf("udp: %s\nprobe: off\nlisten: 127.0.0.1:0\n", busy.UDPAddr()),
		"probe":   fmt.Sprintf("udp: 127.0.0.1:0\nprobe: %s\nlisten: 127.0.0.1:0\n", probe.LocalAddr()),
		"listen":  fmt.Sprintf("udp: 127.0.0.1:0\nprobe: off\nlisten: %s\n", busy.Addr()),
		"metrics": plain + fmt.Sprintf("metrics: %s\n", busy.MetricsAddr()),
		"tls":     plain + "tls: {cert: missing.pem, key: missing.pem}\n",
	} {
		cfg, err := config.ParseStandalone("relay.yaml", []byte("ticket_keys: ["+publicKey(1)+"]\n"+text))
		if err != nil {
			t.Fatal(err)
		}
		s, err := New(Options{Config: cfg})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Start(t.Context()); err == nil || problem.From(err).Next == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := New(Options{}); err == nil {
		t.Error("no configuration passes")
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	cfg, err := config.ParseStandalone("relay.yaml", []byte("ticket_keys: ["+publicKey(1)+"]\n"+plain))
	if err != nil {
		t.Fatal(err)
	}
	log := &buffer{}
	s, err := New(Options{Config: cfg, Logger: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, time.Minute) }()
	eventually(t, "it serves", func() bool { return strings.Contains(log.String(), "relay serves") })
	_, stream := (&rig{Server: s}).bind(t, 1, nil) // which the relay closes
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if _, err := stream.Receive(); err == nil {
		t.Error("the side is not told")
	}
}
