package claims

import (
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/go-jose/go-jose/v4"
)

// Bounds on a published key set (RFC 7517). A longer RSA key only costs time: verifying is quadratic in its length.
const (
	maxKeySet  = 1 << 20 // bytes
	maxKeys    = 256     // keys of a set
	minKeyBits = 2048    // RFC 7518, section 3.3
	maxKeyBits = 8192
)

// keys are public RSA keys that share an id; nearly always one.
type keys []*rsa.PublicKey

// keyring is an issuer's key set by key id. It is never changed once made.
type keyring map[string]keys

// parseKeySet reads a JWK set. Keys that are not for RS256 signatures, or not understood, are passed over (RFC 7517,
// section 5); a set with none left is an error.
func parseKeySet(data []byte) (keyring, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(data, &set); err != nil {
		return nil, fmt.Errorf("read the key set: %w", err)
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("the key set has %d keys, more than %d", len(set.Keys), maxKeys)
	}
	ring := make(keyring)
	for _, raw := range set.Keys {
		if kid, key, ok := parseKey(raw); ok {
			ring[kid] = append(ring[kid], key)
		}
	}
	if len(ring) == 0 {
		return nil, errors.New("the key set has no RSA key for RS256")
	}
	return ring, nil
}

func parseKey(raw json.RawMessage) (kid string, key *rsa.PublicKey, ok bool) {
	var jwk jose.JSONWebKey
	if json.Unmarshal(raw, &jwk) != nil {
		return "", nil, false
	}
	if jwk.Use != "" && jwk.Use != "sig" || jwk.Algorithm != "" && jwk.Algorithm != string(jose.RS256) {
		return "", nil, false
	}
	key, ok = jwk.Key.(*rsa.PublicKey)
	if !ok || key.N.BitLen() < minKeyBits || key.N.BitLen() > maxKeyBits {
		return "", nil, false
	}
	return jwk.KeyID, key, true
}

// find gives the keys with this id. A token without an id is only good where there is one key to choose from (OpenID
// Connect Core 1.0, section 10.1).
func (r keyring) find(kid string) (keys, bool) {
	if kid != "" {
		found, ok := r[kid]
		return found, ok
	}
	if len(r) != 1 {
		return nil, false
	}
	for _, only := range r {
		return only, len(only) == 1
	}
	return nil, false
}
