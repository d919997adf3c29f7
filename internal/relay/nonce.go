package relay

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"net/netip"
	"sync/atomic"
)

// nonces makes nonces for addresses without keeping any state about them: a nonce is a MAC over the address under a secret
// that is replaced every [NonceLife]. The one before is taken as well, so a nonce is good for one to two lives.
type nonces struct {
	secrets atomic.Pointer[[2]nonceSecret]
} // the current one and the one before

type nonceSecret [32]byte

func newNonces() *nonces {
	n := &nonces{}
	n.secrets.Store(&[2]nonceSecret{newNonceSecret(), newNonceSecret()})
	return n
}

func newNonceSecret() (s nonceSecret) {
	_, _ = rand.Read(s[:])
	return s
}

// rotate replaces the secret.
func (n *nonces) rotate() {
	n.secrets.Store(&[2]nonceSecret{newNonceSecret(), n.secrets.Load()[0]})
}

// give makes the nonce of an address. It does not allocate.
func (n *nonces) give(a netip.AddrPort) Nonce { return n.secrets.Load()[0].mac(a) }

// valid reports whether a nonce is the address's. It does not allocate.
func (n *nonces) valid(a netip.AddrPort, nonce Nonce) bool {
	s := n.secrets.Load()
	now, before := s[0].mac(a), s[1].mac(a)
	return subtle.ConstantTimeCompare(now[:], nonce[:])|subtle.ConstantTimeCompare(before[:], nonce[:]) == 1
}

// mac is half of SHA-256 over the secret and the address. All inputs have one length and half of the state stays hidden,
// so nothing can be appended; HMAC would only cost more.
func (s *nonceSecret) mac(a netip.AddrPort) Nonce {
	var in [len(s) + 18]byte
	copy(in[:], s[:])
	addr := a.Addr().As16()
	copy(in[len(s):], addr[:])
	binary.BigEndian.PutUint16(in[len(s)+16:], a.Port())
	sum := sha256.Sum256(in[:])
	return Nonce(sum[:])
}
