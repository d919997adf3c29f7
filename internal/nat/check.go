package nat

import (
	"crypto/sha1" //nolint:gosec // RFC 8489's MESSAGE-INTEGRITY is HMAC-SHA1, which collisions of SHA-1 do not touch
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

const integritySize = attrHeader + sha1.Size

// Check is an authenticated Binding request between the two sides of a session (like RFC 8445, section 2.5).
type Check struct {
	ID       TxID
	Username string // "<session id>:<first 8 characters of the sender's key>"
	Nominate bool   // this is the path that the sender uses (USE-CANDIDATE, RFC 8445, section 7.1.1)
	// Seq numbers the sender's checks in one session, always rising, so that the receiver can tell a repetition.
	Seq uint64
	// MTU is the largest packet inside the tunnel that the sender has found to fit, in bytes; 0 where it does not know yet.
	MTU uint16
	// Call asks the other side to check its candidates again, once and quickly: the sender is about to.
	Call bool
	// Leave tells the other side that the sender is about to go away.
	Leave bool
	// Stream tells the other side that the sender is on a stream to the relay through which the check goes: large answers would hold
	// up there what follows them.
	Stream bool
	// Behind says what the sender is behind, where it wants to try the birthday method; else zero.
	Behind Behind
	// Tally says how many of the packets sent to the sender have come, where it knows of tallies.
	Tally Tally
	// Handshake is WireGuard's first message, so that it is on its way before there is a path; nil for none, at most [MaxHandshake]
	// bytes. See [PeekHandshake].
	Handshake []byte
}

// MaxHandshake is the size of the largest handshake message that a check carries, in bytes.
const MaxHandshake = 256

// Asked is what a check asks for, beside an answer.
type Asked struct {
	Nominate bool
	Seq      uint64
	MTU      uint16
	Call     bool
	Leave    bool
	Stream   bool
	Behind   Behind
	Tally    Tally
	Size     int // of the whole check, where it is padded; 0 for a plain one
}

// AppendCheck encodes a check with MESSAGE-INTEGRITY under key, padded with a PADDING attribute (RFC 5780, section
// 7.6) to size bytes if size is larger. A size that is no multiple of four is rounded down: a check never exceeds it.
// It fails for an empty key, a username that is empty or over [MaxUsername], a handshake message over [MaxHandshake], and a size
// over [MaxMessage]. It does not allocate where dst has room.
func AppendCheck(dst []byte, c Check, key []byte, size int) ([]byte, error) {
	switch {
	case len(key) == 0:
		return dst, errors.New("encode a check: the key is empty")
	case c.Username == "" || len(c.Username) > MaxUsername:
		return dst, fmt.Errorf("encode a check: a username has 1 to %d bytes, not %d", MaxUsername, len(c.Username))
	case size > MaxMessage:
		return dst, fmt.Errorf("encode a check: %d bytes are more than %d", size, MaxMessage)
	case len(c.Handshake) > MaxHandshake:
		return dst, fmt.Errorf("encode a check: a handshake message has at most %d bytes, not %d", MaxHandshake, len(c.Handshake))
	}
	start := len(dst)
	dst = AppendHeader(dst, TypeBindingRequest, c.ID)
	dst = AppendAttr(dst, attrUsername, c.Username)
	if c.Nominate {
		dst = AppendAttr(dst, attrUseCandidate, "")
	}
	dst = appendPath(dst, c)
	dst = c.Behind.append(dst)
	dst = c.Tally.append(dst)
	if len(c.Handshake) > 0 {
		dst = AppendAttr(dst, attrHandshake, c.Handshake)
	}
	dst = appendPadding(dst, start, size)
	return AppendIntegrity(dst, start, key), nil
}

// pathSize is the length of PATH: sequence number, MTU, flags.
const (
	pathSize   = 8 + 2 + 2
	pathCall   = 1 // the flag that is [Check.Call]
	pathLeave  = 2 // [Check.Leave]
	pathStream = 4 // and [Check.Stream]
)

// appendPath appends what a check says about the session's paths.
func appendPath(dst []byte, c Check) []byte {
	var v [pathSize]byte
	binary.BigEndian.PutUint64(v[:], c.Seq)
	binary.BigEndian.PutUint16(v[8:], c.MTU)
	if c.Call {
		v[11] |= pathCall
	}
	if c.Leave {
		v[11] |= pathLeave
	}
	if c.Stream {
		v[11] |= pathStream
	}
	return AppendAttr(dst, attrPath, v[:])
}

// appendPadding pads the message that starts at start so that it has size bytes once MESSAGE-INTEGRITY is appended.
func appendPadding(dst []byte, start, size int) []byte {
	if gap := size&^3 - (len(dst) - start) - integritySize; gap >= attrHeader {
		var zeros [MaxMessage]byte
		dst = AppendAttr(dst, attrPadding, zeros[:gap-attrHeader])
	}
	return dst
}

// AppendCheckResponse encodes the success response to a check, with the mapped address, the sender's tally and MESSAGE-INTEGRITY, padded
// as [AppendCheck] does. It fails for an empty key, an address that is not valid and a size over [MaxMessage], and does not
// allocate where dst has room.
func AppendCheckResponse(dst []byte, id TxID, mapped netip.AddrPort, tally Tally, key []byte, size int) ([]byte, error) {
	if size > MaxMessage {
		return dst, fmt.Errorf("encode a check's response: %d bytes are more than %d", size, MaxMessage)
	}
	if len(key) == 0 {
		return dst, errors.New("encode a check's response: the key is empty")
	}
	if !mapped.IsValid() {
		return dst, errors.New("encode a check's response: the mapped address is not valid")
	}
	start := len(dst)
	dst = AppendHeader(dst, TypeBindingSuccess, id)
	dst = AppendMapped(dst, id, mapped)
	dst = tally.append(dst)
	dst = appendPadding(dst, start, size)
	return AppendIntegrity(dst, start, key), nil
}

// PeekUsername gives a Binding request's USERNAME before anything is verified, without allocating, so that the
// receiver finds the key. ok is false for anything but a well-formed Binding request. The username is part of b, and
// it is the one that [VerifyCheck] finds covered: the first, and before MESSAGE-INTEGRITY.
func PeekUsername(b []byte) (username []byte, id TxID, ok bool) {
	if !IsSTUN(b) || MessageType(b) != TypeBindingRequest {
		return nil, TxID{}, false
	}
	a, covered := Walk(b), true
	for a.Next() {
		switch {
		case a.Type == AttrMessageIntegrity:
			covered = false
		case a.Type == attrUsername && covered && username == nil:
			username = a.Value
		}
	}
	if a.Bad || len(username) == 0 || len(username) > MaxUsername {
		return nil, TxID{}, false
	}
	return username, Transaction(b), true
}

// PeekAsked gives what a Binding request asks for, of what its MESSAGE-INTEGRITY covers. It does not allocate.
func PeekAsked(b []byte) (asked Asked) {
	if !IsSTUN(b) || MessageType(b) != TypeBindingRequest {
		return Asked{}
	}
	for a := Walk(b); a.Next() && a.Type != AttrMessageIntegrity; {
		switch {
		case a.Type == attrUseCandidate:
			asked.Nominate = true
		case a.Type == attrPadding:
			asked.Size = len(b)
		case a.Type == attrPath && len(a.Value) == pathSize:
			asked.Seq = binary.BigEndian.Uint64(a.Value)
			asked.MTU = binary.BigEndian.Uint16(a.Value[8:])
			asked.Call = a.Value[11]&pathCall != 0
			asked.Leave = a.Value[11]&pathLeave != 0
			asked.Stream = a.Value[11]&pathStream != 0
		case a.Type == attrBehind:
			asked.Behind = readBehind(a.Value)
		case a.Type == attrTally:
			asked.Tally = readTally(a.Value)
		}
	}
	return asked
}

// PeekHandshake gives the handshake message in a Binding request, of what its MESSAGE-INTEGRITY covers; nil where there is none. It
// is part of b, and does not allocate.
func PeekHandshake(b []byte) []byte {
	if !IsSTUN(b) || MessageType(b) != TypeBindingRequest {
		return nil
	}
	for a := Walk(b); a.Next() && a.Type != AttrMessageIntegrity; {
		if a.Type == attrHandshake && len(a.Value) > 0 && len(a.Value) <= MaxHandshake {
			return a.Value
		}
	}
	return nil
}

// VerifyCheck checks MESSAGE-INTEGRITY of a request or response under key (RFC 8489, section 14.5). It must be there,
// and a request's USERNAME before it. What follows it is not covered and nothing here reads it; attributes before it
// that we do not know are ignored, since the peer vouches for them. It does not allocate.
func VerifyCheck(b []byte, key []byte) bool {
	if !IsSTUN(b) {
		return false
	}
	request := MessageType(b) == TypeBindingRequest
	if !request && MessageType(b) != TypeBindingSuccess && MessageType(b) != TypeBindingError {
		return false
	}
	if !request {
		return VerifyIntegrity(b, key)
	}
	for a := Walk(b); a.Next() && a.Type != AttrMessageIntegrity; {
		if a.Type == attrUsername {
			return VerifyIntegrity(b, key)
		}
	}
	return false
}

// VerifyIntegrity checks the first MESSAGE-INTEGRITY of a message of any type under key (RFC 8489, section 14.5);
// false where there is none. Nothing after it is covered. It does not allocate.
func VerifyIntegrity(b, key []byte) bool {
	if !IsSTUN(b) || len(b) > MaxMessage || len(key) == 0 {
		return false
	}
	for a := Walk(b); a.Next(); {
		if a.Type == AttrMessageIntegrity {
			want := integrity(b[:a.at], key)
			return len(a.Value) == sha1.Size && subtle.ConstantTimeCompare(want[:], a.Value) == 1
		}
	}
	return false
}

// AppendIntegrity ends the message that starts at start with MESSAGE-INTEGRITY and sets its length.
func AppendIntegrity(dst []byte, start int, key []byte) []byte {
	mac := integrity(dst[start:], key)
	dst = AppendAttr(dst, AttrMessageIntegrity, mac[:])
	SetLength(dst[start:], len(dst)-start)
	return dst
}

// integrity is HMAC-SHA1 (RFC 2104) under key over the message up to its MESSAGE-INTEGRITY, with the header's length
// as if that were the last attribute. It works on the stack: crypto/hmac would allocate for every packet.
func integrity(msg, key []byte) [sha1.Size]byte {
	var k [sha1.BlockSize]byte
	if len(key) > len(k) {
		sum := sha1.Sum(key)
		copy(k[:], sum[:])
	} else {
		copy(k[:], key)
	}
	var inner [sha1.BlockSize + MaxMessage]byte
	var outer [sha1.BlockSize + sha1.Size]byte
	for i, b := range k {
		inner[i], outer[i] = b^0x36, b^0x5c
	}
	n := sha1.BlockSize + copy(inner[sha1.BlockSize:], msg)
	SetLength(inner[sha1.BlockSize:], len(msg)+integritySize)
	sum := sha1.Sum(inner[:n])
	copy(outer[sha1.BlockSize:], sum[:])
	return sha1.Sum(outer[:])
}
