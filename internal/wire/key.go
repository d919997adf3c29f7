package wire

import (
	"crypto/ecdh"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
)

// KeySize is the size of an X25519 key in bytes (RFC 7748).
const KeySize = 32

// Key is a WireGuard public key (X25519, RFC 7748). In text it is unpadded base64url, 43 characters.
type Key [KeySize]byte

// ParseKey reads a public key in base64url without padding or in WireGuard's own base64 with padding.
func ParseKey(s string) (Key, error) {
	var k Key
	s = strings.TrimSuffix(s, "=")
	if strings.ContainsAny(s, "+/") {
		s = wireguards.Replace(s)
	}
	if len(s) != base64.RawURLEncoding.EncodedLen(KeySize) {
		return k, fmt.Errorf("a public key is %d characters of base64, this one has %d",
			base64.RawURLEncoding.EncodedLen(KeySize), len(s))
	}
	if _, err := strictKey.Decode(k[:], []byte(s)); err != nil {
		return Key{}, fmt.Errorf("a public key is base64: %w", err)
	}
	if k.IsZero() {
		return k, fmt.Errorf("the all-zero public key is not usable")
	}
	return k, nil
}

var (
	strictKey  = base64.RawURLEncoding.Strict()
	wireguards = strings.NewReplacer("+", "-", "/", "_") // alphabet to ours
)

// String gives the key as unpadded base64url.
func (k Key) String() string { return base64.RawURLEncoding.EncodeToString(k[:]) }

// Hex gives the key as lower-case hexadecimal, as WireGuard's configuration protocol wants it.
func (k Key) Hex() string { return hex.EncodeToString(k[:]) }

// IsZero reports whether the key is unset.
func (k Key) IsZero() bool { return k == Key{} }

// MarshalText encodes the key as unpadded base64url.
func (k Key) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText is [ParseKey].
func (k *Key) UnmarshalText(text []byte) error {
	parsed, err := ParseKey(string(text))
	if err != nil {
		return err
	}
	*k = parsed
	return nil
}

// SessionID derives a session's id from the client key that it is for: 22 characters of base64url, the first
// 128 bits of its SHA-256. One key is one session, and both ends of a tunnel can check that nobody mixed them up.
func (k Key) SessionID() string {
	sum := sha256.Sum256(k[:])
	return base64.RawURLEncoding.EncodeToString(sum[:16])
}

// PrivateKey is a WireGuard private key. It stays in memory: it has no text form and prints as a placeholder.
type PrivateKey struct{ key *ecdh.PrivateKey }

// NewPrivateKey makes a fresh key.
func NewPrivateKey() (PrivateKey, error) {
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return PrivateKey{}, fmt.Errorf("make an x25519 key: %w", err)
	}
	return PrivateKey{k}, nil
}

// PrivateKeyFromBytes takes a key of [KeySize] bytes that was kept elsewhere.
func PrivateKeyFromBytes(b []byte) (PrivateKey, error) {
	k, err := ecdh.X25519().NewPrivateKey(b)
	if err != nil {
		return PrivateKey{}, fmt.Errorf("read an x25519 private key: %w", err)
	}
	return PrivateKey{k}, nil
}

// Public gives the public half.
func (p PrivateKey) Public() Key { return Key(p.key.PublicKey().Bytes()) }

// Bytes gives the secret itself, for the WireGuard device alone.
func (p PrivateKey) Bytes() []byte { return p.key.Bytes() }

// Shared is the X25519 static-static secret with peer (RFC 7748, section 6.1); it refuses low-order points.
func (p PrivateKey) Shared(peer Key) ([]byte, error) {
	pub, err := ecdh.X25519().NewPublicKey(peer[:])
	if err != nil {
		return nil, err
	}
	return p.key.ECDH(pub)
}

// IsZero reports whether there is no key.
func (p PrivateKey) IsZero() bool { return p.key == nil }

// String never shows the key.
func (PrivateKey) String() string { return "(private key)" }

// GoString never shows the key.
func (PrivateKey) GoString() string { return "(private key)" }

// Format never shows the key, whatever the verb.
func (PrivateKey) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("(private key)")) }
