package nat

import (
	"encoding/binary"
	"net/netip"
)

// IsSTUN reports whether a datagram looks like a STUN message (RFC 8489, section 5): two zero bits, magic cookie, and
// a length that is a multiple of four and accounts for the whole datagram. No WireGuard message passes: its first
// four bytes would be a message without attributes, and it is longer than that.
func IsSTUN(b []byte) bool {
	return len(b) >= headerSize &&
		b[0]&0xC0 == 0 &&
		binary.BigEndian.Uint32(b[4:]) == magicCookie &&
		len(b)%4 == 0 &&
		int(binary.BigEndian.Uint16(b[2:])) == len(b)-headerSize
}

// MessageType is the type, method and class together, of a message that passed [IsSTUN].
func MessageType(b []byte) uint16 { return binary.BigEndian.Uint16(b) }

// Transaction is the transaction id of a message that passed [IsSTUN].
func Transaction(b []byte) TxID { return TxID(b[8:headerSize]) }

// Attributes walks the attributes of a message: see [Walk].
type Attributes struct {
	Type  uint16 // of the current attribute
	Value []byte // its value without padding, part of the message
	Bad   bool   // the message ends within an attribute

	msg []byte
	end int // where the current attribute ends and the next one starts
	at  int // where it starts
}

// Walk starts before the first attribute of a message that passed [IsSTUN].
func Walk(msg []byte) Attributes { return Attributes{msg: msg, end: headerSize} }

// Next moves to the next attribute; false at the end of the message or where it is malformed.
func (a *Attributes) Next() bool {
	if a.end >= len(a.msg) {
		return false
	}
	rest := a.msg[a.end:]
	if len(rest) < attrHeader {
		a.Bad = true
		return false
	}
	size := int(binary.BigEndian.Uint16(rest[2:]))
	padded := (size + 3) &^ 3
	if len(rest)-attrHeader < padded {
		a.Bad = true
		return false
	}
	a.at, a.end = a.end, a.end+attrHeader+padded
	a.Type = binary.BigEndian.Uint16(rest)
	a.Value = rest[attrHeader : attrHeader+size : attrHeader+size]
	return true
}

// AppendHeader starts a message. Its length is set by [SetLength] once it is known.
func AppendHeader(dst []byte, typ uint16, id TxID) []byte {
	dst = binary.BigEndian.AppendUint16(dst, typ)
	dst = append(dst, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, magicCookie)
	return append(dst, id[:]...)
}

// SetLength writes into the header of msg that the message is size bytes long in all.
func SetLength(msg []byte, size int) { binary.BigEndian.PutUint16(msg[2:], uint16(size-headerSize)) }

// AppendAttr appends an attribute and its padding.
func AppendAttr[V string | []byte](dst []byte, typ uint16, value V) []byte {
	dst = binary.BigEndian.AppendUint16(dst, typ)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(value)))
	dst = append(dst, value...)
	for n := len(value); n%4 != 0; n++ {
		dst = append(dst, 0)
	}
	return dst
}

// AppendMapped appends XOR-MAPPED-ADDRESS (RFC 8489, section 14.2). mapped must be valid.
func AppendMapped(dst []byte, id TxID, mapped netip.AddrPort) []byte {
	var pad [16]byte
	binary.BigEndian.PutUint32(pad[:], magicCookie)
	copy(pad[4:], id[:])
	port := mapped.Port() ^ magicCookie>>16
	if addr := mapped.Addr().Unmap(); addr.Is4() {
		v := [8]byte{1: familyIPv4}
		binary.BigEndian.PutUint16(v[2:], port)
		for i, o := range addr.As4() {
			v[4+i] = o ^ pad[i]
		}
		return AppendAttr(dst, attrXORMappedAddress, v[:])
	}
	v := [20]byte{1: familyIPv6}
	binary.BigEndian.PutUint16(v[2:], port)
	for i, o := range mapped.Addr().As16() {
		v[4+i] = o ^ pad[i]
	}
	return AppendAttr(dst, attrXORMappedAddress, v[:])
}
