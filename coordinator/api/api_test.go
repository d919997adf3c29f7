package api

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/limit"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
	"github.com/go-chi/chi/v5/middleware"
)

func TestOptionsNeedTheirParts(t *testing.T) {
	if _, err := New(Options{}); err == nil {
		t.Error("an API without parts was made")
	}
}

func TestWantsEvents(t *testing.T) {
	for accept, want := range map[string]bool{
		"":                                        false,
		"application/json":                        false,
		"application/x-ndjson":                    true,
		"application/x-ndjson, application/json":  true,
		"application/json, Application/X-NDJSON":  true,
		"application/x-ndjson;q=0":                false,
		"application/x-ndjson;q=0.5, text/html":   true,
		"*/*":                                     false,
		"application/x-ndjsonx":                   false,
		"application/json; charset=utf-8, , ;;;,": false,
	} {
		r := httptest.NewRequest(http.MethodPost, wire.PathSessions, nil)
		r.Header.Set("Accept", accept)
		if got := wantsEvents(r); got != want {
			t.Errorf("%q: %v", accept, got)
		}
	}
}

func TestCredential(t *testing.T) {
	for header, want := range map[string][2]string{
		"":                {"", ""},
		"Bearer":          {"Bearer", ""},
		"Bearer abc":      {"Bearer", "abc"},
		"Enrol  two  x ":  {"Enrol", "two  x"},
		"bearer\tabc def": {"bearer\tabc", "def"},
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Header.Set("Authorization", header)
		if scheme, secret := credential(r); scheme != want[0] || secret.Reveal() != want[1] {
			t.Errorf("%q: %q %q", header, scheme, secret.Reveal())
		}
	}
}

// bare is an API without parts, for its middleware.
func bare(trusted ...netip.Prefix) *API {
	a := &API{opts: Options{TrustedProxies: trusted, Audit: noAudit{}}, log: slog.New(slog.DiscardHandler), limits: limit.New[netip.Prefix](1, 1, 10), failures: limit.New[netip.Prefix](1, 1, 10)}
	a.rules.Store(&Rules{Config: &config.Config{URL: "http://127.0.0.1"}})
	return a
}

func TestClientIP(t *testing.T) {
	proxy := netip.MustParsePrefix("10.0.0.0/8")
	for _, c := range []struct {
		name, remote, xff, want string
		trusted                 []netip.Prefix
	}{
		{"direct", "203.0.113.5:999", "", "203.0.113.5", nil},
		{"spoofed without a proxy", "203.0.113.5:999", "198.51.100.1", "203.0.113.5", nil},
		{"spoofed past the proxy", "203.0.113.5:999", "198.51.100.1", "203.0.113.5", []netip.Prefix{proxy}},
		{"through the proxy", "10.1.1.1:999", "198.51.100.1", "198.51.100.1", []netip.Prefix{proxy}},
		{"spoofed before the proxy", "10.1.1.1:999", "192.0.2.66, 198.51.100.1", "198.51.100.1", []netip.Prefix{proxy}},
		{"through two", "10.1.1.1:999", "198.51.100.1, 10.2.2.2", "198.51.100.1", []netip.Prefix{proxy}},
		{"rubbish", "10.1.1.1:999", "198.51.100.1, rubbish", "", []netip.Prefix{proxy}},
	} {
		var got string
		h := bare(c.trusted...).clientIP()(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = middleware.GetClientIP(r.Context()) }))
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.RemoteAddr = c.remote
		if c.xff != "" {
			r.Header.Set("X-Forwarded-For", c.xff)
		}
		h.ServeHTTP(httptest.NewRecorder(), r)
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// TestWhoLosesTheConnection: whoever asks too much does, but not a trusted proxy, on whose connection others ask as well; and nobody's
// address but the one that asked pays.
func TestWhoLosesTheConnection(t *testing.T) {
	a := bare(netip.MustParsePrefix("10.0.0.0/8"))
	h := a.clientIP()(a.limited(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
	ask := func(remote, xff, body string, size int64) (int, string) {
		r := httptest.NewRequest(http.MethodPost, wire.PathSessions, strings.NewReader(body))
		r.RemoteAddr, r.ContentLength = remote, size
		if xff != "" {
			r.Header.Set("X-Forwarded-For", xff)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		resp := w.Result()
		if p := problem.Read(resp); w.Code != http.StatusOK && (p.Code != problem.RateLimited || p.Next == "" ||
			resp.Header.Get("Content-Type") != problem.MediaType || resp.Header.Get("Retry-After") == "") {
			t.Errorf("%v, headers %v", p, resp.Header)
		}
		return w.Code, resp.Header.Get("Connection")
	}
	for _, c := range []struct {
		name, remote, xff string
		size              int64
		want              int
		connection        string
	}{
		{"the first", "10.1.1.1:9", "198.51.100.1", 2, http.StatusOK, ""},
		{"through the proxy", "10.1.1.1:9", "198.51.100.1", 2, http.StatusTooManyRequests, ""},
		{"another through the proxy", "10.1.1.1:9", "198.51.100.2", 2, http.StatusOK, ""},
		{"through the proxy, without an end", "10.1.1.1:9", "198.51.100.1", -1, http.StatusTooManyRequests, "close"},
		{"through the proxy, too large", "10.1.1.1:9", "198.51.100.1", wire.MaxBody + 1, http.StatusTooManyRequests, "close"},
		{"the same without the proxy", "198.51.100.1:9", "", 2, http.StatusTooManyRequests, "close"},
		{"one that calls itself behind a proxy", "198.51.100.1:9", "10.1.1.1", 2, http.StatusTooManyRequests, "close"},
	} {
		if code, connection := ask(c.remote, c.xff, "{}", c.size); code != c.want || connection != c.connection {
			t.Errorf("%s: %d, Connection %q", c.name, code, connection)
		}
	}
}

func TestPanicsAreProblems(t *testing.T) {
	a := bare()
	w := httptest.NewRecorder()
	a.recovered(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("secret detail") })).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	if w.Code != http.StatusInternalServerError || w.Header().Get("Content-Type") != problem.MediaType || strings.Contains(w.Body.String(), "secret detail") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	defer func() {
		if recover() != http.ErrAbortHandler {
			t.Error("ErrAbortHandler was swallowed")
		}
	}()
	a.recovered(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
}

func TestNoHSTSOverPlainHTTP(t *testing.T) {
	w := httptest.NewRecorder()
	bare().secured(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	if w.Header().Get("Strict-Transport-Security") != "" || w.Header().Get("Cache-Control") != "no-store" {
		t.Errorf("headers %v", w.Header())
	}
}

func TestPrintable(t *testing.T) {
	if got := printable("a\x1b[31m\nbé☃c\x7f"); got != "a[31mbc" {
		t.Errorf("got %q", got)
	}
}

func TestHelloWithTooManySessions(t *testing.T) {
	h := wire.Hello{Version: wire.Version, Instance: "0123456789abcdef", Name: "east", Key: wire.Key{1}}
	h.Sessions = slices.Repeat([]wire.Held{{Session: wire.Key{1}.SessionID()}}, wire.MaxHeld)
	if why := checkHello(&h); why != "" {
		t.Errorf("as many as there may be: %s", why)
	}
	h.Sessions = append(h.Sessions, h.Sessions[0])
	if why := checkHello(&h); why == "" {
		t.Error("one more was taken")
	}
}

func TestHeldWithTooMuch(t *testing.T) {
	id := wire.Key{1}.SessionID()
	for name, c := range map[string]struct {
		held wire.Held
		ok   bool
	}{
		"as much as may be":  {wire.Held{Session: id, Rules: slices.Repeat([]string{strings.Repeat("r", maxRule)}, maxHeldRules), Addresses: make([]netip.Addr, maxHeldAddrs)}, true},
		"too many rules":     {wire.Held{Session: id, Rules: make([]string, maxHeldRules+1)}, false},
		"too many addresses": {wire.Held{Session: id, Addresses: make([]netip.Addr, maxHeldAddrs+1)}, false},
		"a long rule":        {wire.Held{Session: id, Rules: []string{strings.Repeat("r", maxRule+1)}}, false},
		"no session's id":    {wire.Held{Session: id[1:]}, false},
	} {
		if why := checkHeld(c.held); why == "" != c.ok {
			t.Errorf("%s: %q", name, why)
		}
	}
}
