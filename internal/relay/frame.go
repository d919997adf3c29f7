package relay

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
)

// Sizes of frames in bytes.
const (
	FrameHeader = 4
	MaxFrame    = 9216 // above any path MTU in use, jumbo frames included
)

// Channel names a session in a frame: 28 bits.
type Channel uint32

// frameNibble is what a frame's first byte starts with: TURN channels are 0x4000 to 0x4FFF (RFC 7983, section 7), and
// neither WireGuard nor STUN starts with it.
const frameNibble = 0x4 << 28

// SessionSize is the size of a session id in bytes; in text it is 22 characters of base64url.
const SessionSize = 16

// ParseSession decodes a session id.
func ParseSession(session string) (raw [SessionSize]byte, err error) {
	if len(session) != base64.RawURLEncoding.EncodedLen(SessionSize) {
		return raw, fmt.Errorf("a session id has 22 characters, this one has %d", len(session))
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(session)
	if err != nil {
		return raw, fmt.Errorf("a session id is base64url: %w", err)
	}
	return [SessionSize]byte(b), nil
}

// ChannelOf gives the channel of a session: the first 28 bits of its id, so that nobody has to be asked for it.
func ChannelOf(session string) (Channel, error) {
	raw, err := ParseSession(session)
	return channelOf(raw), err
}

func channelOf(session [SessionSize]byte) Channel {
	return Channel(binary.BigEndian.Uint32(session[:]) >> 4)
}

// PutHeader writes a frame's header into the first [FrameHeader] bytes of b.
func PutHeader(b []byte, c Channel) { binary.BigEndian.PutUint32(b, frameNibble|uint32(c)) }

// IsFrame reports whether a datagram is a frame with a packet in it, by its first bits and its size.
func IsFrame(b []byte) bool {
	return len(b) > FrameHeader && len(b) <= MaxFrame && b[0]>>4 == frameNibble>>28
}

// ParseFrame splits a frame. The packet is part of b.
func ParseFrame(b []byte) (c Channel, packet []byte, ok bool) {
	if !IsFrame(b) {
		return 0, nil, false
	}
	return channelIn(b), b[FrameHeader:], true
}

// channelIn is the channel of what [IsFrame] has taken.
func channelIn(b []byte) Channel { return Channel(binary.BigEndian.Uint32(b) &^ (0xF << 28)) }
