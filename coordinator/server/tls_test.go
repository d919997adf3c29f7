package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/coordinator/api/apitest"
	"github.com/culvertnet/culvert/coordinator/certs/certstest"
	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

func loadOr(t *testing.T, file string) *config.Config {
	t.Helper()
	cfg, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// TestTLS: HTTP/2 for clients, HTTP/1.1 for the gateway's WebSocket on the same port.
func TestTLS(t *testing.T) {
	r := newRig(t, Options{})
	r.stop()
	cert := certstest.Write(t, filepath.Dir(r.file), "one")
	r.write(strings.Replace(r.doc, "state: {dir: state}", "state: {dir: state}\ntls: {cert: c.pem, key: k.pem}", 1))
	r.start()
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	client := &http.Client{Transport: transport}
	base := "https://" + r.server.Addr().String()
	resp, err := client.Get(base + wire.PathInfo)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.ProtoMajor != 2 || resp.StatusCode != http.StatusOK {
		t.Errorf("%s %s", resp.Proto, resp.Status)
	}
	g, err := apitest.Dial(t.Context(), apitest.Options{URL: base, Client: client, Network: "corp", Credential: "Enrol " + enrolSecret, Hello: hello("east")})
	if err != nil {
		t.Fatal(err)
	}
	g.Close()
}

// TestSTUN: the UDP port says where a request came from.
func TestSTUN(t *testing.T) {
	r := newRig(t, Options{})
	c, err := net.Dial("udp", r.server.STUNAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	id := nat.TxID{1, 2, 3}
	buf := make([]byte, 1500)
	r.eventually("STUN answers", func() bool {
		_, _ = c.Write(nat.BindingRequest(id))
		_ = c.SetReadDeadline(time.Now().Add(time.Second))
		n, err := c.Read(buf)
		if err != nil {
			return false
		}
		got, mapped, err := nat.BindingResponse(buf[:n])
		return err == nil && got == id && mapped.String() == c.LocalAddr().String()
	})
}

// TestRun ends with its context and closes everything.
func TestRun(t *testing.T) {
	r := newRig(t, Options{})
	r.stop()
	log := &syncBuffer{}
	s, err := New(Options{Config: loadOr(t, r.file), Logger: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, 5*time.Second) }()
	r.eventually("it serves", func() bool { return strings.Contains(log.String(), "coordinator serves") })
	if at := s.STUNAddr().String(); !strings.Contains(log.String(), at) {
		t.Errorf("the log does not say that STUN is answered on %s:\n%s", at, log.String())
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
