package claims

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"
)

// Bounds on a fetch.
const (
	maxDiscovery = 256 << 10        // bytes of a discovery document
	fetchTimeout = 10 * time.Second // for one document
	maxRedirects = 3
)

// fetcher gets issuers' documents.
type fetcher struct {
	client   *http.Client
	insecure bool
	idle     func() // drops idle connections of a transport of our own
}

func newFetcher(opts Options) *fetcher {
	f := &fetcher{insecure: opts.InsecureHTTP, idle: func() {}}
	client := http.Client{Timeout: fetchTimeout}
	if opts.HTTPClient != nil {
		client = *opts.HTTPClient
	} else {
		own := http.DefaultTransport.(*http.Transport).Clone()
		client.Transport = own
		f.idle = own.CloseIdleConnections
	}
	client.CheckRedirect = sameHost
	f.client = &client
	return f
}

func (f *fetcher) close() { f.idle() }

// sameHost lets a redirect stay on the host that was asked, and never go from https to http.
func sameHost(req *http.Request, via []*http.Request) error {
	first := via[0].URL
	switch {
	case len(via) > maxRedirects:
		return fmt.Errorf("more than %d redirects", maxRedirects)
	case req.URL.Host != first.Host || req.URL.Scheme != first.Scheme:
		return fmt.Errorf("a redirect to another host, %q", req.URL.Host)
	}
	return nil
}

// keys gets an issuer's key set by way of its discovery document (OpenID Connect Discovery 1.0, sections 3 and 4). The
// document is asked for each time, so that an issuer may move its keys.
func (f *fetcher) keys(ctx context.Context, issuer string) (keyring, error) {
	var doc struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	data, err := f.get(ctx, strings.TrimSuffix(issuer, "/")+"/.well-known/openid-configuration", maxDiscovery)
	if err != nil {
		return nil, fmt.Errorf("get the discovery document: %w", err)
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("read the discovery document: %w", err)
	}
	if doc.Issuer != issuer {
		return nil, fmt.Errorf("the discovery document is of another issuer, %s", clip(doc.Issuer))
	}
	if err := f.checkKeysURL(issuer, doc.JWKSURI); err != nil {
		return nil, fmt.Errorf("jwks_uri %s: %w", clip(doc.JWKSURI), err)
	}
	if data, err = f.get(ctx, doc.JWKSURI, maxKeySet); err != nil {
		return nil, fmt.Errorf("get the key set: %w", err)
	}
	return parseKeySet(data)
}

// checkKeysURL lets only an issuer that is itself on plain HTTP publish its keys there.
func (f *fetcher) checkKeysURL(issuer, uri string) error {
	u, err := checkURL(uri, f.insecure)
	if err != nil {
		return err
	}
	if u.Scheme == "http" && !strings.HasPrefix(issuer, "http:") {
		return errors.New("an https issuer publishes its keys over https")
	}
	return nil
}

// get reads one document of at most limit bytes.
func (f *fetcher) get(ctx context.Context, uri string, limit int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, uri, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "culvert")
	resp, err := f.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answered %s", uri, resp.Status)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", uri, err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s is longer than %d bytes", uri, limit)
	}
	return data, nil
}

// validate refuses an issuer whose keys could not be fetched safely. With a key file the URL is only a name.
func (i Issuer) validate(insecure bool) error {
	if i.URL == "" {
		return errors.New("its URL is empty")
	}
	if i.JWKSFile != "" {
		return nil
	}
	u, err := checkURL(i.URL, insecure)
	if err != nil {
		return err
	}
	if u.RawQuery != "" || u.ForceQuery {
		return errors.New("an issuer's URL has no query")
	}
	return nil
}

// checkURL wants https, or plain HTTP to loopback, or plain HTTP anywhere if insecure.
func checkURL(text string, insecure bool) (*url.URL, error) {
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return nil, errors.New("it is no URL")
	case u.Host == "" || u.Opaque != "":
		return nil, errors.New("it is no absolute URL")
	case u.User != nil || u.Fragment != "" || strings.Contains(text, "#"):
		return nil, errors.New("it carries a user or a fragment")
	case u.Scheme == "https":
		return u, nil
	case u.Scheme != "http":
		return nil, errors.New("it is not https")
	case !insecure && !loopback(u.Hostname()):
		return nil, errors.New("plain http is for loopback alone, unless insecure_http is set")
	}
	return u, nil
}

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}
