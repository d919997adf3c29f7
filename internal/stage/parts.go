//go:build unix

package stage

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/lab"
)

// ports are where things listen on a flat stage, whose hosts may all be one address. Zero means the usual one.
type ports struct {
	coordinator, stun, issuer, gateway, http, echo, other uint16
}

func (s *Stage) choosePorts() error {
	if !s.opts.Flat {
		return nil
	}
	for _, p := range []*uint16{&s.ports.coordinator, &s.ports.stun, &s.ports.issuer, &s.ports.gateway,
		&s.ports.http, &s.ports.echo, &s.ports.other} {
		// A port that is free for TCP now; nothing holds it until its program does.
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return fmt.Errorf("find a free port: %w", err)
		}
		defer l.Close()
		*p = uint16(l.Addr().(*net.TCPAddr).Port)
	}
	return nil
}

// port maps a port of the service host to where it is on this stage.
func (s *Stage) port(p uint16) uint16 {
	if !s.opts.Flat {
		return p
	}
	return map[uint16]uint16{PortHTTP: s.ports.http, PortEcho: s.ports.echo, PortOther: s.ports.other}[p]
}

func (s *Stage) scheme() string {
	if s.opts.Flat {
		return "http" // loopback alone; and off Linux no program can be told of a test's authority
	}
	return "https"
}

// at is "IP:port" of a host, and just "IP" where the port is the scheme's own.
func (s *Stage) at(h *lab.Host, port, usual uint16) string {
	if port == 0 || port == usual {
		return h.Addr().String()
	}
	return netip.AddrPortFrom(h.Addr(), port).String()
}

func (s *Stage) startIssuer() error {
	base := s.scheme() + "://" + s.at(s.IssuerHost, s.ports.issuer, 443)
	issuer, err := claimstest.New(base)
	if err != nil {
		return fmt.Errorf("make an issuer: %w", err)
	}
	s.Issuer = issuer
	port := s.ports.issuer
	if port == 0 {
		port = 443
	}
	var conf *tls.Config
	if !s.opts.Flat {
		conf = s.ca.serverConfig()
	}
	return s.Serve(s.IssuerHost, port, conf, issuer)
}

// CAFile is the stage's authority as a PEM file, for programs that do not take SSL_CERT_FILE.
func (s *Stage) CAFile() string { return s.ca.caFile() }

// ReleaseHost is where the action gets releases of the client from. The stage's certificate is good for it, so that a test can
// serve them.
const ReleaseHost = "github.com"

// Authority is a TLS configuration with the stage's certificate for its hosts on the internet.
func (s *Stage) Authority() *tls.Config { return s.ca.serverConfig() }

// Certificate maps the files of the stage's certificate to the names under which documentation speaks of them.
func (s *Stage) Certificate() map[string]string {
	return map[string]string{s.ca.certFile(): "tls.crt", s.ca.keyFile(): "tls.key"}
}

// Serve serves HTTP on a host until the stage is closed, over TLS where conf is set.
func (s *Stage) Serve(h *lab.Host, port uint16, conf *tls.Config, handler http.Handler) error {
	l, err := h.Listen(netip.AddrPortFrom(h.Addr(), port).String())
	if err != nil {
		return fmt.Errorf("listen on host %s: %w", h.Name(), err)
	}
	if conf != nil {
		l = tls.NewListener(l, conf)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l) // ends with ErrServerClosed
	}()
	s.onClose(func() {
		_ = server.Close()
		<-done
	})
	return nil
}

// Greeting is what the default service answers.
const Greeting = "hello from the private service\n"

func (s *Stage) startService() error {
	if len(s.opts.Names) > 0 {
		if err := s.serveNames(); err != nil {
			return err
		}
	}
	handler := s.opts.Service
	if handler == nil {
		handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, Greeting) })
	}
	for _, port := range []uint16{PortHTTP, PortOther} {
		if err := s.Serve(s.Private, s.port(port), nil, handler); err != nil {
			return err
		}
	}
	_, stop, err := s.Private.ServeEcho(s.Target(PortEcho))
	if err != nil {
		return fmt.Errorf("serve echo: %w", err)
	}
	s.onClose(stop)
	return nil
}

// authority is a certificate authority with one server certificate, and where its files are.
type authority struct {
	dir  string
	cert tls.Certificate
	pool *x509.CertPool
}

func (a *authority) caFile() string   { return filepath.Join(a.dir, "ca.pem") }
func (a *authority) certFile() string { return filepath.Join(a.dir, "cert.pem") }
func (a *authority) keyFile() string  { return filepath.Join(a.dir, "key.pem") }

func (a *authority) serverConfig() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{a.cert}, NextProtos: []string{"http/1.1"}, MinVersion: tls.VersionTLS13}
}

func newAuthority(dir string, servers ...netip.Addr) (*authority, error) {
	a := &authority{dir: dir, pool: x509.NewCertPool()}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "test server"},
		NotBefore: root.NotBefore, NotAfter: root.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, DNSNames: []string{ReleaseHost},
	}
	for _, addr := range servers {
		leaf.IPAddresses = append(leaf.IPAddresses, addr.AsSlice())
	}
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	rootDER, err := x509.CreateCertificate(rand.Reader, root, root, rootKey.Public(), rootKey)
	if err != nil {
		return nil, fmt.Errorf("make a test authority: %w", err)
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, root, leafKey.Public(), rootKey)
	if err != nil {
		return nil, fmt.Errorf("make a test certificate: %w", err)
	}
	return a, a.store(rootDER, leafDER, leafKey)
}

func (a *authority) store(root, leaf []byte, key *ecdsa.PrivateKey) error {
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	rootPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root})
	a.pool.AppendCertsFromPEM(rootPEM)
	if a.cert, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
		return err
	}
	for file, data := range map[string][]byte{a.caFile(): rootPEM, a.certFile(): certPEM, a.keyFile(): keyPEM} {
		if err := os.WriteFile(file, data, 0o644); err != nil { // a key of this minute and this lab alone
			return err
		}
	}
	return nil
}

// newEnrolment makes an enrolment secret and gives it with the SHA-256 that the coordinator's file holds.
func newEnrolment() (secret, sum string) {
	secret = rand.Text() + rand.Text()
	digest := sha256.Sum256([]byte(secret))
	return secret, hex.EncodeToString(digest[:])
}
