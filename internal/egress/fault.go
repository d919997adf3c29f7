package egress

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"

	"github.com/culvertnet/culvert/internal/problem"
)

// Fault says what is wrong with the URL of a coordinator that a request to it has failed for: its name, its certificate or its scheme. It
// is nil for what may be over by itself, and for what is wrong with a proxy.
func (t *Transport) Fault(base string, err error) *problem.Error {
	proxied := false
	if u, perr := url.Parse(base); perr == nil {
		proxied = t.ProxyFor(u) != nil
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "proxyconnect" {
		return nil
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok && dns.IsNotFound && !proxied {
		return problem.Wrap(err, problem.UnknownName, fmt.Sprintf("the name of the coordinator %s does not exist", base),
			"check how --coordinator is spelt")
	}
	if why := untrusted(err); why != nil {
		return problem.Wrap(err, problem.Certificate, fmt.Sprintf("the certificate of %s is not trusted: %v", base, why),
			"check the URL; for a private authority point SSL_CERT_FILE at its certificate")
	}
	if _, garbled := errors.AsType[tls.RecordHeaderError](err); garbled || errors.Is(err, http.ErrSchemeMismatch) {
		return problem.Wrap(err, problem.NoTLS, fmt.Sprintf("what answers at %s does not speak TLS", base),
			"check the port in --coordinator; a coordinator behind a proxy that ends TLS is reached at the proxy's URL")
	}
	return nil
}

// untrusted gives what is wrong with a certificate, nil where that is not why a request failed.
func untrusted(err error) error {
	if verify, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return verify.Err
	}
	if host, ok := errors.AsType[x509.HostnameError](err); ok {
		return host
	}
	if authority, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return authority
	}
	return nil
}
