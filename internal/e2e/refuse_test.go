//go:build linux

package e2e

import (
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/stage"
	"github.com/culvertnet/culvert/internal/wire"
)

func newKey(t testing.TB) wire.PrivateKey {
	t.Helper()
	key, err := wire.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// Every token that is not exactly right is refused by the running coordinator, with the code that says why.
func TestTokensAreRefused(t *testing.T) {
	s := setup(t, stage.Options{})
	elsewhere, err := claimstest.New("https://198.51.100.77")
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	at := func(d time.Duration) int64 { return now.Add(d).Unix() }
	signed := func(changes map[string]any) func(string) string {
		return func(audience string) string { return s.Issuer.Sign(audience, stage.Claims(changes)) }
	}
	forged := func(how claimstest.Forgery) func(string) string {
		return func(audience string) string { return s.Issuer.Forge(how, audience, stage.Claims(nil)) }
	}
	for _, tc := range []struct {
		name  string
		token func(audience string) string
		want  []problem.Code
	}{
		{"expired", signed(map[string]any{"exp": at(-5 * time.Minute), "iat": at(-10 * time.Minute)}), []problem.Code{problem.TokenExpired}},
		{"future", signed(map[string]any{"nbf": at(5 * time.Minute), "iat": at(5 * time.Minute), "exp": at(10 * time.Minute)}),
			[]problem.Code{problem.TokenEarly}},
		{"wrong issuer", func(a string) string { return elsewhere.Sign(a, stage.Claims(nil)) }, []problem.Code{problem.TokenIssuer}},
		{"wrong audience", func(string) string { return s.Issuer.Sign("https://elsewhere.example.com", stage.Claims(nil)) },
			[]problem.Code{problem.TokenAudience}},
		{"several audiences", func(a string) string {
			return s.Issuer.Sign(a, stage.Claims(map[string]any{"aud": []string{a, "https://elsewhere.example.com"}}))
		}, []problem.Code{problem.TokenAudience}},
		{"alg none", forged(claimstest.AlgNone), []problem.Code{problem.TokenInvalid}},
		{"alg HS256", forged(claimstest.HS256Public), []problem.Code{problem.TokenInvalid}},
		{"another key's signature", forged(claimstest.OtherKey), []problem.Code{problem.TokenInvalid}},
		{"no signature", forged(claimstest.NoSignature), []problem.Code{problem.TokenInvalid}},
		{"unknown key id", forged(claimstest.UnknownKey), []problem.Code{problem.TokenUnknownKey}},
		{"oversized", signed(map[string]any{"padding": strings.Repeat("x", wire.MaxToken)}),
			[]problem.Code{problem.TooLarge, problem.TokenInvalid}},
		{"repository missing", signed(map[string]any{"repository": nil}), []problem.Code{problem.Denied}},
		{"owner missing", signed(map[string]any{"repository_owner_id": nil}), []problem.Code{problem.Denied}},
		{"no exp", signed(map[string]any{"exp": nil}), []problem.Code{problem.TokenInvalid, problem.TokenExpired}},
		{"no token", func(string) string { return "" }, []problem.Code{problem.TokenInvalid, problem.BadRequest}},
		{"pull_request_target", signed(map[string]any{"event_name": "pull_request_target"}), []problem.Code{problem.Denied}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			key := newKey(t).Public()
			_, err := s.Join(timeout(t, 20*time.Second), wire.JoinRequest{
				Network: stage.Network, Key: key, Token: wire.Secret(tc.token(wire.Audience(s.URL, key))),
			})
			if err == nil || !slices.Contains(tc.want, problem.CodeOf(err)) {
				t.Errorf("got %v, want a code of %v", err, tc.want)
			}
		})
	}
}

// A token speaks for the one key in its audience.
func TestTokenWithAnotherKey(t *testing.T) {
	s := setup(t, stage.Options{})
	key, thief := newKey(t).Public(), newKey(t).Public()
	token := wire.Secret(s.Issuer.Sign(wire.Audience(s.URL, key), stage.Claims(nil)))
	join := func(k wire.Key) error {
		_, err := s.Join(timeout(t, 20*time.Second), wire.JoinRequest{Network: stage.Network, Key: k, Token: token})
		return err
	}
	if err := join(thief); problem.CodeOf(err) != problem.TokenAudience {
		t.Errorf("before the job used it: %v, want %s", err, problem.TokenAudience)
	}
	if err := join(key); err != nil {
		t.Fatal(err)
	}
	if err := join(thief); problem.CodeOf(err) != problem.TokenAudience {
		t.Errorf("after the job used it: %v, want %s", err, problem.TokenAudience)
	}
	if err := join(key); problem.CodeOf(err) != problem.KeyInUse {
		t.Errorf("the same key again: %v, want %s", err, problem.KeyInUse)
	}
}

func TestSecretOfSomeoneElse(t *testing.T) {
	s := setup(t, stage.Options{})
	join := func() wire.Session {
		key := newKey(t).Public()
		token := wire.Secret(s.Issuer.Sign(wire.Audience(s.URL, key), stage.Claims(nil)))
		session, err := s.Join(timeout(t, 20*time.Second), wire.JoinRequest{Network: stage.Network, Key: key, Token: token})
		if err != nil {
			t.Fatal(err)
		}
		return session
	}
	mine, theirs := join(), join()
	path := wire.PathSessions + "/" + theirs.ID
	update := wire.Update{Candidates: []wire.Candidate{{Kind: wire.Host, Addr: netip.MustParseAddrPort("192.0.2.1:1")}}}
	for _, secret := range []wire.Secret{mine.Secret, "nonsense", ""} {
		ctx := timeout(t, 10*time.Second)
		if err := s.Call(ctx, http.MethodPatch, path, secret, update, nil); problem.CodeOf(err) != problem.SessionUnknown {
			t.Errorf("PATCH: %v, want %s", err, problem.SessionUnknown)
		}
		if err := s.Call(ctx, http.MethodDelete, path, secret, nil, nil); problem.CodeOf(err) != problem.SessionUnknown {
			t.Errorf("DELETE: %v, want %s", err, problem.SessionUnknown)
		}
	}
	if err := s.Call(timeout(t, 10*time.Second), http.MethodDelete, path, theirs.Secret, nil, nil); err != nil {
		t.Errorf("with its own secret: %v", err)
	}
}

// Unknown key ids make coordinator and gateway fetch the issuer's keys at most once a minute, together twice.
func TestUnknownKeysDoNotHammerTheIssuer(t *testing.T) {
	s := setup(t, stage.Options{})
	before := s.Issuer.Fetches()
	for range 20 {
		key := newKey(t).Public()
		token := s.Issuer.Forge(claimstest.UnknownKey, wire.Audience(s.URL, key), stage.Claims(nil))
		_, err := s.Join(timeout(t, 20*time.Second), wire.JoinRequest{Network: stage.Network, Key: key, Token: wire.Secret(token)})
		if code := problem.CodeOf(err); code != problem.TokenUnknownKey && code != problem.RateLimited {
			t.Fatalf("got %v, want %s", err, problem.TokenUnknownKey)
		}
	}
	if fetched := s.Issuer.Fetches() - before; fetched > 1 {
		t.Errorf("20 unknown key ids made %d fetches, want at most 1", fetched)
	}
}

// A coordinator's file with a rule that pins nobody is refused, by check and by serve, with its place.
func TestUnpinnedRuleIsRefused(t *testing.T) {
	s := scenery(t, stage.Options{Rules: func(*stage.Stage) string {
		return "- name: anybody\n  network: corp\n  match: {ref: refs/heads/main}\n  allow: [\"tcp 10.0.0.0/8:443\"]\n"
	}})
	for _, args := range [][]string{{"check", s.ConfigFile()}, {"serve", "--config", s.ConfigFile()}} {
		out, err := os.Create(filepath.Join(t.TempDir(), "out"))
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		code, err := s.Cloud.Run(timeout(t, 10*time.Second), lab.Program{
			Path: s.Binary("culvert-coordinator"), Args: args, Stdout: out, Stderr: out,
		})
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(out.Name())
		if err != nil {
			t.Fatal(err)
		}
		if code != problem.ExitUsage || !strings.Contains(string(text), "culvert.yaml:") || !strings.Contains(string(text), "anybody") {
			t.Errorf("%v: exit %d, %s", args, code, text)
		}
	}
}
