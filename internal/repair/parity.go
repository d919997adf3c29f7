package repair

import (
	"crypto/subtle"
	"encoding/binary"
)

const (
	// MinGroup and MaxGroup are how many packets a parity may cover. This side fills groups of [GroupSize].
	MinGroup = 1
	MaxGroup = 8
	// GroupSize is how many packets a full group has: a fifth is added, and of 1 % of loss 0.05 % are left.
	GroupSize = 5
	// MaxPacket is the longest packet that is covered, in bytes.
	MaxPacket = 1500

	transportType = 4  // of WireGuard's transport messages
	parityType    = 5  // of parities
	headerSize    = 16 // of both
	minPacket     = 32 // a keepalive: header and tag
)

// IsParity recognises a parity packet by its form.
func IsParity(pkt []byte) bool {
	return len(pkt) >= minPacket && len(pkt) <= MaxPacket && pkt[0] == parityType && pkt[1] >= MinGroup && pkt[1] <= MaxGroup
}

// IsTransport recognises a WireGuard transport message by its form.
func IsTransport(pkt []byte) bool {
	return len(pkt) >= minPacket && binary.LittleEndian.Uint32(pkt) == transportType
}

// index is the receiver's index of a transport message or a parity: it tells keys apart.
func index(pkt []byte) uint32 { return binary.LittleEndian.Uint32(pkt[4:]) }

// counter is the counter of a transport message, or the first one that a parity covers.
func counter(pkt []byte) uint64 { return binary.LittleEndian.Uint64(pkt[8:]) }

// coverage is what a parity says it covers: the counters from base on, before end.
type coverage struct {
	base, end uint64
	lengths   uint16 // of all packets, combined by exclusive or
}

// read gives what a parity says; false where it cannot be.
func read(pkt []byte) (c coverage, ok bool) {
	if !IsParity(pkt) {
		return c, false
	}
	c.base, c.lengths = counter(pkt), binary.BigEndian.Uint16(pkt[2:])
	c.end = c.base + uint64(pkt[1])
	return c, c.end > c.base
}

// putHeader writes a parity's header.
func putHeader(dst []byte, idx uint32, base uint64, n int, lengths uint16) {
	dst[0], dst[1] = parityType, byte(n)
	binary.BigEndian.PutUint16(dst[2:], lengths)
	binary.LittleEndian.PutUint32(dst[4:], idx)
	binary.LittleEndian.PutUint64(dst[8:], base)
}

// putTransport writes the header of the transport message that was rebuilt.
func putTransport(dst []byte, idx uint32, count uint64) {
	binary.LittleEndian.PutUint32(dst, transportType)
	binary.LittleEndian.PutUint32(dst[4:], idx)
	binary.LittleEndian.PutUint64(dst[8:], count)
}

// mix adds what follows a packet's header to an accumulator.
func mix(acc, pkt []byte) {
	body := pkt[headerSize:]
	subtle.XORBytes(acc[headerSize:], acc[headerSize:headerSize+len(body)], body)
}
