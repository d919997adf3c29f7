package claims_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/problem"
)

// bubble runs test with fake time.
func bubble(t *testing.T, test func(t *testing.T, issuer *claimstest.Issuer)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, newIssuer(t, issuerURL)) })
}

func TestUnknownKeysFetchOnceAMinute(t *testing.T) {
	bubble(t, func(t *testing.T, issuer *claimstest.Issuer) {
		v := newVerifier(t, issuer, nil)
		if _, err := v.Verify(t.Context(), issuer.Sign(audience, nil), audience); err != nil {
			t.Fatal(err)
		}
		forged := issuer.Forge(claimstest.UnknownKey, audience, map[string]any{"exp": time.Now().Add(24 * time.Hour).Unix()})
		begin := time.Now()
		for range 600 {
			_, err := v.Verify(t.Context(), forged, audience)
			wantRefusal(t, err, problem.TokenUnknownKey, forged)
			time.Sleep(time.Second)
		}
		minutes := int(time.Since(begin) / time.Minute)
		if n := issuer.Fetches(); n > 1+minutes || n < minutes {
			t.Errorf("%d fetches in %d minutes", n, minutes)
		}
	})
}

func TestOneFetchForManyTokens(t *testing.T) {
	bubble(t, func(t *testing.T, issuer *claimstest.Issuer) {
		slow := slowly{issuer, 3 * time.Second}
		v := newVerifier(t, issuer, func(o *claims.Options) {
			o.HTTPClient.Transport = inMemory{"token.actions.githubusercontent.com": slow}
		})
		var wg sync.WaitGroup
		for range 200 {
			token := issuer.Sign(audience, nil)
			wg.Go(func() {
				if _, err := v.Verify(t.Context(), token, audience); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := issuer.Fetches(); n != 1 {
			t.Errorf("%d fetches, want 1", n)
		}
	})
}

// slowly delays every answer.
type slowly struct {
	http.Handler
	delay time.Duration
}

func (s slowly) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	time.Sleep(s.delay)
	s.Handler.ServeHTTP(w, r)
}

func TestKnownKeyNeverWaits(t *testing.T) {
	bubble(t, func(t *testing.T, issuer *claimstest.Issuer) {
		gate := &slowly{issuer, 0}
		v := newVerifier(t, issuer, func(o *claims.Options) {
			o.HTTPClient.Transport = inMemory{"token.actions.githubusercontent.com": gate}
		})
		if err := v.Prefetch(t.Context()); err != nil {
			t.Fatal(err)
		}
		gate.delay = 4 * time.Second
		time.Sleep(time.Minute)
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := v.Verify(t.Context(), issuer.Forge(claimstest.UnknownKey, audience, nil), audience)
			wantRefusal(t, err, problem.TokenUnknownKey, "")
		})
		synctest.Wait() // the fetch is under way
		begin := time.Now()
		if _, err := v.Verify(t.Context(), issuer.Sign(audience, nil), audience); err != nil || time.Since(begin) != 0 {
			t.Errorf("waited %v: %v", time.Since(begin), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := v.Verify(ctx, issuer.Forge(claimstest.UnknownKey, audience, nil), audience)
		wantRefusal(t, err, problem.Timeout, "")
		wg.Wait()
	})
}

func TestRotation(t *testing.T) {
	bubble(t, func(t *testing.T, issuer *claimstest.Issuer) {
		v := newVerifier(t, issuer, nil)
		long := map[string]any{"exp": time.Now().Add(time.Hour).Unix()}
		old := issuer.Sign(audience, long)
		if _, err := v.Verify(t.Context(), old, audience); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		if err := issuer.Rotate(); err != nil {
			t.Fatal(err)
		}
		for _, token := range []string{issuer.Sign(audience, nil), old} {
			if _, err := v.Verify(t.Context(), token, audience); err != nil {
				t.Errorf("after the rotation: %v", err)
			}
		}
		issuer.Withdraw()
		time.Sleep(12 * time.Minute) // no traffic: the background alone notices
		_, err := v.Verify(t.Context(), old, audience)
		wantRefusal(t, err, problem.TokenUnknownKey, old)
	})
}

func TestIssuerAway(t *testing.T) {
	bubble(t, func(t *testing.T, issuer *claimstest.Issuer) {
		v := newVerifier(t, issuer, nil)
		if err := v.Prefetch(t.Context()); err != nil {
			t.Fatal(err)
		}
		issuer.SetAway(true)
		begin, before := time.Now(), issuer.Fetches()
		for range 48 {
			time.Sleep(time.Hour)
			if _, err := v.Verify(t.Context(), issuer.Sign(audience, nil), audience); err != nil {
				t.Fatalf("stale keys are not served: %v", err)
			}
		}
		if n := issuer.Fetches() - before; n > int(time.Since(begin)/time.Minute) {
			t.Errorf("%d tries in %v", n, time.Since(begin))
		}
		if err := issuer.Rotate(); err != nil {
			t.Fatal(err)
		}
		_, err := v.Verify(t.Context(), issuer.Sign(audience, nil), audience)
		wantRefusal(t, err, problem.IssuerAway, "")
		issuer.SetAway(false)
		time.Sleep(70 * time.Second)
		if _, err := v.Verify(t.Context(), issuer.Sign(audience, nil), audience); err != nil {
			t.Errorf("the issuer is back: %v", err)
		}
	})
}

func TestIssuerAwayFromTheStart(t *testing.T) {
	bubble(t, func(t *testing.T, issuer *claimstest.Issuer) {
		issuer.SetAway(true)
		v := newVerifier(t, issuer, nil)
		if err := v.Prefetch(t.Context()); problem.CodeOf(err) != problem.IssuerAway {
			t.Fatalf("got %v", err)
		}
		for range 300 { // two a second, for all of which there is one fetch
			_, err := v.Verify(t.Context(), issuer.Sign(audience, nil), audience)
			wantRefusal(t, err, problem.IssuerAway, "")
			time.Sleep(500 * time.Millisecond)
		}
		issuer.SetAway(false)
		time.Sleep(66 * time.Second)
		if _, err := v.Verify(t.Context(), issuer.Sign(audience, nil), audience); err != nil {
			t.Error(err)
		}
	})
}

func TestDiscoveryRefused(t *testing.T) {
	document := func(issuer, keys string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			_ = json.NewEncoder(w).Encode(map[string]string{"issuer": issuer, "jwks_uri": keys})
		}
	}
	const keys = issuerURL + "/.well-known/jwks"
	for name, discovery := range map[string]http.HandlerFunc{
		"another issuer":    document("https://evil.example", keys),
		"slash added":       document(issuerURL+"/", keys),
		"keys over http":    document(issuerURL, "http://token.actions.githubusercontent.com/.well-known/jwks"),
		"keys on loopback":  document(issuerURL, "http://127.0.0.1/jwks"),
		"keys in a file":    document(issuerURL, "file:///etc/jwks"),
		"no keys":           document(issuerURL, ""),
		"not JSON":          func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
		"too long":          func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, strings.Repeat(" ", 300<<10)) },
		"error":             func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) },
		"redirect to other": redirect("https://evil.example/.well-known/openid-configuration"),
		"redirect to http":  redirect("http://token.actions.githubusercontent.com/x"),
		"redirect in a loop": redirect(
			issuerURL + "/.well-known/openid-configuration"),
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, issuer *claimstest.Issuer) {
				mux := http.NewServeMux()
				mux.Handle("/", issuer)
				mux.HandleFunc("/.well-known/openid-configuration", discovery)
				v := newVerifier(t, issuer, func(o *claims.Options) {
					o.HTTPClient.Transport = inMemory{
						"token.actions.githubusercontent.com": mux, "127.0.0.1": issuer,
						"evil.example": document(issuerURL, keys),
					}
				})
				_, err := v.Verify(t.Context(), issuer.Sign(audience, nil), audience)
				wantRefusal(t, err, problem.IssuerAway, "")
				if n := issuer.Fetches(); n != 0 {
					t.Errorf("the keys were fetched all the same")
				}
			})
		})
	}
}

func redirect(to string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, http.StatusFound) }
}

func TestRedirectOnTheSameHost(t *testing.T) {
	bubble(t, func(t *testing.T, issuer *claimstest.Issuer) {
		mux := http.NewServeMux()
		mux.Handle("/moved/", http.StripPrefix("/moved", issuer))
		mux.Handle("/.well-known/jwks", issuer)
		mux.HandleFunc("/.well-known/openid-configuration", redirect("/moved/.well-known/openid-configuration"))
		v := newVerifier(t, issuer, func(o *claims.Options) {
			o.HTTPClient.Transport = inMemory{"token.actions.githubusercontent.com": mux}
		})
		if _, err := v.Verify(t.Context(), issuer.Sign(audience, nil), audience); err != nil {
			t.Error(err)
		}
	})
}

func TestCloseEndsAFetch(t *testing.T) {
	bubble(t, func(t *testing.T, issuer *claimstest.Issuer) {
		v := newVerifier(t, issuer, func(o *claims.Options) { o.HTTPClient.Transport = hang{} })
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := v.Verify(t.Context(), issuer.Sign(audience, nil), audience)
			wantRefusal(t, err, problem.IssuerAway, "")
		})
		synctest.Wait()
		begin := time.Now()
		if err := v.Close(); err != nil || time.Since(begin) != 0 {
			t.Errorf("closing took %v: %v", time.Since(begin), err)
		}
		wg.Wait()
		_, err := v.Verify(t.Context(), issuer.Sign(audience, nil), audience)
		wantRefusal(t, err, problem.IssuerAway, "")
	})
}

// hang is a server that never answers.
type hang struct{}

func (hang) RoundTrip(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}

func TestHangingIssuerIsGivenUp(t *testing.T) {
	bubble(t, func(t *testing.T, issuer *claimstest.Issuer) {
		v := newVerifier(t, issuer, func(o *claims.Options) { o.HTTPClient.Transport = hang{} })
		begin := time.Now()
		_, err := v.Verify(t.Context(), issuer.Sign(audience, nil), audience)
		wantRefusal(t, err, problem.IssuerAway, "")
		if waited := time.Since(begin); waited > 10*time.Second {
			t.Errorf("waited %v", waited)
		}
	})
}
