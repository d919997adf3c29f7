package relay

import (
	"crypto/hkdf"
	"crypto/sha256"
	"fmt"
	"net/netip"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// STUN methods and attributes of the relay protocol. Methods from 0x80 on and attributes from 0xC000 on are free for
// such use (RFC 8489, sections 18.1 and 18.3); from 0x8000 on an attribute may be ignored by who does not know it.
const (
	typeBind          = 0x0285 // method 0x0C5, request
	typeBindSuccess   = typeBind | 0x0100
	typeBindError     = typeBind | 0x0110
	typeHello         = typeBind | 0x0010 // indication: the server's first message on a WebSocket
	typeUnbind        = 0x0286            // method 0x0C6, request
	typeUnbindSuccess = typeUnbind | 0x0100
	typeUnbindError   = typeUnbind | 0x0110

	attrWant   = 0xCC01 // RELAY-WANT, empty
	attrKey    = 0xCC02 // RELAY-KEY, an X25519 public key
	attrTicket = 0xCC03 // TICKET, a [Ticket]
)

// Error codes of an [Answer] (RFC 8489, section 14.8).
const (
	CodeTicket     = 401 // the ticket is refused: forged, expired, or the key that signed the message is not the ticket's
	CodeStaleNonce = 438 // bind again with the Offer that comes with it
	CodeTaken      = 486 // another session holds this channel
	CodeFull       = 508 // the relay takes no more sessions (RFC 8656, section 19)
)

// NonceSize is the size of a nonce in bytes.
const NonceSize = 16

// Nonce is what a relay gives to whoever can receive at an address.
type Nonce [NonceSize]byte

// Offer is what a relay needs to be bound to: a nonce for the address that asked, and its key, which is new at every
// start. A side binds anew when the key has changed.
type Offer struct {
	Nonce Nonce
	Key   wire.Key
}

// BindKey authenticates what one side and one relay say to each other.
type BindKey [sha256.Size]byte

// DeriveBindKey gives the key between a WireGuard key and a relay's key; both sides compute it. It fails for a public
// key that is not usable (RFC 7748, section 6.1).
func DeriveBindKey(own wire.PrivateKey, peer wire.Key) (key BindKey, err error) {
	secret, err := own.Shared(peer)
	if err != nil {
		return key, fmt.Errorf("derive a relay binding's key: %w", err)
	}
	b, err := hkdf.Key(sha256.New, secret, nil, "culvert relay bind v1", len(key))
	copy(key[:], b)
	return key, err
}

// Sizes of the request for an offer and of the largest answer to it, with an IPv6 address.
const (
	offerSize = 4 + NonceSize + 4 + wire.KeySize
	wantSize  = 20 + 4 + 20 + offerSize
	filler    = "culvert path finding and relay; this text only makes room for the answer"
)

// WantRequest encodes a STUN Binding request that asks for an [Offer] as well. It is as large as the largest answer; a
// server that is no relay answers it like any other.
func WantRequest(id nat.TxID) []byte {
	b := nat.AppendHeader(make([]byte, 0, wantSize), nat.TypeBindingRequest, id)
	b = nat.AppendAttr(b, attrWant, "")
	b = nat.AppendAttr(b, nat.AttrSoftware, filler[:wantSize-len(b)-4])
	nat.SetLength(b, len(b))
	return b
}

// ParseOffer reads the offer in a Binding response, in an error answer with code 438 or in a WebSocket's first message.
// ok is false where there is none. Nothing authenticates it: whoever forges one gains a BIND that the relay refuses.
func ParseOffer(msg []byte) (o Offer, ok bool) {
	if !nat.IsSTUN(msg) {
		return o, false
	}
	switch nat.MessageType(msg) {
	case nat.TypeBindingSuccess, typeBindError, typeUnbindError, typeHello:
	default:
		return o, false
	}
	nonce, key := false, false
	a := nat.Walk(msg)
	for a.Next() {
		switch {
		case a.Type == nat.AttrNonce && len(a.Value) == NonceSize && !nonce:
			o.Nonce, nonce = Nonce(a.Value), true
		case a.Type == attrKey && len(a.Value) == wire.KeySize && !key:
			o.Key, key = wire.Key(a.Value), true
		}
	}
	if !nonce || !key || a.Bad || o.Key.IsZero() {
		return Offer{}, false
	}
	return o, true
}

// Bind is a BIND or an UNBIND: it ties the address that it comes from to one side of a session, or unties it.
type Bind struct {
	ID     nat.TxID
	Unbind bool
	Nonce  Nonce
	Ticket Ticket
}

// AppendBind encodes a bind under the key between the ticket's holder and the relay. It does not allocate where dst has
// room.
func AppendBind(dst []byte, b Bind, key *BindKey) []byte {
	start := len(dst)
	typ := uint16(typeBind)
	if b.Unbind {
		typ = typeUnbind
	}
	dst = nat.AppendHeader(dst, typ, b.ID)
	dst = nat.AppendAttr(dst, nat.AttrNonce, b.Nonce[:])
	dst = nat.AppendAttr(dst, attrTicket, []byte(b.Ticket))
	return nat.AppendIntegrity(dst, start, key[:])
}

// ParseBind reads a bind, unverified, as far as MESSAGE-INTEGRITY covers it. The ticket is part of msg and of the right
// size. It does not allocate.
func ParseBind(msg []byte) (b Bind, ok bool) {
	if !nat.IsSTUN(msg) || len(msg) > nat.MaxMessage {
		return b, false
	}
	switch nat.MessageType(msg) {
	case typeBind:
	case typeUnbind:
		b.Unbind = true
	default:
		return b, false
	}
	nonce, integrity := false, false
	a := nat.Walk(msg)
	for !integrity && a.Next() {
		switch {
		case a.Type == nat.AttrMessageIntegrity:
			integrity = true
		case a.Type == nat.AttrNonce && len(a.Value) == NonceSize && !nonce:
			b.Nonce, nonce = Nonce(a.Value), true
		case a.Type == attrTicket && len(a.Value) == TicketSize && b.Ticket == nil:
			b.Ticket = a.Value
		case a.Type < 0x8000:
			return Bind{}, false // must be understood, and is not
		}
	}
	if !nonce || !integrity || b.Ticket == nil || a.Bad {
		return Bind{}, false
	}
	b.ID = nat.Transaction(msg)
	return b, true
}

// VerifyMessage checks MESSAGE-INTEGRITY of a bind or of a success [Answer]. It does not allocate.
func VerifyMessage(msg []byte, key *BindKey) bool { return nat.VerifyIntegrity(msg, key[:]) }

// Answer is what a relay says to a [Bind].
type Answer struct {
	ID     nat.TxID
	Unbind bool           // it answers an UNBIND
	Code   int            // 0 is success; else one of the Code constants. An error is not authenticated.
	Mapped netip.AddrPort // with success over UDP: the address that is bound
	Offer  Offer          // with [CodeStaleNonce]
}

// ParseAnswer reads an answer. Believe a success only once [VerifyMessage] has said yes, and an error only where ID is
// that of a request in flight. It does not allocate.
func ParseAnswer(msg []byte) (a Answer, ok bool) {
	if !nat.IsSTUN(msg) || len(msg) > nat.MaxMessage {
		return a, false
	}
	a.ID = nat.Transaction(msg)
	switch nat.MessageType(msg) {
	case typeUnbindSuccess, typeUnbindError:
		a.Unbind = true
	case typeBindSuccess, typeBindError:
	default:
		return Answer{}, false
	}
	switch nat.MessageType(msg) {
	case typeBindSuccess, typeUnbindSuccess:
		a.Mapped, _ = nat.MappedAddress(msg)
		return a, true
	}
	if a.Code = nat.ErrorCode(msg); a.Code < 300 || a.Code > 699 {
		return Answer{}, false
	}
	if a.Code == CodeStaleNonce {
		if a.Offer, ok = ParseOffer(msg); !ok {
			return Answer{}, false
		}
	}
	return a, true
}

// AppendAnswer encodes an answer: a success under key, an error without. It does not allocate where dst has room.
func AppendAnswer(dst []byte, a Answer, key *BindKey) []byte {
	start := len(dst)
	typ := uint16(typeBindSuccess)
	if a.Code != 0 {
		typ = typeBindError
	}
	if a.Unbind {
		typ += typeUnbind - typeBind
	}
	dst = nat.AppendHeader(dst, typ, a.ID)
	if a.Code == 0 {
		if a.Mapped.IsValid() {
			dst = nat.AppendMapped(dst, a.ID, a.Mapped)
		}
		return nat.AppendIntegrity(dst, start, key[:])
	}
	dst = nat.AppendAttr(dst, nat.AttrErrorCode, []byte{2: byte(a.Code / 100), 3: byte(a.Code % 100)})
	if a.Code == CodeStaleNonce {
		dst = appendOffer(dst, a.Offer)
	}
	nat.SetLength(dst[start:], len(dst)-start)
	return dst
}

// AppendHello encodes a WebSocket's first message. It does not allocate where dst has room.
func AppendHello(dst []byte, id nat.TxID, o Offer) []byte {
	start := len(dst)
	dst = appendOffer(nat.AppendHeader(dst, typeHello, id), o)
	nat.SetLength(dst[start:], len(dst)-start)
	return dst
}

func appendOffer(dst []byte, o Offer) []byte {
	dst = nat.AppendAttr(dst, nat.AttrNonce, o.Nonce[:])
	return nat.AppendAttr(dst, attrKey, o.Key[:])
}

// wants reports whether a STUN message asks for an offer.
func wants(msg []byte) bool {
	for a := nat.Walk(msg); a.Next(); {
		if a.Type == attrWant {
			return true
		}
	}
	return false
}

// AppendBindingResponse answers a Binding request as [nat.AppendBindingResponse] does, with an offer for who wants one
// and has left room for it: no response is larger than its request. ok is false where there is nothing to answer.
func AppendBindingResponse(dst, request []byte, from netip.AddrPort, offer func() Offer) (response []byte, ok bool) {
	start := len(dst)
	dst, ok = nat.AppendBindingResponse(dst, request, from)
	if !ok || len(dst)-start > len(request) {
		return dst[:start], false
	}
	if len(dst)-start+offerSize <= len(request) && wants(request) {
		dst = appendOffer(dst, offer())
		nat.SetLength(dst[start:], len(dst)-start)
	}
	return dst, true
}
