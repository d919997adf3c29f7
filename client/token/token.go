// Package token asks GitHub for the job's OIDC token. It requests; it never judges.
//
// The interface is the one of actions/toolkit, packages/core/src/oidc-utils.ts: a GET with the audience added to a URL
// that already has a query, a bearer token, and an answer {"value": TOKEN}.
package token

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// The variables that a runner sets for a job that may ask for tokens.
const (
	EnvURL   = "ACTIONS_ID_TOKEN_REQUEST_URL"
	EnvToken = "ACTIONS_ID_TOKEN_REQUEST_TOKEN"
)

const (
	tryTimeout = 10 * time.Second       // for one request
	firstDelay = 250 * time.Millisecond // before the second try; doubles
	lastDelay  = 10 * time.Second       // between tries, at most, unless the server asks for more
	mostAsked  = time.Minute            // that a server's Retry-After may ask for
	maxAnswer  = wire.MaxToken + 4096   // bytes of the JSON around a token
)

// Source asks for tokens. It is safe for concurrent use.
type Source struct {
	url    string
	bearer wire.Secret
	client *http.Client
}

// FromEnv reads ACTIONS_ID_TOKEN_REQUEST_URL and ACTIONS_ID_TOKEN_REQUEST_TOKEN through getenv. Without them the error, code
// token-unavailable, says what to write into the workflow, and under sudo first how to keep them. Connections are those of client's transport; redirects are not
// followed, so that the bearer token goes nowhere else. A nil client is http.DefaultClient.
func FromEnv(getenv func(string) string, client *http.Client) (*Source, error) {
	address, bearer := getenv(EnvURL), getenv(EnvToken)
	if address == "" || bearer == "" {
		next := workflowLines
		if getenv("SUDO_UID") != "" {
			next = "run it with sudo -E, because plain sudo drops the two variables; if they are not set without sudo either, " + workflowLines
		}
		return nil, problem.New(problem.TokenUnavailable, unavailable(getenv), next)
	}
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return nil, problem.New(problem.TokenUnavailable, EnvURL+" is not an http URL", "leave the variable as the runner sets it")
	}
	if client == nil {
		client = http.DefaultClient
	}
	own := *client
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &Source{url: address, bearer: wire.Secret(bearer), client: &own}, nil
}

// Proxy is what stands between this host and GitHub's token service, nil for nothing. Its credentials are left out.
func (s *Source) Proxy() *url.URL {
	t, ok := s.client.Transport.(interface{ ProxyFor(*url.URL) *url.URL })
	u, err := url.Parse(s.url)
	if !ok || err != nil {
		return nil
	}
	return t.ProxyFor(u)
}

// workflowLines is the next step for a job without the permission. `contents: read` stands there because a job's
// permissions block takes away whatever it does not list, and with it what actions/checkout needs.
const workflowLines = "add these lines to the job in the workflow file (a job's own permissions block replaces the workflow's): " +
	"`permissions:` with `id-token: write` and `contents: read` below it; pull requests from forks never get a token"

func unavailable(getenv func(string) string) string {
	if getenv("GITHUB_ACTIONS") != "true" {
		return "this is not a job on GitHub Actions that may ask for an OIDC token: " + EnvURL + " and " + EnvToken + " are not set"
	}
	return "this job may not ask GitHub for an OIDC token: it lacks the permission `id-token: write`"
}

// Token asks for a token with this audience, retrying transient failures with backoff until ctx ends. Its errors are
// *problem.Error: token-refused when GitHub says no, timeout or cancelled when ctx ends first.
func (s *Source) Token(ctx context.Context, audience string) (wire.Secret, error) {
	for delay := firstDelay; ; delay = min(2*delay, lastDelay) {
		token, err := s.try(ctx, audience)
		if err == nil {
			return token, nil
		}
		again, ok := errors.AsType[*transient](err)
		if !ok {
			return "", err
		}
		wait := max(delay/2+rand.N(delay/2+1), again.after)
		if !pause(ctx, wait) {
			return "", ended(ctx, again)
		}
	}
}

// transient is a failure after which another try may succeed.
type transient struct {
	err   error
	after time.Duration // not earlier than this, as the server asks
}

// Error gives the failure.
func (t *transient) Error() string { return t.err.Error() }

// Unwrap gives the failure.
func (t *transient) Unwrap() error { return t.err }

// pause waits, and reports whether it did so to the end.
func pause(ctx context.Context, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// ended says what the last failure was when there is no more time.
func ended(ctx context.Context, last error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return problem.Wrap(last, problem.Cancelled, "asking GitHub for a token was given up", "run the command again")
	}
	return problem.Wrap(last, problem.Timeout, fmt.Sprintf("GitHub gave no token in time: %v", last),
		"run the job again; if it lasts, look at https://www.githubstatus.com and let the runner reach GitHub over https")
}

// try asks once.
func (s *Source) try(ctx context.Context, audience string) (wire.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, withAudience(s.url, audience), nil)
	if err != nil {
		return "", problem.New(problem.TokenUnavailable, EnvURL+" is not an http URL", "leave the variable as the runner sets it")
	}
	req.Header.Set("Authorization", "Bearer "+s.bearer.Reveal())
	req.Header.Set("Accept", "application/json; api-version=2.0")
	req.Header.Set("User-Agent", "culvert")
	resp, err := s.client.Do(req)
	if err != nil {
		return "", unanswered(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", refused(resp, audience)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return "", unanswered(err)
	}
	return parse(data)
}

// withAudience adds the audience to a URL that has a query already.
func withAudience(address, audience string) string {
	address, _, _ = strings.Cut(address, "#")
	separator := "&"
	if !strings.Contains(address, "?") {
		separator = "?"
	}
	return address + separator + "audience=" + url.QueryEscape(audience)
}

func parse(data []byte) (wire.Secret, error) {
	var answer struct {
		Value string `json:"value"`
	}
	if len(data) > maxAnswer || json.Unmarshal(data, &answer) != nil || answer.Value == "" || len(answer.Value) > wire.MaxToken {
		return "", problem.New(problem.TokenRefused, "what answered at "+EnvURL+" gave no token",
			"leave the variable as the runner sets it, and let no proxy answer in GitHub's place")
	}
	return wire.Secret(answer.Value), nil
}

// unanswered classes a failure of the connection. The URL is left out: it names the runner's internal job.
func unanswered(err error) error {
	if p, ok := errors.AsType[*problem.Error](err); ok && !p.Code.Temporary() {
		return p // a proxy's word
	}
	if wrapped, ok := errors.AsType[*url.Error](err); ok {
		err = wrapped.Err
	}
	// A certificate that is refused now is refused again: trying on would only hide it.
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return problem.Wrap(err, problem.TokenRefused, fmt.Sprintf("the certificate of GitHub's token endpoint is not trusted: %v", err),
			"give the runner the certificate of the proxy that stands in between")
	}
	return &transient{err: err}
}

// refused classes an answer other than 200.
func refused(resp *http.Response, audience string) error {
	err := fmt.Errorf("it answered %s", resp.Status)
	switch code := resp.StatusCode; {
	case code >= 500 || code == http.StatusTooManyRequests || code == http.StatusRequestTimeout:
		return &transient{err: err, after: retryAfter(resp)}
	case code == http.StatusForbidden && strings.Contains(strings.ToLower(audience), "github.com"):
		return problem.Wrap(err, problem.TokenRefused,
			fmt.Sprintf("GitHub refused a token for the audience %q: it gives none whose audience contains github.com", audience),
			"give the coordinator a url without github.com in it")
	case code == http.StatusForbidden || code == http.StatusUnauthorized:
		return problem.Wrap(err, problem.TokenRefused, fmt.Sprintf("GitHub refused a token: it answered %s", resp.Status),
			"ask from within the running job that the variables belong to, with `id-token: write` among its permissions")
	}
	return problem.Wrap(err, problem.TokenRefused, fmt.Sprintf("what answered at %s refused a token: %s", EnvURL, resp.Status),
		"leave the variable as the runner sets it, and let no proxy answer in GitHub's place")
}

// retryAfter reads a Retry-After in seconds (RFC 9110, section 10.2.3).
func retryAfter(resp *http.Response) time.Duration {
	seconds, err := strconv.ParseUint(resp.Header.Get("Retry-After"), 10, 16)
	if err != nil {
		return 0
	}
	return min(time.Duration(seconds)*time.Second, mostAsked)
}
