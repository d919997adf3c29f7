package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"

	"github.com/culvertnet/culvert/internal/problem"
)

const (
	// firstAgain is how long after a failure the CA is asked again; it doubles up to lastAgain. CAs count failures: Let's Encrypt
	// takes five an hour. autocert itself remembers a failure for a minute.
	firstAgain = 65 * time.Second
	lastAgain  = time.Hour

	askTimeout = 30 * time.Second // one request to the CA
	patience   = 10 * time.Second // of a handshake, for a certificate that is being obtained
)

// ACMEOptions configure [NewACME].
type ACMEOptions struct {
	Host      string         // the only name that a certificate is asked for
	Email     string         // of the account at the CA
	Directory string         // the CA's (RFC 8555, section 7.1.1)
	Roots     string         // PEM file that the directory's own certificate is verified by; "" for the system's
	Cache     autocert.Cache // keeps account, certificate and the answers to challenges; nodes that share it can answer for each other
	Logger    *slog.Logger   // defaults to slog.Default
}

// Validate fills defaults.
func (o *ACMEOptions) Validate() error {
	if o.Host == "" || o.Directory == "" || o.Cache == nil {
		return errors.New("a certificate by ACME needs a host, a directory and a cache")
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return nil
}

// ACME serves a certificate that a CA gives for one name, and has it renewed a third of its life before it ends. The CA is only ever
// asked by [ACME.Obtain] and by renewals, so that no stranger's handshake makes work there.
type ACME struct {
	opts  ACMEOptions
	m     *autocert.Manager
	life  context.Context // of what is asked of the CA
	end   context.CancelFunc
	ready chan struct{} // closed once there is a certificate
}

// NewACME makes it; it asks for nothing yet. A file of roots that cannot be used is [problem.BadConfig].
func NewACME(opts ACMEOptions) (*ACME, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	a := &ACME{opts: opts, ready: make(chan struct{})}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DisableKeepAlives = true // it is asked every few weeks
	if opts.Roots != "" {
		pem, err := os.ReadFile(opts.Roots)
		pool := x509.NewCertPool()
		if err == nil && !pool.AppendCertsFromPEM(pem) {
			err = errors.New("it holds no certificate")
		}
		if err != nil {
			return nil, problem.Wrap(err, problem.BadConfig, fmt.Sprintf("cannot use acme.roots: %v", err), "give a PEM file with the CA's root")
		}
		transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool}
	}
	a.life, a.end = context.WithCancel(context.Background())
	a.m = &autocert.Manager{
		Prompt:     autocert.AcceptTOS,
		Cache:      opts.Cache,
		HostPolicy: autocert.HostWhitelist(opts.Host),
		Email:      opts.Email,
		Client: &acme.Client{
			DirectoryURL: opts.Directory,
			UserAgent:    "culvert-coordinator",
			HTTPClient:   &http.Client{Transport: &lifelong{a.life, transport}, Timeout: askTimeout},
		},
	}
	return a, nil
}

// lifelong ends requests when a life ends: autocert gives its own no context of ours.
type lifelong struct {
	life context.Context
	next http.RoundTripper
}

// RoundTrip is that of next.
func (l *lifelong) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := l.life.Err(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(r.Context())
	stop := context.AfterFunc(l.life, cancel)
	resp, err := l.next.RoundTrip(r.WithContext(ctx))
	if err != nil {
		stop()
		cancel()
		return nil, err
	}
	resp.Body = &bound{resp.Body, func() { stop(); cancel() }}
	return resp, nil
}

// Protos are the protocols that the TLS listener offers: HTTP, and what the CA asks for in a TLS-ALPN-01 challenge (RFC 8737).
func (a *ACME) Protos() []string { return []string{"h2", "http/1.1", acme.ALPNProto} }

// Get is tls.Config.GetCertificate. A client that names no host gets the only one's.
func (a *ACME) Get(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if name := strings.TrimSuffix(hello.ServerName, "."); name != "" && !strings.EqualFold(name, a.opts.Host) {
		return nil, errors.New("no certificate for another host")
	}
	if len(hello.SupportedProtos) == 1 && hello.SupportedProtos[0] == acme.ALPNProto {
		return a.m.GetCertificate(hello) // the CA; the answer to its challenge, or an error
	}
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-a.ready:
		return a.m.GetCertificate(a.hello())
	case <-late.C:
	case <-hello.Context().Done():
	}
	return nil, errors.New("the CA has not given a certificate yet")
}

// hello asks autocert for the one certificate that there is, of an ECDSA key, whatever a client can do.
func (a *ACME) hello() *tls.ClientHelloInfo {
	return &tls.ClientHelloInfo{ServerName: a.opts.Host, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}}
}

// Obtain gets the certificate, from the cache or from the CA, again and again until there is one or ctx ends.
func (a *ACME) Obtain(ctx context.Context) {
	defer context.AfterFunc(ctx, a.end)()
	for wait := firstAgain; ; wait = min(2*wait, lastAgain) {
		cert, err := a.m.GetCertificate(a.hello())
		if err == nil {
			close(a.ready)
			a.opts.Logger.Info("the certificate is in use", "host", a.opts.Host, "expires", cert.Leaf.NotAfter)
			return
		}
		if ctx.Err() != nil {
			return
		}
		a.opts.Logger.Error("the CA gives no certificate, and nobody can connect without one", "host", a.opts.Host, "directory", a.opts.Directory,
			"err", err, "again_in", wait, "next", "let the CA reach port 443 of the host, or port 80 where acme.http listens; see that the host's DNS leads here")
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// Close ends what is asked of the CA, now and later.
func (a *ACME) Close() { a.end() }

// Challenges answers HTTP-01 challenges (RFC 8555, section 8.3), and sends browsers that come for anything else to base.
func (a *ACME) Challenges(base string) http.Handler {
	h := a.m.HTTPHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			http.Error(w, "use HTTPS", http.StatusBadRequest)
			return
		}
		http.Redirect(w, r, base, http.StatusFound)
	}))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if host, _, err := net.SplitHostPort(r.Host); err == nil { // a CA that was told of another port than 80
			r.Host = host
		}
		h.ServeHTTP(w, r)
	})
}

// bound is a body that frees what its request holds once it has been read.
type bound struct {
	io.ReadCloser
	free func()
}

// Close frees.
func (b *bound) Close() error {
	defer b.free()
	return b.ReadCloser.Close()
}
