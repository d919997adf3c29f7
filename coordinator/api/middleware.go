package api

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"

	"github.com/culvertnet/culvert/coordinator/limit"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// recovered turns a panic into a problem and a log line with its stack.
func (a *API) recovered(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			v := recover()
			if v == nil {
				return
			}
			if v == http.ErrAbortHandler {
				panic(v) // net/http's own way to cut a connection
			}
			a.log.Error("a request handler panicked", "path", r.URL.Path, "err", fmt.Sprint(v), "stack", string(debug.Stack()))
			a.fail(w, problem.New(problem.Failed, "the coordinator met a fault of its own", "report this with the coordinator's log"))
		}()
		next.ServeHTTP(w, r)
	})
}

// secured sets the headers that keep browsers from making anything of an API's answers.
func (a *API) secured(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-store")
		if strings.HasPrefix(a.rules.Load().Config.URL, "https://") {
			h.Set("Strict-Transport-Security", "max-age=31536000")
		}
		next.ServeHTTP(w, r)
	})
}

// clientIP finds out who asks: the TCP peer, or through trusted proxies whom they name.
func (a *API) clientIP() func(http.Handler) http.Handler {
	if len(a.opts.TrustedProxies) == 0 {
		return middleware.ClientIPFromRemoteAddr
	}
	trusted := make([]string, 0, len(a.opts.TrustedProxies))
	for _, p := range a.opts.TrustedProxies {
		trusted = append(trusted, p.String())
	}
	return middleware.ClientIPFromXFF(trusted...)
}

// limited bounds what one address may ask, before any work is done for it: its requests, and its credentials that were not
// believed. Whoever asks too much loses the connection, so that asking again costs a new one; a trusted proxy keeps it, because it may carry
// what others ask.
func (a *API) limited(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		addr := middleware.GetClientIPAddr(r.Context())
		no := &overRate
		switch source := limit.Source(addr); {
		case !a.limits.Allow(source):
		case a.failures.Empty(source):
			no = &overFailures
		default:
			next.ServeHTTP(w, r)
			return
		}
		a.warned.Do(func() {
			a.log.Warn("rate limited", "addr", addr.String(), "path", clip(r.URL.Path, 64), "err", no.err.Message)
		})
		a.opts.Audit.Refused(no.err, addr)
		if !a.proxied(r) || r.ContentLength < 0 || r.ContentLength > wire.MaxBody { // else net/http reads the body, to keep the connection
			w.Header().Set("Connection", "close")
		}
		no.write(w)
	})
}

// stock is a refusal that is sent so often that it is encoded once.
type stock struct {
	err  *problem.Error
	body []byte
}

var (
	overRate     = newStock("too many requests from this address")
	overFailures = newStock("too many credentials from this address that were not believed")
)

func newStock(what string) stock {
	err := problem.New(problem.RateLimited, what, "wait a few seconds and try again")
	body, _ := json.Marshal(err) // strings alone: it always encodes
	return stock{err, append(body, '\n')}
}

func (f *stock) write(w http.ResponseWriter) {
	w.Header().Set("Content-Type", problem.MediaType)
	w.Header().Set("Retry-After", retryAfter)
	w.WriteHeader(http.StatusTooManyRequests)
	_, _ = w.Write(f.body) // whoever asked has gone
}

// retryAfter is what those who are to come again are told, in seconds.
const retryAfter = "2"

// proxied reports whether a request came by a trusted proxy.
func (a *API) proxied(r *http.Request) bool {
	if len(a.opts.TrustedProxies) == 0 {
		return false
	}
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	addr := peer.Addr().Unmap()
	return err == nil && slices.ContainsFunc(a.opts.TrustedProxies, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// disbelieved counts a credential that proved nothing against its address.
func (a *API) disbelieved(err error, addr netip.Addr) {
	switch problem.CodeOf(err) {
	case problem.BadRequest, problem.TooLarge, problem.Unauthorized, problem.TokenInvalid, problem.TokenExpired, problem.TokenEarly,
		problem.TokenIssuer, problem.TokenAudience, problem.TokenUnknownKey:
		a.failures.Charge(limit.Source(addr))
	}
}

// fail answers with a problem and the headers that its status asks for.
func (a *API) fail(w http.ResponseWriter, err error) {
	p := problem.From(err)
	if p.Code == problem.Failed {
		a.log.Error("request failed", "code", p.Code, "err", err, "cause", p.Err)
	}
	switch p.Code.Status() {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", retryAfter)
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", "Bearer") // RFC 9110, section 15.5.2
	}
	problem.Write(w, p)
}

func notFound(w http.ResponseWriter, r *http.Request) {
	problem.Write(w, problem.New(problem.NotFound, "there is nothing at this path", "check the URL; the API begins with /v1/"))
}

// methods are those that any of our paths knows.
var methods = []string{http.MethodGet, http.MethodPost, http.MethodPatch, http.MethodDelete}

func wrongMethod(w http.ResponseWriter, r *http.Request) {
	routes := chi.RouteContext(r.Context()).Routes
	for _, m := range methods {
		if routes.Match(chi.NewRouteContext(), m, r.URL.Path) {
			w.Header().Add("Allow", m) // RFC 9110, section 15.5.6
		}
	}
	problem.Write(w, problem.New(problem.WrongMethod, "this path does not take "+clip(r.Method, 16), "see the Allow header for what it takes"))
}

// clip shortens what somebody else wrote.
func clip(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}
