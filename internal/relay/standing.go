package relay

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// A standing ticket lets a gateway keep one WebSocket to a relay open before any session needs it, so that a session of a gateway
// behind blocked UDP need not wait for it to be opened. It forwards nothing: each session is bound with a ticket of its own.
//
//	gateway ── STAND: STANDING, NONCE, MESSAGE-INTEGRITY ──► relay    over a WebSocket alone, in the order of a BIND
//	gateway ◄─ success, or 438, 401 ── relay                          the WebSocket stays until the ticket has ended

// Types of the messages and of the attribute, see the list at typeBind.
const (
	typeStand        = 0x0287 // method 0x0C7, request
	typeStandSuccess = typeStand | 0x0100
	typeStandError   = typeStand | 0x0110

	attrStanding = 0xCC04 // STANDING, a standing ticket
)

// Layout of a standing ticket: version, key, issued, expires, all big endian, and the signature over standingDomain and what
// stands before it. Domain and size both differ from a session's ticket, so that neither is ever taken for the other.
const (
	standingVersion    = 1
	standingClaimsSize = 1 + wire.KeySize + 8 + 8
	standingSize       = standingClaimsSize + ed25519.SignatureSize

	standingDomain = "culvert relay standing v1\x00"

	// StandingLife is the longest life of a standing ticket that a relay takes.
	StandingLife = time.Hour

	// maxStanding is how many WebSockets one key may have standing: the one in use, and one that is about to replace it. A
	// further one takes the place of the oldest.
	maxStanding = 2
)

// Standing is an encoded standing ticket.
type Standing []byte

// SignStanding makes a standing ticket for the gateway that holds key, in base64url.
func SignStanding(signer ed25519.PrivateKey, key wire.Key, issued, expires time.Time) (wire.Secret, error) {
	switch {
	case key.IsZero():
		return "", errors.New("sign a standing ticket: the gateway's key is missing")
	case issued.Unix() < 0 || !expires.After(issued) || expires.Sub(issued) > StandingLife:
		return "", errors.New("sign a standing ticket: it ends before it begins, or lasts too long")
	case len(signer) != ed25519.PrivateKeySize:
		return "", errors.New("sign a standing ticket: the signing key is missing")
	}
	t := append(make([]byte, 0, len(standingDomain)+standingSize), standingDomain...)
	t = append(append(t, standingVersion), key[:]...)
	t = binary.BigEndian.AppendUint64(t, uint64(issued.Unix()))
	t = binary.BigEndian.AppendUint64(t, uint64(expires.Unix()))
	t = append(t, ed25519.Sign(signer, t)...)
	return wire.Secret(base64.RawURLEncoding.EncodeToString(t[len(standingDomain):])), nil
}

// DecodeStanding gives a standing ticket's bytes. It verifies nothing: that is the relay's business.
func DecodeStanding(s wire.Secret) (Standing, error) {
	if len(s) != base64.RawURLEncoding.EncodedLen(standingSize) {
		return nil, fmt.Errorf("a standing ticket has %d characters, this one has %d", base64.RawURLEncoding.EncodedLen(standingSize), len(s))
	}
	t, err := base64.RawURLEncoding.Strict().DecodeString(s.Reveal())
	if err != nil {
		return nil, errors.New("a standing ticket is base64url") // the decoder's error would quote it
	}
	return t, nil
}

// VerifyStanding checks a standing ticket's signature under any of keys, and that it is valid now. Its error is [ErrTicket] or
// wraps it.
func VerifyStanding(t Standing, keys []ed25519.PublicKey, now time.Time) (key wire.Key, expires time.Time, err error) {
	if len(t) != standingSize || t[0] != standingVersion {
		return key, expires, ErrTicket
	}
	signed := append([]byte(standingDomain), t[:standingClaimsSize]...)
	known := func(k ed25519.PublicKey) bool {
		return len(k) == ed25519.PublicKeySize && ed25519.Verify(k, signed, t[standingClaimsSize:])
	}
	if !slices.ContainsFunc(keys, known) {
		return key, expires, fmt.Errorf("%w: not signed by a known coordinator", ErrTicket)
	}
	key = wire.Key(t[1:])
	issued := time.Unix(int64(binary.BigEndian.Uint64(t[1+wire.KeySize:])), 0)
	expires = time.Unix(int64(binary.BigEndian.Uint64(t[1+wire.KeySize+8:])), 0)
	switch {
	case now.Add(ClockSkew).Before(issued):
		return key, expires, fmt.Errorf("%w: issued in the future", ErrTicket)
	case !now.Before(expires):
		return key, expires, fmt.Errorf("%w: expired", ErrTicket)
	case expires.Sub(issued) > StandingLife:
		return key, expires, fmt.Errorf("%w: it lasts too long", ErrTicket)
	}
	return key, expires, nil
}

// Stand is a STAND: it asks that the WebSocket on which it comes may stay without a binding.
type Stand struct {
	ID     nat.TxID
	Nonce  Nonce
	Ticket Standing
}

// AppendStand encodes a stand under the key between the gateway and the relay.
func AppendStand(dst []byte, s Stand, key *BindKey) []byte {
	start := len(dst)
	dst = nat.AppendHeader(dst, typeStand, s.ID)
	dst = nat.AppendAttr(dst, nat.AttrNonce, s.Nonce[:])
	dst = nat.AppendAttr(dst, attrStanding, []byte(s.Ticket))
	return nat.AppendIntegrity(dst, start, key[:])
}

// ParseStand reads a stand, unverified, as far as MESSAGE-INTEGRITY covers it. The ticket is part of msg and of the right size.
// It does not allocate.
func ParseStand(msg []byte) (s Stand, ok bool) {
	if !nat.IsSTUN(msg) || len(msg) > nat.MaxMessage || nat.MessageType(msg) != typeStand {
		return s, false
	}
	nonce, integrity := false, false
	a := nat.Walk(msg)
	for !integrity && a.Next() {
		switch {
		case a.Type == nat.AttrMessageIntegrity:
			integrity = true
		case a.Type == nat.AttrNonce && len(a.Value) == NonceSize && !nonce:
			s.Nonce, nonce = Nonce(a.Value), true
		case a.Type == attrStanding && len(a.Value) == standingSize && s.Ticket == nil:
			s.Ticket = a.Value
		case a.Type < 0x8000:
			return Stand{}, false // must be understood, and is not
		}
	}
	if !nonce || !integrity || s.Ticket == nil || a.Bad {
		return Stand{}, false
	}
	s.ID = nat.Transaction(msg)
	return s, true
}

// ParseStandAnswer reads the answer to a stand: 0 for success, which is to be believed only once [VerifyMessage] has said yes, or
// one of the Code constants.
func ParseStandAnswer(msg []byte) (id nat.TxID, code int, ok bool) {
	if !nat.IsSTUN(msg) || len(msg) > nat.MaxMessage {
		return id, 0, false
	}
	switch id = nat.Transaction(msg); nat.MessageType(msg) {
	case typeStandSuccess:
		return id, 0, true
	case typeStandError:
		code = nat.ErrorCode(msg)
		return id, code, code >= 300 && code <= 699
	}
	return id, 0, false
}

// appendStandAnswer encodes an answer: a success under key, an error without.
func appendStandAnswer(dst []byte, id nat.TxID, code int, key *BindKey) []byte {
	start := len(dst)
	if code == 0 {
		return nat.AppendIntegrity(nat.AppendHeader(dst, typeStandSuccess, id), start, key[:])
	}
	dst = nat.AppendHeader(dst, typeStandError, id)
	dst = nat.AppendAttr(dst, nat.AttrErrorCode, []byte{2: byte(code / 100), 3: byte(code % 100)})
	nat.SetLength(dst[start:], len(dst)-start)
	return dst
}

// stand handles what may be a STAND on a WebSocket and appends the answer; ok is false where it is none. Work goes from cheap to
// dear as with a BIND.
func (s *Server) stand(dst, msg []byte, l *link, now int64) (_ []byte, ok bool) {
	m, ok := ParseStand(msg)
	if !ok {
		return dst, false
	}
	switch {
	case !s.fresh(m.Nonce, origin{link: l}):
		s.counts.stale.Add(1)
		return appendStandAnswer(dst, m.ID, CodeStaleNonce, nil), true
	case !s.guard.admit(l.source, now):
		s.counts.limited.Add(1)
		return dst, true
	}
	holder, expires, err := VerifyStanding(m.Ticket, *s.keys.Load(), time.Unix(0, now))
	var key BindKey
	if err == nil {
		key, err = DeriveBindKey(s.private, holder)
	}
	if err != nil || !VerifyMessage(msg, &key) || !s.keepStanding(l, holder, expires.Sub(time.Unix(0, now))) {
		s.counts.refused.Add(1)
		return appendStandAnswer(dst, m.ID, CodeTicket, nil), true
	}
	s.counts.bound.Add(1)
	return appendStandAnswer(dst, m.ID, 0, &key), true
}

// keepStanding lets a link stand for as long as its ticket lasts. Where its key has too many, the oldest has to be bound or leave.
// It reports whether the link is still open.
func (s *Server) keepStanding(l *link, holder wire.Key, life time.Duration) bool {
	s.mu.Lock()
	if _, open := s.links[l]; !open || !l.holder.IsZero() && l.holder != holder {
		s.mu.Unlock()
		return false // one link is one gateway's
	}
	l.holder = holder
	var oldest *link
	if all := s.standing[holder]; !slices.Contains(all, l) {
		if len(all) >= maxStanding {
			oldest = all[0]
			all = slices.Delete(all, 0, 1)
		}
		s.standing[holder] = append(all, l)
	}
	s.mu.Unlock()
	if oldest != nil {
		oldest.stand(0)
	}
	return l.stand(life)
}

// noLongerStanding takes a link that ends out of the count. s.mu is held.
func (s *Server) noLongerStanding(l *link) {
	if l.holder.IsZero() {
		return
	}
	all := slices.DeleteFunc(s.standing[l.holder], func(o *link) bool { return o == l })
	if s.standing[l.holder] = all; len(all) == 0 {
		delete(s.standing, l.holder)
	}
}

// stand lets the link stay without a binding for so long, and after that for [BindTimeout] as any other. It reports whether the
// link is still open.
func (l *link) stand(life time.Duration) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	l.standsUntil = time.Now().Add(life)
	if len(l.bound) == 0 {
		l.lonely.Reset(max(life, 0) + BindTimeout)
	}
	l.recount()
	return true
}

// stands reports whether the link may stay without a binding. l.mu is held.
func (l *link) stands() bool { return time.Now().Before(l.standsUntil) }
