package nat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// MaxMessage is the largest STUN message that is written or verified here, in bytes: above any path MTU that a check
// may be padded to.
const MaxMessage = 2048

// MaxUsername is the longest USERNAME in bytes (RFC 8489, section 14.3: less than 509).
const MaxUsername = 508

// Layout and numbers of RFC 8489, sections 5, 14 and 18.
const (
	headerSize  = 20
	attrHeader  = 4
	magicCookie = 0x2112A442

	typeBindingRequest = 0x0001
	typeBindingSuccess = 0x0101
	typeBindingError   = 0x0111

	attrMappedAddress    = 0x0001
	attrUsername         = 0x0006
	attrMessageIntegrity = 0x0008
	attrErrorCode        = 0x0009
	attrXORMappedAddress = 0x0020
	attrUseCandidate     = 0x0025 // RFC 8445, section 16.1
	attrPadding          = 0x0026 // RFC 5780, section 7.6
	attrSoftware         = 0x8022
	attrFingerprint      = 0x8028

	familyIPv4 = 0x01
	familyIPv6 = 0x02

	// attributes from here on may be ignored by who does not know them (RFC 8489, section 14)
	firstOptionalAttr = 0x8000
)

// software fills a plain request to the size of the larger answer. Unlike PADDING it is comprehension-optional, so
// every STUN server answers.
const software = "culvert path finding"

// ErrMessage is what decoding gives for bytes that are not the message that was wanted.
var ErrMessage = errors.New("not a valid stun message")

// TxID is a STUN transaction id (RFC 8489, section 5).
type TxID [12]byte

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

// messageType is the first two bytes of a message that passed [IsSTUN].
func messageType(b []byte) uint16 { return binary.BigEndian.Uint16(b) }

// transaction is the transaction id of a message that passed [IsSTUN].
func transaction(b []byte) TxID { return TxID(b[8:headerSize]) }

// attributes walks the attributes of a message that passed [IsSTUN].
type attributes struct {
	msg   []byte
	end   int    // where it ends and the next one starts
	at    int    // where the current one starts
	typ   uint16 // its type
	value []byte // its value without padding, part of msg
	bad   bool   // the message ends within an attribute
}

func walk(msg []byte) attributes { return attributes{msg: msg, end: headerSize} }

// next moves to the next attribute; false at the end of the message or where it is malformed.
func (a *attributes) next() bool {
	if a.end >= len(a.msg) {
		return false
	}
	rest := a.msg[a.end:]
	if len(rest) < attrHeader {
		a.bad = true
		return false
	}
	size := int(binary.BigEndian.Uint16(rest[2:]))
	padded := (size + 3) &^ 3
	if len(rest)-attrHeader < padded {
		a.bad = true
		return false
	}
	a.at, a.end = a.end, a.end+attrHeader+padded
	a.typ = binary.BigEndian.Uint16(rest)
	a.value = rest[attrHeader : attrHeader+size : attrHeader+size]
	return true
}

// BindingRequest encodes a plain Binding request to ask a STUN server for our reflexive address. It is as large as
// the largest answer of a [Server], which takes no smaller ones.
func BindingRequest(id TxID) []byte {
	b := appendHeader(make([]byte, 0, headerSize+attrHeader+len(software)), typeBindingRequest, id)
	b = appendAttr(b, attrSoftware, software)
	setLength(b, len(b))
	return b
}

// BindingResponse decodes a success response without MESSAGE-INTEGRITY check, as a STUN server sends it. An error
// response gives its transaction id and an error that names the server's code. Both wrap [ErrMessage] where the bytes
// are no response at all.
func BindingResponse(b []byte) (TxID, netip.AddrPort, error) {
	if !IsSTUN(b) {
		return TxID{}, netip.AddrPort{}, ErrMessage
	}
	switch messageType(b) {
	case typeBindingSuccess:
	case typeBindingError:
		return transaction(b), netip.AddrPort{}, fmt.Errorf("the stun server refused with code %d", errorCode(b))
	default:
		return TxID{}, netip.AddrPort{}, ErrMessage
	}
	mapped, ok := mappedAddress(b, true)
	if !ok {
		return transaction(b), netip.AddrPort{}, fmt.Errorf("%w: no usable mapped address", ErrMessage)
	}
	return transaction(b), mapped, nil
}

// PeekResponse gives a success response's transaction id and mapped address, unverified. It reads only what
// MESSAGE-INTEGRITY covers, so that what it gave stands once [VerifyCheck] has said yes.
func PeekResponse(b []byte) (id TxID, mapped netip.AddrPort, ok bool) {
	if !IsSTUN(b) || messageType(b) != typeBindingSuccess {
		return TxID{}, netip.AddrPort{}, false
	}
	mapped, ok = mappedAddress(b, false)
	if !ok {
		return TxID{}, netip.AddrPort{}, false
	}
	return transaction(b), mapped, true
}

// mappedAddress gives the first XOR-MAPPED-ADDRESS before MESSAGE-INTEGRITY, or, if legacy, the MAPPED-ADDRESS that
// servers of RFC 3489 send.
func mappedAddress(b []byte, legacy bool) (mapped netip.AddrPort, ok bool) {
	a, covered, found := walk(b), true, false
	for a.next() {
		switch {
		case a.typ == attrMessageIntegrity:
			covered = false
		case !covered || found:
		case a.typ == attrXORMappedAddress:
			if mapped, found = parseAddress(a.value, b[4:headerSize]); !found {
				return netip.AddrPort{}, false
			}
		case a.typ == attrMappedAddress && legacy && !mapped.IsValid():
			mapped, _ = parseAddress(a.value, make([]byte, 16))
		}
	}
	return mapped, !a.bad && mapped.IsValid()
}

// parseAddress reads an address attribute (RFC 8489, sections 14.1 and 14.2). pad is what port and address are XORed
// with: cookie and transaction id, 16 bytes.
func parseAddress(v, pad []byte) (netip.AddrPort, bool) {
	if len(v) < 4 {
		return netip.AddrPort{}, false
	}
	port := binary.BigEndian.Uint16(v[2:]) ^ binary.BigEndian.Uint16(pad)
	var addr netip.Addr
	switch {
	case v[1] == familyIPv4 && len(v) == 8:
		var ip [4]byte
		for i := range ip {
			ip[i] = v[4+i] ^ pad[i]
		}
		addr = netip.AddrFrom4(ip)
	case v[1] == familyIPv6 && len(v) == 20:
		var ip [16]byte
		for i := range ip {
			ip[i] = v[4+i] ^ pad[i]
		}
		addr = netip.AddrFrom16(ip).Unmap()
	default:
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(addr, port), true
}

// errorCode is the number in ERROR-CODE (RFC 8489, section 14.8), 0 where there is none.
func errorCode(b []byte) int {
	for a := walk(b); a.next(); {
		if a.typ == attrErrorCode && len(a.value) >= 4 {
			return int(a.value[2]&7)*100 + int(a.value[3])
		}
	}
	return 0
}

// appendHeader starts a message. Its length is set by [setLength] once it is known.
func appendHeader(dst []byte, typ uint16, id TxID) []byte {
	dst = binary.BigEndian.AppendUint16(dst, typ)
	dst = append(dst, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, magicCookie)
	return append(dst, id[:]...)
}

// setLength writes into the header of msg that the message is size bytes long in all.
func setLength(msg []byte, size int) { binary.BigEndian.PutUint16(msg[2:], uint16(size-headerSize)) }

// appendAttr appends an attribute and its padding.
func appendAttr[V string | []byte](dst []byte, typ uint16, value V) []byte {
	dst = binary.BigEndian.AppendUint16(dst, typ)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(value)))
	dst = append(dst, value...)
	for n := len(value); n%4 != 0; n++ {
		dst = append(dst, 0)
	}
	return dst
}

// appendMapped appends XOR-MAPPED-ADDRESS (RFC 8489, section 14.2). mapped must be valid.
func appendMapped(dst []byte, id TxID, mapped netip.AddrPort) []byte {
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
		return appendAttr(dst, attrXORMappedAddress, v[:])
	}
	v := [20]byte{1: familyIPv6}
	binary.BigEndian.PutUint16(v[2:], port)
	for i, o := range mapped.Addr().As16() {
		v[4+i] = o ^ pad[i]
	}
	return appendAttr(dst, attrXORMappedAddress, v[:])
}
