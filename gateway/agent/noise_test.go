//go:build linux

package agent

import (
	"crypto/cipher"
	"crypto/hkdf"
	"encoding/binary"
	"errors"
	"hash"
	"time"

	"golang.org/x/crypto/blake2s"
	"golang.org/x/crypto/chacha20poly1305"

	"github.com/culvertnet/culvert/internal/wire"
)

const (
	noiseInitiation = 148
	noiseResponse   = 92
)

// initiator is the first side of WireGuard's handshake, Noise_IKpsk2 with a key of zeros.
type initiator struct {
	static, ephemeral wire.PrivateKey
	chain, hash       []byte
	index             uint32
	message           []byte
}

func blake() hash.Hash {
	h, _ := blake2s.New256(nil) // without a key it does not fail
	return h
}

func digest(parts ...[]byte) []byte {
	h := blake()
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// derive gives n keys; the first is the next chaining key.
func derive(chain, input []byte, n int) ([][]byte, error) {
	all, err := hkdf.Key(blake, input, chain, "", 32*n)
	if err != nil {
		return nil, err
	}
	keys := make([][]byte, n)
	for i := range keys {
		keys[i] = all[32*i : 32*i+32]
	}
	return keys, nil
}

// mix adds a shared secret to the chain and gives a cipher.
func (s *initiator) mix(own wire.PrivateKey, peer wire.Key) (cipher.AEAD, error) {
	secret, err := own.Shared(peer)
	if err != nil {
		return nil, err
	}
	keys, err := derive(s.chain, secret, 2)
	if err != nil {
		return nil, err
	}
	s.chain = keys[0]
	return chacha20poly1305.New(keys[1])
}

// absorb adds a public key to the chain and the hash.
func (s *initiator) absorb(key []byte) error {
	keys, err := derive(s.chain, key, 1)
	if err == nil {
		s.chain, s.hash = keys[0], digest(s.hash, key)
	}
	return err
}

var noNonce [chacha20poly1305.NonceSize]byte

// newInitiator makes the first message.
func newInitiator(static wire.PrivateKey, peer wire.Key, index uint32) (*initiator, error) {
	s := &initiator{static: static, index: index}
	var err error
	if s.ephemeral, err = wire.NewPrivateKey(); err != nil {
		return nil, err
	}
	s.chain = digest([]byte("Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"))
	s.hash = digest(digest(s.chain, []byte("WireGuard v1 zx2c4 Jason@zx2c4.com")), peer[:])
	m := make([]byte, 8, noiseInitiation)
	m[0] = 1
	binary.LittleEndian.PutUint32(m[4:], index)
	public, own := s.ephemeral.Public(), static.Public()
	m = append(m, public[:]...)
	if err := s.absorb(public[:]); err != nil {
		return nil, err
	}
	stamp := make([]byte, 12) // TAI64N
	now := time.Now()
	binary.BigEndian.PutUint64(stamp, uint64(now.Unix())+0x400000000000000a)
	binary.BigEndian.PutUint32(stamp[8:], uint32(now.Nanosecond()))
	for _, part := range []struct {
		key   wire.PrivateKey
		plain []byte
	}{{s.ephemeral, own[:]}, {static, stamp}} {
		aead, err := s.mix(part.key, peer)
		if err != nil {
			return nil, err
		}
		sealed := aead.Seal(nil, noNonce[:], part.plain, s.hash)
		s.hash = digest(s.hash, sealed)
		m = append(m, sealed...)
	}
	mac, err := blake2s.New128(digest([]byte("mac1----"), peer[:]))
	if err != nil {
		return nil, err
	}
	mac.Write(m)
	s.message = append(mac.Sum(m), make([]byte, 16)...)
	return s, nil
}

// finish takes the answer and gives the session's keys and the other side's index.
func (s *initiator) finish(m []byte) (send, receive cipher.AEAD, theirs uint32, err error) {
	if len(m) != noiseResponse || binary.LittleEndian.Uint32(m[8:]) != s.index {
		return nil, nil, 0, errors.New("not the answer to this handshake")
	}
	peer := wire.Key(m[12:44])
	if err := s.absorb(peer[:]); err != nil {
		return nil, nil, 0, err
	}
	for _, own := range []wire.PrivateKey{s.ephemeral, s.static} {
		secret, err := own.Shared(peer)
		if err != nil {
			return nil, nil, 0, err
		}
		keys, err := derive(s.chain, secret, 1)
		if err != nil {
			return nil, nil, 0, err
		}
		s.chain = keys[0]
	}
	keys, err := derive(s.chain, make([]byte, 32), 3)
	if err != nil {
		return nil, nil, 0, err
	}
	s.hash = digest(s.hash, keys[1])
	empty, err := chacha20poly1305.New(keys[2])
	if err != nil {
		return nil, nil, 0, err
	}
	if _, err := empty.Open(nil, noNonce[:], m[44:60], s.hash); err != nil {
		return nil, nil, 0, err
	}
	last, err := derive(keys[0], nil, 2)
	if err != nil {
		return nil, nil, 0, err
	}
	if send, err = chacha20poly1305.New(last[0]); err != nil {
		return nil, nil, 0, err
	}
	receive, err = chacha20poly1305.New(last[1])
	return send, receive, binary.LittleEndian.Uint32(m[4:]), err
}
