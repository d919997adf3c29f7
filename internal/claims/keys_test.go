package claims_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/claims/claimstest"
	"github.com/culvertnet/culvert/internal/problem"
)

func write(t *testing.T, file string, v any) {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	replace(t, file, data)
}

// replace changes a file as careful programs do, by renaming another over it.
func replace(t *testing.T, file string, data []byte) {
	t.Helper()
	if err := os.WriteFile(file+".new", data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
}

func fromFile(t *testing.T, issuer *claimstest.Issuer, file string) (*claims.Verifier, error) {
	t.Helper()
	v, err := claims.New(claims.Options{Issuers: []claims.Issuer{{URL: issuer.URL(), JWKSFile: file}}})
	if err == nil {
		t.Cleanup(func() { _ = v.Close() })
	}
	return v, err
}

func TestKeyFile(t *testing.T) {
	issuer := newIssuer(t, "https://kubernetes.default.svc.cluster.local")
	file := filepath.Join(t.TempDir(), "jwks.json")
	write(t, file, issuer.KeySet())
	v, err := fromFile(t, issuer, file)
	if err != nil {
		t.Fatal(err)
	}
	verify := func() error {
		t.Helper()
		_, err := v.Verify(t.Context(), issuer.ServiceAccount("gw", "a", "b"), "gw")
		return err
	}
	if err := verify(); err != nil {
		t.Fatal(err)
	}
	if err := issuer.Rotate(); err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, verify(), problem.TokenUnknownKey, "")
	write(t, file, issuer.KeySet())
	if err := verify(); err != nil {
		t.Fatalf("the changed file was not read: %v", err)
	}
	replace(t, file, []byte("{broken"))
	if err := verify(); err != nil {
		t.Fatalf("a broken file took the old keys away: %v", err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := verify(); err != nil {
		t.Fatalf("a missing file took the old keys away: %v", err)
	}
	if err := issuer.Rotate(); err != nil {
		t.Fatal(err)
	}
	issuer.Withdraw()
	write(t, file, issuer.KeySet())
	if err := verify(); err != nil {
		t.Fatalf("the file that came back was not read: %v", err)
	}
}

// TestKeyFileWithinOneTick writes in place, with size and time stamp unchanged, as two writes in one tick would be.
func TestKeyFileWithinOneTick(t *testing.T) {
	one, other := newIssuer(t, issuerURL), newIssuer(t, issuerURL)
	file := filepath.Join(t.TempDir(), "jwks.json")
	write(t, file, one.KeySet())
	stamp := time.Now()
	if err := os.Chtimes(file, stamp, stamp); err != nil {
		t.Fatal(err)
	}
	v, err := fromFile(t, one, file)
	if err != nil {
		t.Fatal(err)
	}
	data, _ := json.Marshal(other.KeySet())
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(file, stamp, stamp); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), other.Sign(audience, nil), audience); err != nil {
		t.Error(err)
	}
}

func TestKeySetsRefused(t *testing.T) {
	issuer := newIssuer(t, issuerURL)
	short, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := issuer.KeySet().Keys[0]
	encryption, other := good, good
	encryption.Use = "enc"
	other.Algorithm = "RS512"
	set := func(keys ...any) string {
		data, err := json.Marshal(map[string]any{"keys": keys})
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	file := filepath.Join(t.TempDir(), "jwks.json")
	for name, content := range map[string]string{
		"empty file":     "",
		"no set":         "[]",
		"empty set":      `{"keys":[]}`,
		"short RSA key":  set(jose.JSONWebKey{Key: short.Public(), KeyID: "a"}),
		"elliptic curve": set(jose.JSONWebKey{Key: curve.Public(), KeyID: "a"}),
		"symmetric":      set(map[string]string{"kty": "oct", "k": "c2VjcmV0", "kid": "a"}),
		"encryption":     set(encryption),
		"other RSA":      set(other),
		"too many":       `{"keys":[` + strings.TrimSuffix(strings.Repeat("{},", 300), ",") + `]}`,
		"too long":       `{"keys":[],"x":"` + strings.Repeat("x", 2<<20) + `"}`,
	} {
		replace(t, file, []byte(content))
		if _, err := fromFile(t, issuer, file); problem.CodeOf(err) != problem.BadConfig {
			t.Errorf("%s: got %v", name, err)
		}
	}
	replace(t, file, []byte(set(map[string]string{"kty": "OKP", "crv": "Ed448", "x": "AA"}, 7, encryption, good)))
	v, err := fromFile(t, issuer, file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), issuer.Sign(audience, nil), audience); err != nil {
		t.Errorf("a good key among others: %v", err)
	}
}

// TestNoKeyID covers issuers that give no kid, which is fine with one key (OpenID Connect Core 1.0, section 10.1).
func TestNoKeyID(t *testing.T) {
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: private}, nil)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().Unix()
	jws, err := signer.Sign(fmt.Appendf(nil, `{"iss":%q,"sub":"s","aud":"a","iat":%d,"exp":%d}`, issuerURL, now, now+60))
	if err != nil {
		t.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	issuer := newIssuer(t, issuerURL)
	file := filepath.Join(t.TempDir(), "jwks.json")
	own := jose.JSONWebKey{Key: private.Public()}
	write(t, file, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{own}})
	v, err := fromFile(t, issuer, file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), token, "a"); err != nil {
		t.Fatal(err)
	}
	write(t, file, jose.JSONWebKeySet{Keys: append(issuer.KeySet().Keys, own)})
	_, err = v.Verify(t.Context(), token, "a")
	wantRefusal(t, err, problem.TokenInvalid, token)
}

// TestSharedKeyID covers issuers that give several keys one id: any of them may have signed.
func TestSharedKeyID(t *testing.T) {
	one, other := newIssuer(t, issuerURL), newIssuer(t, issuerURL)
	set := jose.JSONWebKeySet{Keys: append(one.KeySet().Keys, other.KeySet().Keys...)}
	set.Keys[0].KeyID = set.Keys[1].KeyID
	file := filepath.Join(t.TempDir(), "jwks.json")
	write(t, file, set)
	v, err := fromFile(t, one, file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), other.Sign(audience, nil), audience); err != nil {
		t.Error(err)
	}
	forged := other.Forge(claimstest.OtherKey, audience, nil)
	_, err = v.Verify(t.Context(), forged, audience)
	wantRefusal(t, err, problem.TokenInvalid, forged)
}
