package api

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-chi/chi/v5/middleware"
	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestOptionsNeedTheirParts(t *testing.T) {
	if _, err := New(Options{}); err == nil {
		t.Error("an API without parts was made")
	}
}

func TestLimiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(2, 3, 100)
		a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
		for range 3 {
			if !l.allow(a) {
				t.Fatal("the burst is not granted")
			}
		}
		if l.allow(a) {
			t.Error("more than the burst is granted")
		}
		if !l.allow(b) {
			t.Error("another address pays for it")
		}
		time.Sleep(500 * time.Millisecond)
		if !l.allow(a) || l.allow(a) {
			t.Error("half a second at 2/s is worth one request")
		}
	})
}

// TestLimiterIsBounded: whatever addresses ask, the table keeps to its size and index and order agree.
func TestLimiterIsBounded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(1, 8).Draw(t, "max")
		l := newLimiter(1, 1, size)
		for range rapid.IntRange(0, 50).Draw(t, "requests") {
			b := rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "addr")
			addr := netip.AddrFrom4([4]byte{10, 0, 0, b[3] % 16})
			l.allow(addr)
			if l.recent.Len() > size || l.recent.Len() != len(l.byAddr) {
				t.Fatalf("%d in order, %d indexed, at most %d wanted", l.recent.Len(), len(l.byAddr), size)
			}
			if front := l.recent.Front().Value.(*bucket).who; front != oneSource(addr) {
				t.Fatalf("%s in front, not %s", front, addr)
			}
		}
	})
}

func TestOneSource(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1":            "192.0.2.1/32",
		"::ffff:192.0.2.1":     "192.0.2.1/32",
		"2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64",
		"fe80::1%eth0":         "fe80::/64",
	} {
		if got := oneSource(netip.MustParseAddr(in)).String(); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
	if oneSource(netip.Addr{}).IsValid() {
		t.Error("no address is an address")
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
	a := &API{opts: Options{TrustedProxies: trusted, Audit: noAudit{}}, log: slog.New(slog.DiscardHandler), limits: newLimiter(1, 1, 10)}
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
