package claims_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	issuerURL = "https://token.actions.githubusercontent.com"
	audience  = "https://culvert.example.com/wg/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE"
)

// inMemory is a transport that calls the handler of the asked host, so that no test leaves the process.
type inMemory map[string]http.Handler

func (m inMemory) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	handler, ok := m[r.URL.Host]
	if !ok {
		return nil, fmt.Errorf("no route to %s", r.URL.Host)
	}
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, r)
	resp := w.Result()
	resp.Request = r
	return resp, nil
}

func newIssuer(t *testing.T, url string) *claimstest.Issuer {
	t.Helper()
	issuer, err := claimstest.New(url)
	if err != nil {
		t.Fatal(err)
	}
	return issuer
}

// newVerifier makes a verifier that trusts issuer and reaches it in memory.
func newVerifier(t *testing.T, issuer *claimstest.Issuer, change func(*claims.Options)) *claims.Verifier {
	t.Helper()
	opts := claims.Options{
		Issuers:    []claims.Issuer{{URL: issuer.URL()}},
		HTTPClient: &http.Client{Transport: inMemory{"token.actions.githubusercontent.com": issuer, "oidc.example.com": issuer}},
	}
	if change != nil {
		change(&opts)
	}
	v, err := claims.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = v.Close() })
	return v
}

// wantRefusal checks that err is a problem with this code, in the house's style and without the token.
func wantRefusal(t *testing.T, err error, code problem.Code, token string) {
	t.Helper()
	p, ok := errors.AsType[*problem.Error](err)
	if !ok {
		t.Fatalf("got %v, want a problem %s", err, code)
	}
	if p.Code != code {
		t.Fatalf("got %v (cause %v), want %s", p, p.Err, code)
	}
	if p.Next == "" || strings.HasSuffix(p.Message, ".") || strings.HasSuffix(p.Next, ".") {
		t.Errorf("not a message for a person: %q, %q", p.Message, p.Next)
	}
	if len(token) > 20 && strings.Contains(p.Error(), token[len(token)-20:]) {
		t.Errorf("the message shows the token: %v", p)
	}
}

func TestVerifyGitHub(t *testing.T) {
	issuer := newIssuer(t, issuerURL)
	v := newVerifier(t, issuer, nil)
	c, err := v.Verify(t.Context(), issuer.Sign(audience, map[string]any{
		"repository": "acme/shop", "repository_id": "1296269", "repository_owner_id": 9919, "environment": "production: eu",
		"repo_property_tier": "gold", "made_up": map[string]any{"a": []any{1, "x y"}},
	}), audience)
	if err != nil {
		t.Fatal(err)
	}
	for name, pair := range map[string][2]string{
		"iss":              {c.Issuer, issuerURL},
		"sub":              {c.Subject, "repo:acme@9919/shop@1296269:environment:production%3A eu"},
		"repository":       {c.Repository, "acme/shop"},
		"repository_id":    {c.RepositoryID, "1296269"},
		"owner":            {c.RepositoryOwner, "acme"},
		"owner id, number": {c.RepositoryOwnerID, "9919"},
		"environment":      {c.Environment, "production: eu"},
		"ref":              {c.Ref, "refs/heads/main"},
		"workflow_ref":     {c.WorkflowRef, "acme/shop/.github/workflows/example-workflow.yml@refs/heads/main"},
		"run_attempt":      {c.RunAttempt, "2"},
		"runner":           {c.RunnerEnvironment, "github-hosted"},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s: got %q, want %q", name, pair[0], pair[1])
		}
	}
	if c.Expiry.Sub(c.IssuedAt) != claimstest.Lifetime || c.IssuedAt.Sub(c.NotBefore) != claimstest.Backdate {
		t.Errorf("times: nbf %v, iat %v, exp %v", c.NotBefore, c.IssuedAt, c.Expiry)
	}
	for name, want := range map[string]string{
		"repo_property_tier": "gold", "repository_owner_id": "9919", "made_up": `{"a":[1,"x y"]}`, "base_ref": "", "aud": audience,
	} {
		if got, ok := c.Get(name); !ok || got != want {
			t.Errorf("Get(%q) = %q, %v, want %q", name, got, ok, want)
		}
	}
	if got, ok := c.Get("absent"); ok {
		t.Errorf("Get(absent) = %q, true", got)
	}
}

func TestVerifySubjectsOfBothFormats(t *testing.T) {
	issuer := newIssuer(t, issuerURL)
	v := newVerifier(t, issuer, nil)
	for _, sub := range []string{
		"repo:octo-org/octo-repo:ref:refs/heads/main",
		"repo:octo-org@65/octo-repo@74:ref:refs/heads/main",
		"repository_owner:octo-org:job_workflow_ref:x/y/.github/workflows/z.yml@refs/heads/main", // re-templated
	} {
		c, err := v.Verify(t.Context(), issuer.Sign(audience, map[string]any{"sub": sub}), audience)
		if err != nil || c.Subject != sub {
			t.Errorf("%s: %v", sub, err)
		}
	}
}

func TestVerifyServiceAccount(t *testing.T) {
	issuer := newIssuer(t, "https://oidc.example.com/cluster")
	v := newVerifier(t, issuer, nil)
	const gateway = "https://culvert.example.com"
	token := issuer.ServiceAccount(gateway, "culvert", "gateway")
	c, err := v.Verify(t.Context(), token, gateway)
	if err != nil {
		t.Fatal(err)
	}
	if c.Subject != "system:serviceaccount:culvert:gateway" || c.Repository != "" {
		t.Errorf("got %+v", c)
	}
	if got, ok := c.Get("kubernetes.io"); !ok || !strings.Contains(got, `"namespace":"culvert"`) {
		t.Errorf("kubernetes.io = %q, %v", got, ok)
	}
	_, err = v.Verify(t.Context(), token, audience)
	wantRefusal(t, err, problem.TokenAudience, token)
}

func TestVerifyRefuses(t *testing.T) {
	issuer := newIssuer(t, issuerURL)
	v := newVerifier(t, issuer, nil)
	at := func(d time.Duration) int64 { return time.Now().Add(d).Unix() }
	sign := func(over map[string]any) string { return issuer.Sign(audience, over) }
	good := sign(nil)
	head, rest, _ := strings.Cut(good, ".")
	for name, c := range map[string]struct {
		token string
		code  problem.Code
	}{
		"empty":                   {"", problem.TokenInvalid},
		"not a JWT":               {"hello", problem.TokenInvalid},
		"two parts":               {head + "." + head, problem.TokenInvalid},
		"four parts":              {good + ".x", problem.TokenInvalid},
		"line break":              {head + ".\n" + rest, problem.TokenInvalid},
		"JSON form":               {jsonForm(good), problem.TokenInvalid},
		"oversized":               {strings.Repeat("a", wire.MaxToken+1), problem.TooLarge},
		"oversized but signed":    {sign(map[string]any{"pad": strings.Repeat("a", wire.MaxToken)}), problem.TooLarge},
		"cut off":                 {good[:len(good)-8], problem.TokenInvalid},
		"other payload":           {swapPayload(good, sign(map[string]any{"actor": "eve"})), problem.TokenInvalid},
		"alg none":                {issuer.Forge(claimstest.AlgNone, audience, nil), problem.TokenInvalid},
		"alg HS256 by public key": {issuer.Forge(claimstest.HS256Public, audience, nil), problem.TokenInvalid},
		"no signature":            {issuer.Forge(claimstest.NoSignature, audience, nil), problem.TokenInvalid},
		"another key, known id":   {issuer.Forge(claimstest.OtherKey, audience, nil), problem.TokenInvalid},
		"unknown key id":          {issuer.Forge(claimstest.UnknownKey, audience, nil), problem.TokenUnknownKey},
		"wrong issuer":            {sign(map[string]any{"iss": "https://token.actions.evil.example"}), problem.TokenIssuer},
		"issuer, trailing slash":  {sign(map[string]any{"iss": issuerURL + "/"}), problem.TokenIssuer},
		"issuer, upper case":      {sign(map[string]any{"iss": strings.ToUpper(issuerURL)}), problem.TokenIssuer},
		"issuer below ours":       {sign(map[string]any{"iss": issuerURL + "/octo-enterprise"}), problem.TokenIssuer},
		"issuer missing":          {sign(map[string]any{"iss": nil}), problem.TokenInvalid},
		"wrong audience":          {issuer.Sign("https://culvert.example.com/wg/other", nil), problem.TokenAudience},
		"default audience":        {issuer.Sign("", nil), problem.TokenAudience},
		"audience prefix":         {issuer.Sign(audience+"x", nil), problem.TokenAudience},
		"two audiences":           {sign(map[string]any{"aud": []string{audience, "https://sts.example.com"}}), problem.TokenAudience},
		"audience twice":          {sign(map[string]any{"aud": []string{audience, audience}}), problem.TokenAudience},
		"empty audience list":     {sign(map[string]any{"aud": []string{}}), problem.TokenAudience},
		"audience missing":        {sign(map[string]any{"aud": nil}), problem.TokenAudience},
		"audience a number":       {sign(map[string]any{"aud": 7}), problem.TokenInvalid},
		"expired":                 {sign(map[string]any{"exp": at(-61 * time.Second)}), problem.TokenExpired},
		"exp missing":             {sign(map[string]any{"exp": nil}), problem.TokenInvalid},
		"exp no number":           {sign(map[string]any{"exp": "soon"}), problem.TokenInvalid},
		"exp beyond time":         {sign(map[string]any{"exp": 1e300}), problem.TokenInvalid},
		"exp negative":            {sign(map[string]any{"exp": -1}), problem.TokenInvalid},
		"nbf in the future":       {sign(map[string]any{"nbf": at(70 * time.Second)}), problem.TokenEarly},
		"iat in the future":       {sign(map[string]any{"iat": at(70 * time.Second)}), problem.TokenEarly},
		"iat missing":             {sign(map[string]any{"iat": nil}), problem.TokenInvalid},
		"sub missing":             {sign(map[string]any{"sub": nil}), problem.TokenInvalid},
		"sub a number":            {sign(map[string]any{"sub": 7}), problem.TokenInvalid},
		"not an object":           {issuer.SignPayload([]byte(`["iss"]`)), problem.TokenInvalid},
		"not JSON":                {issuer.SignPayload([]byte(`{"iss":`)), problem.TokenInvalid},
		"two objects":             {issuer.SignPayload([]byte(`{"iss":"` + issuerURL + `"}{}`)), problem.TokenInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := v.Verify(t.Context(), c.token, audience)
			if err == nil {
				t.Fatalf("accepted: %+v", got)
			}
			wantRefusal(t, err, c.code, c.token)
		})
	}
	if _, err := v.Verify(t.Context(), good, ""); problem.CodeOf(err) != problem.TokenAudience {
		t.Errorf("an empty audience was accepted: %v", err)
	}
	if _, err := v.Verify(t.Context(), good, audience); err != nil {
		t.Errorf("the good token is refused: %v", err)
	}
}

// A header with extensions that a reader has to understand is refused (RFC 7515, section 4.1.11), and base64 is taken in one
// spelling only.
func TestVerifyRefusesOddHeaders(t *testing.T) {
	issuer := newIssuer(t, issuerURL)
	v := newVerifier(t, issuer, nil)
	good := issuer.Sign(audience, nil)
	head, rest, _ := strings.Cut(good, ".")
	raw, err := base64.RawURLEncoding.DecodeString(head)
	if err != nil {
		t.Fatal(err)
	}
	for _, odd := range []string{
		string(raw[:len(raw)-1]) + `,"crit":["x"],"x":1}`, string(raw[:len(raw)-1]) + `,"b64":false,"crit":["b64"]}`,
		string(raw[:len(raw)-1]) + `,"alg":"none"}`, string(raw[:len(raw)-1]) + `,"ALG":"none"}`, `[]`, `{}`, `{"alg":7}`, `{"alg":"RS256"`, "",
	} {
		token := base64.RawURLEncoding.EncodeToString([]byte(odd)) + "." + rest
		_, err := v.Verify(t.Context(), token, audience)
		wantRefusal(t, err, problem.TokenInvalid, token)
	}
	for _, part := range []int{0, 1} {
		parts := strings.Split(good, ".")
		last := len(parts[part]) - 1
		if len(parts[part])%4 == 0 {
			continue // no bits to spare
		}
		parts[part] = parts[part][:last] + string(next(parts[part][last]))
		token := strings.Join(parts, ".")
		_, err := v.Verify(t.Context(), token, audience)
		wantRefusal(t, err, problem.TokenInvalid, token)
	}
}

// next is the base64url digit after b, which differs in its last bit where b ends in zeros.
func next(b byte) byte {
	const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	return digits[strings.IndexByte(digits, b)+1]
}

// jsonForm is the token in the flattened JSON form (RFC 7515, section 7.2.2), which nobody here sends.
func jsonForm(token string) string {
	parts := strings.Split(token, ".")
	return fmt.Sprintf(`{"protected":%q,"payload":%q,"signature":%q}`, parts[0], parts[1], parts[2])
}

func swapPayload(token, other string) string {
	a, b := strings.Split(token, "."), strings.Split(other, ".")
	return a[0] + "." + b[1] + "." + a[2]
}

func TestVerifyRefusesDuplicateNames(t *testing.T) {
	issuer := newIssuer(t, issuerURL)
	v := newVerifier(t, issuer, nil)
	_, payload, _ := strings.Cut(issuer.Sign(audience, nil), ".")
	payload, _, _ = strings.Cut(payload, ".")
	object, err := base64.RawURLEncoding.DecodeString(payload)
	if err != nil {
		t.Fatal(err)
	}
	for _, extra := range []string{
		`"repository":"acme/shop"`, `"iss":"` + issuerURL + `"`, `"Iss":"x"`, `"REPOSITORY_ID":"1"`, `"i\u017fs":"x"`, `"\u0065xp":1`,
		`"x":{"a":1,"a":2}`, `"x":[{"a":1,"\u0061":1}]`,
	} {
		token := issuer.SignPayload([]byte(string(object[:len(object)-1]) + "," + extra + "}"))
		_, err := v.Verify(t.Context(), token, audience)
		wantRefusal(t, err, problem.TokenInvalid, token)
	}
	token := issuer.SignPayload([]byte(string(object[:len(object)-1]) + `,"x":{"a":1,"A":2}}`))
	if _, err := v.Verify(t.Context(), token, audience); err != nil {
		t.Errorf("names that differ in case inside a claim are two names: %v", err)
	}
}

func TestVerifyLeeway(t *testing.T) {
	issuer := newIssuer(t, issuerURL)
	base := time.Unix(1_800_000_000, 0)
	issuer.SetNow(func() time.Time { return base })
	now := base
	v := newVerifier(t, issuer, func(o *claims.Options) { o.Now = func() time.Time { return now } })
	token := issuer.Sign(audience, map[string]any{"nbf": nil})
	for _, c := range []struct {
		offset time.Duration
		code   problem.Code
	}{
		{-61 * time.Second, problem.TokenEarly}, {-60 * time.Second, ""}, {0, ""},
		{claimstest.Lifetime, ""}, {claimstest.Lifetime + 59*time.Second, ""}, {claimstest.Lifetime + 60*time.Second, problem.TokenExpired},
	} {
		now = base.Add(c.offset)
		if _, err := v.Verify(t.Context(), token, audience); problem.CodeOf(err) != c.code {
			t.Errorf("at %v: got %v, want %q", c.offset, err, c.code)
		}
	}
}

func TestOptionsRefuse(t *testing.T) {
	for name, issuers := range map[string][]claims.Issuer{
		"empty":         {{}},
		"twice":         {{URL: issuerURL}, {URL: issuerURL}},
		"plain http":    {{URL: "http://issuer.example.com"}},
		"no scheme":     {{URL: "issuer.example.com"}},
		"other scheme":  {{URL: "ftp://issuer.example.com"}},
		"query":         {{URL: "https://issuer.example.com?x=1"}},
		"fragment":      {{URL: "https://issuer.example.com#x"}},
		"user":          {{URL: "https://u:p@issuer.example.com"}},
		"missing file":  {{URL: issuerURL, JWKSFile: "/nonexistent/jwks.json"}},
		"not loopback":  {{URL: "http://localhost.example.com"}},
		"private http6": {{URL: "http://[fd00::1]"}},
	} {
		_, err := claims.New(claims.Options{Issuers: issuers})
		if problem.CodeOf(err) != problem.BadConfig {
			t.Errorf("%s: got %v", name, err)
		}
	}
	for _, url := range []string{"https://a.example", "http://127.0.0.1:8080", "http://[::1]:1", "http://localhost/x", "http://[::ffff:127.0.0.1]"} {
		v, err := claims.New(claims.Options{Issuers: []claims.Issuer{{URL: url}}})
		if err != nil {
			t.Errorf("%s: %v", url, err)
			continue
		}
		_ = v.Close()
	}
	v, err := claims.New(claims.Options{Issuers: []claims.Issuer{{URL: "http://a.example"}}, InsecureHTTP: true})
	if err != nil {
		t.Fatal(err)
	}
	_ = v.Close()
}

// TestOverLoopback runs the whole of it over real connections.
func TestOverLoopback(t *testing.T) {
	issuer := claimstest.Start(t)
	v, err := claims.New(claims.Options{Issuers: []claims.Issuer{{URL: issuer.URL()}}})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if err := v.Prefetch(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), issuer.Sign(audience, nil), audience); err != nil {
		t.Fatal(err)
	}
	if n := issuer.Fetches(); n != 1 {
		t.Errorf("%d fetches, want 1", n)
	}
}

func TestParse(t *testing.T) {
	c, err := claims.Parse([]byte(` { "repository" : "acme/shop", "run_id": 17, "flag": true, "nothing": null, "list": [ 1, "a b" ] } `))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"repository": "acme/shop", "run_id": "17", "flag": "true", "list": `[1,"a b"]`} {
		if got, ok := c.Get(name); !ok || got != want {
			t.Errorf("Get(%q) = %q, %v, want %q", name, got, ok, want)
		}
	}
	if _, ok := c.Get("nothing"); ok || c.RunID != "17" {
		t.Errorf("null is carried, or run_id is %q", c.RunID)
	}
	deep := strings.Repeat("[", 20) + strings.Repeat("]", 20)
	for _, bad := range []string{"", "null", "7", `"x"`, "[]", "{}x", "{", `{"a":}`, `{"a":1,}`, "{\"a\":\"\xff\"}", `{"a":` + deep + `}`} {
		if _, err := claims.Parse([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{`{}`, `{"iss":"x","ISS":"y"}`, `{"exp":1e3,"aud":["a"]}`, `{"a":{"b":[{"c":null}]}}`, "{\"\xff\":1}", `{"aud":null}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := claims.Parse(data)
		if err != nil {
			return
		}
		var plain map[string]any
		if err := json.Unmarshal(data, &plain); err != nil {
			t.Fatalf("read what encoding/json refuses: %v", err)
		}
		for name, v := range plain {
			got, ok := c.Get(name)
			if ok != (v != nil) {
				t.Fatalf("Get(%q) carried: %v, value %v", name, ok, v)
			}
			if s, isString := v.(string); isString && s != got {
				t.Fatalf("Get(%q) = %q, want %q", name, got, s)
			}
		}
	})
}

func FuzzVerify(f *testing.F) {
	issuer, err := claimstest.New(issuerURL)
	if err != nil {
		f.Fatal(err)
	}
	v, err := claims.New(claims.Options{HTTPClient: &http.Client{Transport: inMemory{"token.actions.githubusercontent.com": issuer}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = v.Close() })
	good := issuer.Sign(audience, map[string]any{"exp": 99999999999})
	f.Add(good)
	f.Add(issuer.Forge(claimstest.AlgNone, audience, nil))
	f.Add(issuer.Forge(claimstest.HS256Public, audience, nil))
	f.Add("a.b.c")
	f.Add(jsonForm(good))
	f.Fuzz(func(t *testing.T, token string) {
		_, err := v.Verify(context.Background(), token, audience)
		if err == nil && !sameToken(token, good) {
			t.Fatalf("accepted %q", token)
		}
		if _, ok := errors.AsType[*problem.Error](err); err != nil && !ok {
			t.Fatalf("no problem: %v", err)
		}
	})
}

// sameToken allows for the unused last bits of base64.
func sameToken(a, b string) bool {
	pa, pb := strings.Split(a, "."), strings.Split(b, ".")
	for i := range pa {
		da, _ := base64.RawURLEncoding.DecodeString(pa[i])
		db, _ := base64.RawURLEncoding.DecodeString(pb[i])
		if string(da) != string(db) {
			return false
		}
	}
	return true
}

func BenchmarkVerify(b *testing.B) {
	issuer, err := claimstest.New(issuerURL)
	if err != nil {
		b.Fatal(err)
	}
	v, err := claims.New(claims.Options{HTTPClient: &http.Client{Transport: inMemory{"token.actions.githubusercontent.com": issuer}}})
	if err != nil {
		b.Fatal(err)
	}
	defer v.Close()
	token := issuer.Sign(audience, nil)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.Verify(b.Context(), token, audience); err != nil {
			b.Fatal(err)
		}
	}
}
