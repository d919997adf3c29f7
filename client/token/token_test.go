package token_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/client/token"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const audience = "https://culvert.example.com/wg/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE"

func TestTokenFromGitHub(t *testing.T) {
	issuer := claimstest.Start(t)
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	source, err := token.FromEnv(issuer.AddJob(map[string]any{"repository": "acme/shop"}).Getenv, &http.Client{Transport: transport})
	if err != nil {
		t.Fatal(err)
	}
	got, err := source.Token(t.Context(), audience)
	if err != nil {
		t.Fatal(err)
	}
	v, err := claims.New(claims.Options{Issuers: []claims.Issuer{{URL: issuer.URL()}}})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	c, err := v.Verify(t.Context(), got.Reveal(), audience)
	if err != nil || c.Repository != "acme/shop" {
		t.Errorf("got %+v, %v", c, err)
	}
}

func TestFromEnvRefuses(t *testing.T) {
	for name, env := range map[string]map[string]string{
		"nothing":   {},
		"no URL":    {"GITHUB_ACTIONS": "true", token.EnvToken: "secret"},
		"no token":  {"GITHUB_ACTIONS": "true", token.EnvURL: "https://x.example/?a=1"},
		"no URL 2":  {token.EnvURL: "x", token.EnvToken: "secret"},
		"no scheme": {token.EnvURL: "//x.example/", token.EnvToken: "secret"},
	} {
		_, err := token.FromEnv(func(name string) string { return env[name] }, nil)
		if problem.CodeOf(err) != problem.TokenUnavailable {
			t.Errorf("%s: got %v", name, err)
		}
		if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the error shows the secret", name)
		}
	}
	_, err := token.FromEnv(func(string) string { return "" }, nil)
	for _, want := range []string{"permissions:", "id-token: write", "contents: read", "forks"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not mention %q", err, want)
		}
	}
	if strings.Contains(err.Error(), "sudo") {
		t.Errorf("%q speaks of sudo to who did not use it", err)
	}
	_, err = token.FromEnv(func(name string) string { return map[string]string{"SUDO_UID": "1001"}[name] }, nil)
	for _, want := range []string{"sudo -E", "id-token: write"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("under sudo %q does not mention %q", err, want)
		}
	}
}

// scripted answers requests in turn; the last answer repeats.
type scripted struct {
	answers []func(r *http.Request) (*http.Response, error)
	asked   atomic.Int32
	seen    func(r *http.Request)
}

func (s *scripted) RoundTrip(r *http.Request) (*http.Response, error) {
	if s.seen != nil {
		s.seen(r)
	}
	n := int(s.asked.Add(1))
	return s.answers[min(n, len(s.answers))-1](r)
}

func status(code int, body string, headers ...string) func(*http.Request) (*http.Response, error) {
	return func(r *http.Request) (*http.Response, error) {
		w := httptest.NewRecorder()
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(code)
		_, _ = w.WriteString(body)
		resp := w.Result()
		resp.Request = r
		return resp, nil
	}
}

func failing(err error) func(*http.Request) (*http.Response, error) {
	return func(*http.Request) (*http.Response, error) { return nil, err }
}

func hanging(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}

const good = `{"count":3,"value":"a.b.c"}`

func ask(t *testing.T, ctx context.Context, server *scripted, audience string) (wire.Secret, error) {
	t.Helper()
	env := map[string]string{token.EnvURL: "https://runner.example/idtoken?api-version=2.0", token.EnvToken: "top-secret"}
	source, err := token.FromEnv(func(name string) string { return env[name] }, &http.Client{Transport: server})
	if err != nil {
		t.Fatal(err)
	}
	got, err := source.Token(ctx, audience)
	if err != nil && strings.Contains(fmt.Sprintf("%v %v", err, errors.Unwrap(err)), "top-secret") {
		t.Errorf("the error shows the secret: %v", err)
	}
	return got, err
}

func TestRequest(t *testing.T) {
	server := &scripted{answers: []func(*http.Request) (*http.Response, error){status(200, good)}}
	server.seen = func(r *http.Request) {
		if got := r.URL.RawQuery; got != "api-version=2.0&audience=https%3A%2F%2Fa.example%2Fwg%2Fx%26y" {
			t.Errorf("query %q", got)
		}
		if got := r.Header.Get("Authorization"); got != "Bearer top-secret" {
			t.Errorf("authorization %q", got)
		}
	}
	if got, err := ask(t, t.Context(), server, "https://a.example/wg/x&y"); err != nil || got.Reveal() != "a.b.c" {
		t.Errorf("got %q, %v", got.Reveal(), err)
	}
}

func TestTransientFailuresAreRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := &scripted{answers: []func(*http.Request) (*http.Response, error){
			status(503, ""), failing(errors.New("connection reset by peer")), status(500, "<html>"), hanging,
			status(429, "", "Retry-After", "7"), status(502, ""), status(200, good),
		}}
		begin := time.Now()
		got, err := ask(t, t.Context(), server, audience)
		if err != nil || got.Reveal() != "a.b.c" {
			t.Fatalf("got %v", err)
		}
		// 10 s for the one that hangs, 7 s that the server asked for, and five waits between 0.125 s and 8 s.
		if took := time.Since(begin); took < 17*time.Second || took > 35*time.Second {
			t.Errorf("took %v", took)
		}
	})
}

func TestRetriesEndWithTheContext(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(context.Context) (context.Context, context.CancelFunc)
		code problem.Code
	}{
		"deadline": {func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, time.Minute)
		}, problem.Timeout},
		"cancelled": {func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			time.AfterFunc(time.Minute, cancel)
			return ctx, cancel
		}, problem.Cancelled},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := c.end(t.Context())
				defer cancel()
				server := &scripted{answers: []func(*http.Request) (*http.Response, error){status(503, "")}}
				begin := time.Now()
				_, err := ask(t, ctx, server, audience)
				if problem.CodeOf(err) != c.code || time.Since(begin) != time.Minute {
					t.Errorf("after %v: %v", time.Since(begin), err)
				}
				if n := server.asked.Load(); n < 8 || n > 24 {
					t.Errorf("asked %d times in a minute", n)
				}
			})
		})
	}
}

func TestRefusalsAreFinal(t *testing.T) {
	long := `{"value":"` + strings.Repeat("a", wire.MaxToken+1) + `"}`
	for name, c := range map[string]struct {
		answer   func(*http.Request) (*http.Response, error)
		audience string
		mentions string
	}{
		"401":                 {status(401, ""), audience, "id-token: write"},
		"403":                 {status(403, ""), audience, "id-token: write"},
		"403, github.com":     {status(403, ""), "https://culvert.GitHub.com.example/wg/x", "contains github.com"},
		"404":                 {status(404, ""), audience, "404"},
		"redirect":            {status(302, "", "Location", "https://evil.example/"), audience, "302"},
		"no JSON":             {status(200, "<html>"), audience, "no token"},
		"no value":            {status(200, `{"count":0}`), audience, "no token"},
		"value of other type": {status(200, `{"value":{}}`), audience, "no token"},
		"token too long":      {status(200, long), audience, "no token"},
		"answer without end":  {status(200, `{"value":"a.b.c","x":"`+strings.Repeat("x", 1<<20)+`"}`), audience, "no token"},
	} {
		t.Run(name, func(t *testing.T) {
			server := &scripted{answers: []func(*http.Request) (*http.Response, error){c.answer}}
			_, err := ask(t, t.Context(), server, c.audience)
			if problem.CodeOf(err) != problem.TokenRefused || !strings.Contains(err.Error(), c.mentions) {
				t.Errorf("got %v", err)
			}
			if n := server.asked.Load(); n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

func TestUntrustedCertificateIsFinal(t *testing.T) {
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	env := map[string]string{token.EnvURL: server.URL + "?a=1", token.EnvToken: "top-secret"}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	source, err := token.FromEnv(func(name string) string { return env[name] }, &http.Client{Transport: transport})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := source.Token(t.Context(), audience); problem.CodeOf(err) != problem.TokenRefused {
		t.Errorf("got %v", err)
	}
}

func TestGitHubRefusesItsOwnName(t *testing.T) {
	issuer := claimstest.Start(t)
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	source, err := token.FromEnv(issuer.AddJob(nil).Getenv, &http.Client{Transport: transport})
	if err != nil {
		t.Fatal(err)
	}
	_, err = source.Token(t.Context(), "https://culvert.github.com.example/wg/x")
	if problem.CodeOf(err) != problem.TokenRefused || !strings.Contains(err.Error(), "without github.com") {
		t.Errorf("got %v", err)
	}
	if n := issuer.Asked(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

func TestErrorStyle(t *testing.T) {
	_, err := token.FromEnv(func(string) string { return "" }, nil)
	if !errors.Is(err, &problem.Error{Code: problem.TokenUnavailable}) {
		t.Fatal(err)
	}
	p := problem.From(err)
	if strings.HasSuffix(p.Message, ".") || strings.HasSuffix(p.Next, ".") {
		t.Errorf("%q, %q", p.Message, p.Next)
	}
}
