package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/coordinator/api/apitest"
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

// certificate writes a self-signed certificate for 127.0.0.1 and gives it.
func certificate(t *testing.T, dir, name string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{"c.pem": {Type: "CERTIFICATE", Bytes: der}, "k.pem": {Type: "PRIVATE KEY", Bytes: raw}} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert, _ := x509.ParseCertificate(der)
	return cert
}

// TestTLS: HTTP/2 for clients, HTTP/1.1 for the gateway's WebSocket on the same port.
func TestTLS(t *testing.T) {
	r := newRig(t, Options{})
	r.stop()
	cert := certificate(t, filepath.Dir(r.file), "one")
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

func TestCertificateReload(t *testing.T) {
	dir := t.TempDir()
	certificate(t, dir, "one")
	c, err := loadCertificates(filepath.Join(dir, "c.pem"), filepath.Join(dir, "k.pem"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	name := func() string {
		c.looked = time.Time{} // as if a second had passed
		pair, err := c.get(nil)
		if err != nil {
			t.Fatal(err)
		}
		return pair.Leaf.Subject.CommonName
	}
	if got := name(); got != "one" {
		t.Fatalf("serves %q", got)
	}
	touch := func(at time.Time) {
		for _, f := range []string{"c.pem", "k.pem"} {
			if err := os.Chtimes(filepath.Join(dir, f), at, at); err != nil {
				t.Fatal(err)
			}
		}
	}
	certificate(t, dir, "two")
	touch(time.Now().Add(time.Minute))
	if got := name(); got != "two" {
		t.Errorf("serves %q after the change", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "c.pem"), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	touch(time.Now().Add(2 * time.Minute))
	if got := name(); got != "two" {
		t.Errorf("serves %q after a broken change", got)
	}
	certificate(t, dir, "three")
	touch(time.Now().Add(3 * time.Minute))
	if got := name(); got != "three" {
		t.Errorf("serves %q after it was mended", got)
	}
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
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
