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
	conn := &connection{}
	info, err := fetchInfo(ctx, c.Transport, c.url, conn)
	r.Address, r.TLS = conn.address, conn.tls
	if err != nil {
		p := explainHTTP(c.url.String(), err)
		r.Error, r.Next = printable(p.Message), printable(p.Next)
		return
	}
	c.info, r.Reachable = info, true
	for _, relay := range info.Relays {
		c.report.Relays = append(c.report.Relays, Relay{Name: printable(relay.Name)})
	}
	started := time.Now()
	if _, err := fetchInfo(ctx, c.Transport, c.url, nil); err == nil {
		r.RTT = milliseconds(time.Since(started))
	}
}

func noProxy() string {
	if v := os.Getenv("NO_PROXY"); v != "" {
		return v
	}
	return os.Getenv("no_proxy")
}

// connection is how a request got there.
type connection struct {
	address string
	tls     *TLS
}

// trace has a request note its connection.
func (c *connection) trace(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(i httptrace.GotConnInfo) { c.address = i.Conn.RemoteAddr().String() },
	})
}

func (c *connection) secured(state *tls.ConnectionState) {
	if state == nil || len(state.PeerCertificates) == 0 {
		return
	}
	leaf := state.PeerCertificates[0]
	c.tls = &TLS{Version: tls.VersionName(state.Version), Issuer: issuer(leaf), Expires: leaf.NotAfter}
}

// issuer names who signed a certificate, for people.
func issuer(cert *x509.Certificate) string {
	name := cert.Issuer.CommonName
	if org := cert.Issuer.Organization; len(org) > 0 && org[0] != name {
		name = org[0] + " " + name
	}
	return printable(strings.TrimSpace(name))
}

// fetchInfo asks a coordinator what it tells everybody.
func fetchInfo(ctx context.Context, transport http.RoundTripper, base *url.URL, conn *connection) (info wire.Info, err error) {
	ctx, cancel := context.WithTimeout(ctx, httpTimeout)
	defer cancel()
	if conn != nil {
		ctx = conn.trace(ctx)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base.String()+wire.PathInfo, nil)
	if err != nil {
		return info, fmt.Errorf("make the request: %w", err)
	}
	resp, err := transport.RoundTrip(req) // not a client's: it would follow redirects
	if err != nil {
		return info, err
	}
	defer resp.Body.Close()
	if conn != nil {
		conn.secured(resp.TLS)
	}
	if resp.StatusCode != http.StatusOK {
		return info, problem.Read(resp)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, wire.MaxBody)).Decode(&info); err != nil {
		return info, problem.Wrap(err, problem.Incompatible, "what answers is not Culvert's API",
			"check that the URL is a Culvert coordinator's and that no proxy answers in its place")
	}
	info.Relays = info.Relays[:min(len(info.Relays), wire.MaxRelays)]
	return info, nil
}

// explainHTTP tells a person why a request got no answer.
func explainHTTP(url string, err error) *problem.Error {
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
		return problem.Wrap(err, problem.Unreachable, fmt.Sprintf("%s does not answer in time", url), "have the firewall let it through, or set HTTPS_PROXY where a proxy is the way out")
	}
	return problem.Wrap(err, problem.Unreachable, fmt.Sprintf("%s cannot be reached: %v", url, err), "have the firewall let it through, or set HTTPS_PROXY where a proxy is the way out")
}
