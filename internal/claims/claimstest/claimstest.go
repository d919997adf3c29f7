// Package claimstest is an issuer that behaves like GitHub's, for tests and the demo: discovery, a key set that rotates,
// and the request endpoint that runners ask.
package claimstest

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Issuer signs tokens. It is an http.Handler that serves /.well-known/openid-configuration, /.well-known/jwks and the
// request endpoint /request, below the path of its URL. It is safe for concurrent use.
type Issuer struct {
	url    string
	prefix string // of every path

	mu      sync.Mutex
	keys    []signingKey // the last one signs, all are published
	jobs    map[string]job
	fetches int
	asked   int
	away    bool
	now     func() time.Time
}

type signingKey struct {
	id      string
	private *rsa.PrivateKey
}

type job struct {
	bearer string
	claims map[string]any
}

// New makes an issuer with a fresh RSA key. url is its public base URL and the tokens' iss.
func New(url string) (*Issuer, error) {
	i := &Issuer{url: url, prefix: pathOf(url), jobs: make(map[string]job), now: time.Now}
	return i, i.Rotate()
}

// TB is the part of testing.TB that [Start] needs.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Cleanup(func())
}

// Start makes an issuer that serves on loopback until the test ends.
func Start(t TB) *Issuer {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("listen on loopback: %v", err)
	}
	i, err := New("http://" + ln.Addr().String())
	if err != nil {
		t.Fatalf("make an issuer: %v", err)
	}
	server := &http.Server{Handler: i, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(ln) // ends with ErrServerClosed
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
	return i
}

// URL is the issuer's URL, the tokens' iss.
func (i *Issuer) URL() string { return i.url }

func pathOf(base string) string {
	u, err := url.Parse(base)
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(u.Path, "/")
}

// ServeHTTP serves discovery, keys and the request endpoint.
func (i *Issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, i.prefix)
	i.mu.Lock()
	if path == "/.well-known/jwks" {
		i.fetches++
	}
	if strings.HasPrefix(path, "/request/") {
		i.asked++
	}
	away := i.away
	i.mu.Unlock()
	switch {
	case away:
		http.Error(w, "service unavailable", http.StatusServiceUnavailable)
	case path == "/.well-known/openid-configuration":
		answer(w, i.discovery())
	case path == "/.well-known/jwks":
		answer(w, i.KeySet())
	case strings.HasPrefix(path, "/request/"):
		i.serveRequest(w, r, strings.TrimPrefix(path, "/request/"))
	default:
		http.NotFound(w, r)
	}
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	_ = json.NewEncoder(w).Encode(v) // the peer went away; nothing is left to tell it
}

// discovery is what GitHub's document says, shortened to what readers use.
func (i *Issuer) discovery() map[string]any {
	return map[string]any{
		"issuer":                                i.url,
		"jwks_uri":                              strings.TrimSuffix(i.url, "/") + "/.well-known/jwks",
		"subject_types_supported":               []string{"public", "pairwise"},
		"response_types_supported":              []string{"id_token"},
		"id_token_signing_alg_values_supported": []string{"RS256"},
		"scopes_supported":                      []string{"openid"},
	}
}

// KeySet is what the issuer publishes now; as JSON it is the content of a jwks_file.
func (i *Issuer) KeySet() jose.JSONWebKeySet {
	i.mu.Lock()
	defer i.mu.Unlock()
	var set jose.JSONWebKeySet
	for _, key := range i.keys {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: key.private.Public(), KeyID: key.id, Algorithm: "RS256", Use: "sig"})
	}
	return set
}

// Rotate makes a new signing key and publishes it beside the old ones.
func (i *Issuer) Rotate() error {
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return fmt.Errorf("make an RSA key: %w", err)
	}
	sum := sha256.Sum256(private.N.Bytes())
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys = append(i.keys, signingKey{id: strings.ToUpper(hex.EncodeToString(sum[:20])), private: private})
	return nil
}

// Withdraw stops publishing every key but the one that signs.
func (i *Issuer) Withdraw() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys = i.keys[len(i.keys)-1:]
}

// Fetches counts how often the key set was asked for, answered or not.
func (i *Issuer) Fetches() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.fetches
}

// Asked counts how often the request endpoint was asked for a token, answered or not.
func (i *Issuer) Asked() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.asked
}

// SetAway makes every endpoint answer 503, or serve again.
func (i *Issuer) SetAway(away bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.away = away
}

// SetNow fakes the issuer's clock.
func (i *Issuer) SetNow(now func() time.Time) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.now = now
}
