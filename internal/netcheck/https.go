package netcheck

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// https asks the coordinator what it tells everybody, twice: the second time tells how far away it is.
func (c *checker) https(ctx context.Context) {
	r := &c.report.Coordinator
	r.URL = c.url.String()
	if proxy := c.Transport.ProxyFor(c.url); proxy != nil {
		c.report.Proxy = &Proxy{URL: proxy.String(), NoProxy: noProxy()}
	}
	info, conn, err := FetchInfo(ctx, c.Transport, c.url)
	r.Address, r.TLS = conn.Address, conn.TLS
	if err != nil {
		p := Explain(c.url.String(), err)
		r.Error, r.Next = Printable(p.Message), Printable(p.Next)
		return
	}
	c.info, r.Reachable = info, true
	for _, relay := range info.Relays {
		c.report.Relays = append(c.report.Relays, Relay{Name: Printable(relay.Name)})
	}
	started := time.Now()
	if _, _, err := FetchInfo(ctx, c.Transport, c.url); err == nil {
		r.RTT = milliseconds(time.Since(started))
	}
}

func noProxy() string {
	if v := os.Getenv("NO_PROXY"); v != "" {
		return v
	}
	return os.Getenv("no_proxy")
}

// Connection is how a request got to where it was answered.
type Connection struct {
	Address string // to which it went: a proxy's, where there is one
	TLS     *TLS   // nil with plain HTTP
}

// issuer names who signed a certificate, for people.
func issuer(cert *x509.Certificate) string {
	name := cert.Issuer.CommonName
	if org := cert.Issuer.Organization; len(org) > 0 && org[0] != name {
		name = org[0] + " " + name
	}
	return Printable(strings.TrimSpace(name))
}

// Get does a GET and follows no redirect. It gives the response with a body of at most [wire.MaxBody] bytes, which the caller
// closes, and how the request got there, also where it failed on the way.
func Get(ctx context.Context, transport http.RoundTripper, address string) (*http.Response, Connection, error) {
	var conn Connection
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(i httptrace.GotConnInfo) { conn.Address = i.Conn.RemoteAddr().String() },
	})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, conn, fmt.Errorf("make the request: %w", err)
	}
	resp, err := transport.RoundTrip(req) // not a client's: it would follow redirects
	if err != nil {
		return nil, conn, err
	}
	if s := resp.TLS; s != nil && len(s.PeerCertificates) > 0 {
		leaf := s.PeerCertificates[0]
		conn.TLS = &TLS{Version: tls.VersionName(s.Version), Issuer: issuer(leaf), Expires: leaf.NotAfter}
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(resp.Body, wire.MaxBody), resp.Body}
	return resp, conn, nil
}

// FetchInfo asks a coordinator what it tells everybody. Its errors are for [Explain].
func FetchInfo(ctx context.Context, transport http.RoundTripper, coordinator *url.URL) (info wire.Info, conn Connection, err error) {
	ctx, cancel := context.WithTimeout(ctx, httpTimeout)
	defer cancel()
	resp, conn, err := Get(ctx, transport, strings.TrimRight(coordinator.String(), "/")+wire.PathInfo)
	if err != nil {
		return info, conn, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return info, conn, problem.Read(resp)
	}
	if err := json.NewDecoder(resp.Body).Decode(&info); err != nil {
		return info, conn, problem.Wrap(err, problem.Incompatible, "what answers is not Culvert's API",
			"check that the URL is a Culvert coordinator's and that no proxy answers in its place")
	}
	info.STUN = info.STUN[:min(len(info.STUN), maxSTUN)]
	info.Relays = info.Relays[:min(len(info.Relays), wire.MaxRelays)]
	return info, conn, nil
}

// Explain tells a person why a request to a URL got no answer.
func Explain(url string, err error) *problem.Error {
	if p, ok := errors.AsType[*problem.Error](err); ok {
		return p
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		if dns.IsNotFound {
			return problem.Wrap(err, problem.Unreachable, fmt.Sprintf("the name %s does not exist here", dns.Name), "check how it is spelt, and that this network's DNS knows it")
		}
		return problem.Wrap(err, problem.Unreachable, fmt.Sprintf("the name %s cannot be looked up: %v", dns.Name, dns), "check this network's DNS")
	}
	if verify, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		by := ""
		if len(verify.UnverifiedCertificates) > 0 {
			by = fmt.Sprintf(" (it was issued by %q)", issuer(verify.UnverifiedCertificates[0]))
		}
		return problem.Wrap(err, problem.Unreachable, fmt.Sprintf("the certificate of %s is not trusted%s: %v", url, by, verify.Err),
			"if a proxy of this network reads TLS, have it leave the coordinator alone; for a private authority point SSL_CERT_FILE at its certificate")
	}
	if errors.Is(err, context.DeadlineExceeded) || os.IsTimeout(err) {
		return problem.Wrap(err, problem.Unreachable, fmt.Sprintf("%s does not answer in time", url), "see that it runs, have the firewall let it through, and have HTTPS_PROXY name the proxy where one is the way out")
	}
	return problem.Wrap(err, problem.Unreachable, fmt.Sprintf("%s cannot be reached: %v", url, err), "see that it runs, have the firewall let it through, and have HTTPS_PROXY name the proxy where one is the way out")
}
