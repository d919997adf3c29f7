package netstack

import (
	"encoding/binary"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"pgregory.net/rapid"
)

// TestMarkFragmentable: what may be fragmented is marked and nothing else is touched; the header's checksum stays right.
func TestMarkFragmentable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		field := rapid.Uint16().Draw(t, "flags and offset")
		options := rapid.IntRange(0, 10).Draw(t, "options") * 4
		p := make([]byte, ipv4Len+options+8)
		p[0], p[8], p[9] = byte(4<<4|len(p[:ipv4Len+options])/4), rapid.ByteMin(1).Draw(t, "ttl"), uint8(header.UDPProtocolNumber)
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		binary.BigEndian.PutUint16(p[6:], field)
		binary.BigEndian.PutUint16(p[10:], ^checksum.Checksum(p[:ipv4Len+options], 0))
		before := append([]byte(nil), p...)
		markFragmentable(p, ipv4Len+options)
		if want := field&0x4000 == 0 || field&0x3fff != 0; MayBeFragmented(p) != want {
			t.Fatalf("%#x: %v", field, !want)
		} else if !want && string(p) != string(before) {
			t.Fatal("a packet that must stay whole was changed")
		}
		if checksum.Checksum(p[:ipv4Len+options], 0) != 0xffff {
			t.Fatal("the checksum is wrong")
		}
		p[8], p[10], p[11] = before[8], before[10], before[11]
		if string(p) != string(before) {
			t.Fatal("more than the TTL was changed")
		}
	})
	whole, fragment := make([]byte, ipv6Len+8), make([]byte, ipv6Len+8)
	whole[0], whole[6], whole[7] = 6<<4, uint8(header.UDPProtocolNumber), 64
	fragment[0], fragment[6], fragment[7] = 6<<4, uint8(header.IPv6FragmentExtHdrIdentifier), 64
	markFragmentable(whole, ipv6Len)
	markFragmentable(fragment, ipv6Len)
	if MayBeFragmented(whole) || !MayBeFragmented(fragment) || MayBeFragmented(nil) {
		t.Error("in IPv6 fragments alone may be fragmented")
	}
}
