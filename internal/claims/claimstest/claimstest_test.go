package claimstest_test

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/claims/claimstest"
)

const base = "https://token.actions.githubusercontent.com/octo-enterprise"

func newIssuer(t *testing.T) *claimstest.Issuer {
	t.Helper()
	issuer, err := claimstest.New(base)
	if err != nil {
		t.Fatal(err)
	}
	return issuer
}

func get(t *testing.T, issuer *claimstest.Issuer, method, url, authorization string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequest(method, url, nil)
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	w := httptest.NewRecorder()
	issuer.ServeHTTP(w, r)
	return w
}

// payload reads a token's claims without verifying it.
func payload(t *testing.T, token string) map[string]any {
	t.Helper()
	data, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	var claims map[string]any
	if err := json.Unmarshal(data, &claims); err != nil {
		t.Fatal(err)
	}
	return claims
}

func TestRequest(t *testing.T) {
	issuer := newIssuer(t)
	job := issuer.AddJob(map[string]any{"repository": "acme/shop"})
	if !strings.Contains(job.RequestURL, "?") || job.Getenv("ACTIONS_ID_TOKEN_REQUEST_URL") != job.RequestURL || job.Getenv("HOME") != "" {
		t.Errorf("environment: %+v", job)
	}
	bearer := "Bearer " + job.RequestToken
	for name, c := range map[string]struct {
		method, url, authorization string
		status                     int
	}{
		"good":              {"GET", job.RequestURL + "&audience=https%3A%2F%2Fculvert.example", bearer, 200},
		"no audience":       {"GET", job.RequestURL, bearer, 200},
		"own audience":      {"GET", job.RequestURL + "&audience=https://github.com/acme", bearer, 200},
		"another's":         {"GET", job.RequestURL + "&audience=https://github.com/octo-org", bearer, 403},
		"no bearer":         {"GET", job.RequestURL, "", 401},
		"wrong bearer":      {"GET", job.RequestURL, bearer + "x", 401},
		"query lost":        {"GET", strings.Split(job.RequestURL, "?")[0] + "?audience=x", bearer, 400},
		"unknown job":       {"GET", base + "/request/x/idtoken?api-version=2.0", bearer, 404},
		"unknown job, bare": {"GET", base + "/request/x/idtoken?api-version=2.0", "Bearer ", 404},
		"posted":            {"POST", job.RequestURL, bearer, 405},
		"elsewhere":         {"GET", base + "/", "", 404},
	} {
		if w := get(t, issuer, c.method, c.url, c.authorization); w.Code != c.status {
			t.Errorf("%s: status %d, want %d", name, w.Code, c.status)
		}
	}
	var answer struct{ Value string }
	w := get(t, issuer, "GET", job.RequestURL+"&audience=https%3A%2F%2Fculvert.example%2Fwg%2FA", bearer)
	if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
		t.Fatal(err)
	}
	if got := payload(t, answer.Value); got["aud"] != "https://culvert.example/wg/A" || got["iss"] != base || got["repository_owner"] != "acme" {
		t.Errorf("claims: %v", got)
	}
}

func TestAwayAndFetches(t *testing.T) {
	issuer := newIssuer(t)
	paths := []string{"/.well-known/openid-configuration", "/.well-known/jwks"}
	for _, away := range []bool{false, true, false} {
		issuer.SetAway(away)
		want := http.StatusOK
		if away {
			want = http.StatusServiceUnavailable
		}
		for _, path := range paths {
			if w := get(t, issuer, "GET", base+path, ""); w.Code != want {
				t.Errorf("away %v, %s: %d", away, path, w.Code)
			}
		}
	}
	if n := issuer.Fetches(); n != 3 {
		t.Errorf("%d fetches, want 3", n)
	}
}

func TestKeysRotate(t *testing.T) {
	issuer := newIssuer(t)
	first := issuer.KeySet().Keys[0].KeyID
	if err := issuer.Rotate(); err != nil {
		t.Fatal(err)
	}
	if set := issuer.KeySet().Keys; len(set) != 2 || set[0].KeyID != first || !set[1].IsPublic() {
		t.Errorf("after the rotation: %d keys", len(set))
	}
	issuer.Withdraw()
	if set := issuer.KeySet().Keys; len(set) != 1 || set[0].KeyID == first {
		t.Errorf("after the withdrawal: %v", set)
	}
}

func TestSign(t *testing.T) {
	issuer := newIssuer(t)
	now := time.Unix(1_800_000_000, 0)
	issuer.SetNow(func() time.Time { return now })
	got := payload(t, issuer.Sign("a", nil))
	if got["iat"] != 1.8e9 || got["exp"] != 1.8e9+300 || got["nbf"] != 1.8e9-600 {
		t.Errorf("times: %v %v %v", got["nbf"], got["iat"], got["exp"])
	}
	if got["sub"] != "repo:octo-org@65/octo-repo@74:ref:refs/heads/main" {
		t.Errorf("sub: %v", got["sub"])
	}
	for name, c := range map[string]struct {
		claims map[string]any
		claim  string
		want   any
	}{
		"deleted":      {map[string]any{"actor": nil}, "actor", nil},
		"no subject":   {map[string]any{"sub": nil}, "sub", nil},
		"own subject":  {map[string]any{"sub": "x"}, "sub", "x"},
		"pull request": {map[string]any{"event_name": "pull_request"}, "sub", "repo:octo-org@65/octo-repo@74:pull_request"},
		"environment":  {map[string]any{"environment": "a:b"}, "sub", "repo:octo-org@65/octo-repo@74:environment:a%3Ab"},
		"owner":        {map[string]any{"repository": "acme/shop"}, "repository_owner", "acme"},
		"given owner":  {map[string]any{"repository": "acme/shop", "repository_owner": "x"}, "repository_owner", "x"},
	} {
		if got := payload(t, issuer.Sign("a", c.claims))[c.claim]; got != c.want {
			t.Errorf("%s: %s = %v, want %v", name, c.claim, got, c.want)
		}
	}
}
