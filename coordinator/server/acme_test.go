package server

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/culvertnet/culvert/coordinator/certs/certstest"
	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/wire"
)

// ca is Pebble, the Let's Encrypt project's CA for tests, as a process of its own.
type ca struct {
	directory  string
	management string
	file       string // what its own certificate is verified by
	cmd        *exec.Cmd
}

// startCA starts it. It asks for challenges at these ports of 127.0.0.1, whatever the host.
func startCA(t *testing.T, tlsPort, httpPort int) *ca {
	t.Helper()
	program := os.Getenv("CULVERT_TEST_PEBBLE")
	if _, err := os.Stat(program); err != nil {
		lab.Skip(t, "pebble is missing; make tools-test fetches it, and CULVERT_TEST_PEBBLE names it")
	}
	dir := t.TempDir()
	certstest.Write(t, dir, "ca")
	c := &ca{file: filepath.Join(dir, "c.pem")}
	api, management := freePort(t), freePort(t)
	c.directory, c.management = fmt.Sprintf("https://127.0.0.1:%d/dir", api), fmt.Sprintf("https://127.0.0.1:%d", management)
	doc, err := json.Marshal(map[string]any{"pebble": map[string]any{
		"listenAddress": fmt.Sprintf("127.0.0.1:%d", api), "managementListenAddress": fmt.Sprintf("127.0.0.1:%d", management),
		"certificate": c.file, "privateKey": filepath.Join(dir, "k.pem"), "tlsPort": tlsPort, "httpPort": httpPort,
		"keyAlgorithm": "ecdsa", "retryAfter": map[string]int{"authz": 1, "order": 1},
	}})
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "pebble.json")
	if err := os.WriteFile(config, doc, 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	c.cmd = exec.Command(program, "-strict", "-config", config, "-dnsserver", everybodyIsHere(t))
	c.cmd.Env = append(os.Environ(), "PEBBLE_VA_NOSLEEP=1")
	c.cmd.Stdout, c.cmd.Stderr = &out, &out
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.stop()
		if t.Failed() {
			t.Log(out.String())
		}
	})
	return c
}

func (c *ca) stop() {
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait() // a second time is an error
}

// root is what the certificates that it gives are verified by: another one with each start.
func (c *ca) root(t *testing.T) *x509.CertPool {
	t.Helper()
	own, err := os.ReadFile(c.file)
	if err != nil {
		t.Fatal(err)
	}
	trust := x509.NewCertPool()
	trust.AppendCertsFromPEM(own)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: trust}}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: time.Minute}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		resp, err := client.Get(c.management + "/roots/0")
		if err == nil {
			data, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			pool := x509.NewCertPool()
			if err == nil && pool.AppendCertsFromPEM(data) {
				return pool
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("pebble does not start: %v", err)
		}
	}
}

// everybodyIsHere is a DNS server to which every name is 127.0.0.1.
func everybodyIsHere(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") // which is how pebble asks
	if err != nil {
		t.Fatal(err)
	}
	srv := &dns.Server{Listener: l, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		if q.Question[0].Qtype == dns.TypeA {
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(127, 0, 0, 1)}}
		}
		_ = w.WriteMsg(m)
	})}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = srv.ActivateAndServe()
	}()
	t.Cleanup(func() {
		_ = errors.Join(l.Close(), srv.Shutdown()) // whichever it takes, if it has only just begun
		<-ended
	})
	return l.Addr().String()
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// connect does a handshake as a client does that knows the coordinator by a name, and gives its certificate.
func (r *rig) connect(name string, roots *x509.CertPool) (*x509.Certificate, error) {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 15 * time.Second}, "tcp", r.server.Addr().String(),
		&tls.Config{ServerName: name, RootCAs: roots, NextProtos: []string{"h2"}})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if p := conn.ConnectionState().NegotiatedProtocol; p != "h2" {
		return nil, fmt.Errorf("speaks %q", p)
	}
	return conn.ConnectionState().PeerCertificates[0], nil
}

// withACME is a rig's configuration with a certificate of a CA.
func withACME(c *ca, port int, more string) func(string) string {
	return func(doc string) string {
		doc = strings.Replace(doc, `listen: "127.0.0.1:0"`, fmt.Sprintf(`listen: "127.0.0.1:%d"`, port), 1)
		return doc + fmt.Sprintf("acme: {email: ops@example.com, directory: %q, roots: %q%s}\n", c.directory, c.file, more)
	}
}

// TestCertificateByACME: a real CA gives a certificate by TLS-ALPN-01 on the coordinator's own port. It is asked for one name
// alone, and the certificate outlives a restart without the CA.
func TestCertificateByACME(t *testing.T) {
	port := freePort(t)
	c := startCA(t, port, freePort(t))
	roots := c.root(t)
	r := newRigOf(t, Options{}, withACME(c, port, ""))
	var first *x509.Certificate
	r.eventually("there is a certificate", func() (ok bool) {
		cert, err := r.connect("culvert.test", roots)
		first = cert
		return err == nil
	})
	if _, err := r.connect("evil.test", roots); err == nil {
		t.Error("another name has a certificate")
	}
	if cert, err := r.connect("CULVERT.test", roots); err != nil || !cert.Equal(first) {
		t.Errorf("in capitals: %v", err)
	}
	c.stop()
	r.stop()
	r.start()
	if again, err := r.connect("culvert.test", roots); err != nil || !again.Equal(first) {
		t.Errorf("after a restart: %v", err)
	}
	r.nameless(roots)
}

// nameless connects without naming a host, and gets the one certificate that there is.
func (r *rig) nameless(roots *x509.CertPool) {
	r.t.Helper()
	conn, err := tls.Dial("tcp", r.server.Addr().String(), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		r.t.Errorf("without a name: %v", err)
		return
	}
	defer conn.Close()
	leaf := conn.ConnectionState().PeerCertificates[0]
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: pool(conn.ConnectionState().PeerCertificates[1:]), DNSName: "culvert.test"}); err != nil {
		r.t.Errorf("without a name: %v", err)
	}
}

func pool(list []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range list {
		p.AddCert(c)
	}
	return p
}

// TestCertificateByHTTP: where the CA does not reach the HTTPS port, it is shown by HTTP-01 on the plain listener, which else
// only sends browsers to the real address.
func TestCertificateByHTTP(t *testing.T) {
	port, plain := freePort(t), freePort(t)
	c := startCA(t, freePort(t), plain)
	roots := c.root(t)
	r := newRigOf(t, Options{}, withACME(c, port, fmt.Sprintf(", http: \"127.0.0.1:%d\"", plain)))
	r.eventually("there is a certificate", func() bool {
		_, err := r.connect("culvert.test", roots)
		return err == nil
	})
	base := fmt.Sprintf("http://127.0.0.1:%d", plain)
	client := &http.Client{Transport: r.client.Transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	for path, want := range map[string]int{wire.PathInfo: http.StatusFound, "/.well-known/acme-challenge/x": http.StatusForbidden} {
		resp, err := client.Get(base + path)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want || want == http.StatusFound && resp.Header.Get("Location") != publicURL {
			t.Errorf("%s: %s, to %q", path, resp.Status, resp.Header.Get("Location"))
		}
	}
	if resp, err := client.Post(base+wire.PathSessions, "application/json", strings.NewReader("{}")); err != nil || resp.StatusCode != http.StatusBadRequest {
		t.Errorf("a join in the clear: %v", err)
	} else {
		_ = resp.Body.Close()
	}
}

// TestNoCertificate: with a CA that is away, handshakes fail in time, the log says why, and the coordinator stops when it is told to.
func TestNoCertificate(t *testing.T) {
	c := &ca{directory: fmt.Sprintf("https://127.0.0.1:%d/dir", freePort(t)), file: filepath.Join(t.TempDir(), "c.pem")}
	certstest.Write(t, filepath.Dir(c.file), "ca")
	r := newRigOf(t, Options{}, withACME(c, freePort(t), ""))
	r.eventually("the log says it", func() bool { return strings.Contains(r.log.String(), "the CA gives no certificate") })
	r.stop()
	if err := os.WriteFile(c.file, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := loadOr(t, r.file)
	s, err := New(Options{Config: cfg})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "acme.roots") {
		t.Errorf("with a file of roots that holds none: %v", err)
	}
}

// TestChallengersAreBounded: who asks the plain listener again and again is told to stop, and nobody else is.
func TestChallengersAreBounded(t *testing.T) {
	looked := 0
	h := slowly(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { looked++ }))
	ask := func(from string) int {
		r := httptest.NewRequest(http.MethodGet, "/.well-known/acme-challenge/x", nil)
		r.RemoteAddr = from
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Code
	}
	refused := 0
	for n := range 50 * challengeBurst {
		if ask(fmt.Sprintf("[2001:db8::%x]:%d", n, 1024+n)) == http.StatusTooManyRequests {
			refused++
		}
	}
	if refused == 0 || looked+refused != 50*challengeBurst {
		t.Errorf("%d requests were looked at, %d refused", looked, refused)
	}
	if code := ask("192.0.2.1:1"); code != http.StatusOK {
		t.Errorf("another address: %d", code)
	}
}
