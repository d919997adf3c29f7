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

	attrMappedAddress    = 0x0001
	attrChangeRequest    = 0x0003 // RFC 5780, section 7.2
	attrUsername         = 0x0006
	attrXORMappedAddress = 0x0020
	attrUseCandidate     = 0x0025 // RFC 8445, section 16.1
	attrPadding          = 0x0026 // RFC 5780, section 7.6
	attrFingerprint      = 0x8028
	attrPath             = 0xC057 // our own, comprehension-optional: what a check says beside its question
	attrBehind           = 0xC058 // our own, comprehension-optional: what the sender of a check is behind
	attrHandshake        = 0xC059 // our own, comprehension-optional: a message of WireGuard's handshake
	attrTally            = 0xC05A // our own, comprehension-optional: how many packets the sender has got of those sent to it

	familyIPv4 = 0x01
	familyIPv6 = 0x02

	// attributes from here on may be ignored by who does not know them (RFC 8489, section 14)
	firstOptionalAttr = 0x8000
)

// Message and attribute types that other packages build their own messages from (RFC 8489, section 18).
const (
	TypeBindingRequest = 0x0001
	TypeBindingSuccess = 0x0101
	TypeBindingError   = 0x0111

	AttrMessageIntegrity = 0x0008
	AttrErrorCode        = 0x0009
	AttrNonce            = 0x0015
	AttrSoftware         = 0x8022
)

// software fills a plain request to the size of the larger answer. Unlike PADDING it is comprehension-optional, so
// every STUN server answers.
const software = "culvert path finding"

// ErrMessage is what decoding gives for bytes that are not the message that was wanted.
var ErrMessage = errors.New("not a valid stun message")

// TxID is a STUN transaction id (RFC 8489, section 5).
type TxID [12]byte

// BindingRequest encodes a plain Binding request to ask a STUN server for our reflexive address. It is as large as
// the largest answer of a [Server], which takes no smaller ones.
func BindingRequest(id TxID) []byte {
	b := AppendHeader(make([]byte, 0, headerSize+attrHeader+len(software)), TypeBindingRequest, id)
	b = AppendAttr(b, AttrSoftware, software)
	SetLength(b, len(b))
	return b
}

// PaddedRequest is a plain Binding request of size bytes, at most [MaxMessage], to find out whether packets of that size pass.
// It is padded by SOFTWARE over and over, of which servers read the first, because many refuse PADDING (RFC 5780).
// Where size is no multiple of four or too small, it comes as close from below as it can.
func PaddedRequest(id TxID, size int) []byte {
	const most = 512 // SOFTWARE has less than 763 bytes (RFC 8489, section 14.14)
	size = min(size, MaxMessage) &^ 3
	var blank [most]byte
	b := AppendHeader(make([]byte, 0, max(size, headerSize)), TypeBindingRequest, id)
	for len(b)+attrHeader <= size {
		b = AppendAttr(b, AttrSoftware, blank[:min(size-len(b)-attrHeader, most)])
	}
	SetLength(b, len(b))
	return b
}

// Changes that a [ChangeRequest] can ask for.
const (
	changePort = 0x2
	changeAddr = 0x4
)

// ChangeRequest is a Binding request that is to be answered from another port (RFC 5780, section 7.2) if port is set, and
// else as usual. A server that does not know the attribute does not answer, or with an error.
func ChangeRequest(id TxID, port bool) []byte {
	var flags [4]byte
	if port {
		flags[3] = changePort
	}
	b := AppendHeader(make([]byte, 0, 2*headerSize+2*attrHeader+4), TypeBindingRequest, id)
	b = AppendAttr(b, attrChangeRequest, flags[:])
	b = AppendAttr(b, AttrSoftware, software)
	SetLength(b, len(b))
	return b
}

// BindingResponse decodes a success response without MESSAGE-INTEGRITY check, as a STUN server sends it. An error
// response gives its transaction id and an error that names the server's code. Both wrap [ErrMessage] where the bytes
// are no response at all.
func BindingResponse(b []byte) (TxID, netip.AddrPort, error) {
	if !IsSTUN(b) {
		return TxID{}, netip.AddrPort{}, ErrMessage
	}
	switch MessageType(b) {
	case TypeBindingSuccess:
	case TypeBindingError:
		return Transaction(b), netip.AddrPort{}, fmt.Errorf("the stun server refused with code %d", ErrorCode(b))
	default:
		return TxID{}, netip.AddrPort{}, ErrMessage
	}
	mapped, ok := mappedAddress(b, true)
	if !ok {
		return Transaction(b), netip.AddrPort{}, fmt.Errorf("%w: no usable mapped address", ErrMessage)
	}
	return Transaction(b), mapped, nil
}

// PeekResponse gives a success response's transaction id and mapped address, unverified. It reads only what
// MESSAGE-INTEGRITY covers, so that what it gave stands once [VerifyCheck] has said yes.
func PeekResponse(b []byte) (id TxID, mapped netip.AddrPort, ok bool) {
	if !IsSTUN(b) || MessageType(b) != TypeBindingSuccess {
		return TxID{}, netip.AddrPort{}, false
	}
	mapped, ok = mappedAddress(b, false)
	if !ok {
		return TxID{}, netip.AddrPort{}, false
	}
	return Transaction(b), mapped, true
}

// MappedAddress gives the first XOR-MAPPED-ADDRESS of a message that passed [IsSTUN], if it stands before
// MESSAGE-INTEGRITY.
func MappedAddress(b []byte) (netip.AddrPort, bool) { return mappedAddress(b, false) }

// mappedAddress gives the first XOR-MAPPED-ADDRESS before MESSAGE-INTEGRITY, or, if legacy, the MAPPED-ADDRESS that
// servers of RFC 3489 send.
func mappedAddress(b []byte, legacy bool) (mapped netip.AddrPort, ok bool) {
	a, covered, found := Walk(b), true, false
	for a.Next() {
		switch {
		case a.Type == AttrMessageIntegrity:
			covered = false
		case !covered || found:
		case a.Type == attrXORMappedAddress:
			if mapped, found = parseAddress(a.Value, b[4:headerSize]); !found {
				return netip.AddrPort{}, false
			}
		case a.Type == attrMappedAddress && legacy && !mapped.IsValid():
			mapped, _ = parseAddress(a.Value, make([]byte, 16))
		}
	}
	return mapped, !a.Bad && mapped.IsValid()
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

// ErrorCode is the number in ERROR-CODE (RFC 8489, section 14.8) of a message that passed [IsSTUN], 0 where there is
// none.
func ErrorCode(b []byte) int {
	for a := Walk(b); a.Next(); {
		if a.Type == AttrErrorCode && len(a.Value) >= 4 {
			return int(a.Value[2]&7)*100 + int(a.Value[3])
		}
	}
	return 0
}
