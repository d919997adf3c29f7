package claimstest

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Lifetime is how long a token lasts, and Backdate how long before iat its nbf lies, both as at GitHub.
const (
	Lifetime = 5 * time.Minute
	Backdate = 10 * time.Minute
)

// Sign makes a token as GitHub would for the audience, with claims over the usual ones (nil deletes one). Claims that
// follow from others do so unless they are given: sub, repository_owner, workflow_ref, job_workflow_ref.
func (i *Issuer) Sign(audience string, claims map[string]any) string {
	return i.SignExactly(i.payload(audience, claims))
}

// SignExactly makes a token with these claims and no others.
func (i *Issuer) SignExactly(claims map[string]any) string {
	payload, err := json.Marshal(claims)
	if err != nil {
		panic(fmt.Sprintf("claims that are no JSON: %v", err))
	}
	return i.SignPayload(payload)
}

// SignPayload makes a token with exactly this payload, whether or not it is JSON.
func (i *Issuer) SignPayload(payload []byte) string {
	i.mu.Lock()
	key := i.keys[len(i.keys)-1]
	i.mu.Unlock()
	return sign(key, payload)
}

func sign(key signingKey, payload []byte) string {
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key.private, KeyID: key.id}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		panic(fmt.Sprintf("make a signer: %v", err))
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		panic(fmt.Sprintf("sign a token: %v", err))
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		panic(fmt.Sprintf("serialise a token: %v", err))
	}
	return token
}

// ServiceAccount makes a token as Kubernetes projects it into a pod (TokenRequest API): no claim of GitHub's, a list of
// one audience, names nested under "kubernetes.io".
func (i *Issuer) ServiceAccount(audience, namespace, name string) string {
	now := i.clock()
	return i.SignExactly(map[string]any{
		"iss": i.url, "aud": []string{audience}, "sub": "system:serviceaccount:" + namespace + ":" + name,
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour + 7*time.Second).Unix(), "jti": rand.Text(),
		"kubernetes.io": map[string]any{
			"namespace":      namespace,
			"node":           map[string]any{"name": "node-1", "uid": "5ab7b5d0-6f8e-4a3c-9d8f-0c7f6f5d1a01"},
			"pod":            map[string]any{"name": name + "-6d5f9c7b8-x2x9z", "uid": "0f4a8c1e-3b2d-4c5e-8f7a-9b0c1d2e3f40"},
			"serviceaccount": map[string]any{"name": name, "uid": "b1946ac9-2492-4d23-b6c4-6f0e2f0d5c11"},
			"warnafter":      now.Add(time.Hour).Unix(),
		},
	})
}

func (i *Issuer) clock() time.Time {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.now()
}

// payload puts together what GitHub would.
func (i *Issuer) payload(audience string, claims map[string]any) map[string]any {
	all := withDefaults(claims)
	if audience == "" {
		audience = ownAudience(claims)
	}
	now := i.clock()
	registered := map[string]any{
		"iss": i.url, "aud": audience, "jti": newID(), "sub": subject(all),
		"iat": now.Unix(), "nbf": now.Add(-Backdate).Unix(), "exp": now.Add(Lifetime).Unix(),
	}
	maps.Copy(registered, all)
	maps.DeleteFunc(registered, func(_ string, v any) bool { return v == nil })
	return registered
}

// withDefaults lays claims over a push to main in the organisation octo-org. A nil stays, so that what is to be deleted
// is known; claims that follow from others follow here.
func withDefaults(claims map[string]any) map[string]any {
	all := map[string]any{
		"repository": "octo-org/octo-repo", "repository_id": "74", "repository_owner_id": "65", "repository_visibility": "private",
		"enterprise": "octo-enterprise", "enterprise_id": "123", "actor": "octocat", "actor_id": "12",
		"event_name": "push", "ref": "refs/heads/main", "ref_type": "branch", "base_ref": "", "head_ref": "",
		"sha": "4b825dc642cb6eb9a060e54bf8d69288fbee4904", "workflow": "example-workflow",
		"run_id": "17834985471", "run_number": "10", "run_attempt": "2", "check_run_id": "50712349876",
		"runner_environment": "github-hosted",
	}
	maps.Copy(all, claims)
	repository, ref := fmt.Sprint(all["repository"]), fmt.Sprint(all["ref"])
	owner, _, _ := strings.Cut(repository, "/")
	workflow := repository + "/.github/workflows/example-workflow.yml@" + ref
	for name, follows := range map[string]any{
		"repository_owner": owner, "workflow_ref": workflow, "job_workflow_ref": workflow,
		"workflow_sha": all["sha"], "job_workflow_sha": all["sha"], "ref_protected": "true",
	} {
		if _, given := all[name]; !given {
			all[name] = follows
		}
	}
	return all
}

// subject is the default sub in the format of repositories created after 15 July 2026.
func subject(all map[string]any) string {
	owner, name, _ := strings.Cut(fmt.Sprint(all["repository"]), "/")
	context := "ref:" + escape(all["ref"])
	if environment, ok := all["environment"].(string); ok && environment != "" {
		context = "environment:" + escape(environment)
	} else if all["event_name"] == "pull_request" {
		context = "pull_request"
	}
	return fmt.Sprintf("repo:%s@%v/%s@%v:%s", owner, all["repository_owner_id"], name, all["repository_id"], context)
}

// escape keeps colons of a value apart from those of the format.
func escape(v any) string { return strings.ReplaceAll(fmt.Sprint(v), ":", "%3A") }

// newID is a random UUID (RFC 9562, version 4).
func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// Forgery is a way to make a token that this issuer did not sign.
type Forgery int

// The forgeries.
const (
	AlgNone     Forgery = iota // "alg": "none" and no signature
	HS256Public                // "alg": "HS256", keyed with the public key's PEM, which a confused verifier would accept
	OtherKey                   // signed with another RSA key under the issuer's key id
	UnknownKey                 // signed with another RSA key under that key's own id
	NoSignature                // RS256, but the signature is empty
)

// Forge makes a token with the content of [Issuer.Sign] that must be refused.
func (i *Issuer) Forge(how Forgery, audience string, claims map[string]any) string {
	payload, err := json.Marshal(i.payload(audience, claims))
	if err != nil {
		panic(fmt.Sprintf("claims that are no JSON: %v", err))
	}
	i.mu.Lock()
	key := i.keys[len(i.keys)-1]
	i.mu.Unlock()
	switch how {
	case AlgNone:
		return unsigned("none", key.id, payload) + "."
	case HS256Public:
		input := unsigned("HS256", key.id, payload)
		mac := hmac.New(sha256.New, publicPEM(key))
		mac.Write([]byte(input))
		return input + "." + encode(mac.Sum(nil))
	case NoSignature:
		return unsigned("RS256", key.id, payload) + "."
	case OtherKey:
		return sign(stranger(key.id), payload)
	}
	return sign(stranger(newID()), payload)
}

func stranger(id string) signingKey {
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(fmt.Sprintf("make an RSA key: %v", err))
	}
	return signingKey{id: id, private: private}
}

func publicPEM(key signingKey) []byte {
	der, err := x509.MarshalPKIXPublicKey(key.private.Public())
	if err != nil {
		panic(fmt.Sprintf("encode a public key: %v", err))
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

func unsigned(alg, kid string, payload []byte) string {
	header, _ := json.Marshal(map[string]string{"alg": alg, "kid": kid, "typ": "JWT"})
	return encode(header) + "." + encode(payload)
}

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }
