package portmap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// Layout and numbers of RFC 6887, sections 7 and 11.
const (
	pcpPort    = 5351 // of NAT-PMP, too
	pcpVersion = 2

	pcpHeader  = 24
	pcpMapData = 36
	pcpMax     = 1100 // section 7: the largest message, in bytes

	pcpAnnounce = 0
	pcpMap      = 1
	pcpResponse = 0x80

	protocolUDP = 17
)

// pcpNonce is a mapping's nonce: who knows it may change the mapping.
type pcpNonce [12]byte

// errPCP is what reading gives for bytes that are no answer to the question.
var errPCP = errors.New("not an answer to this pcp request")

// pcpResult is a result code other than success (section 7.4).
type pcpResult uint8

var pcpResults = map[pcpResult]string{
	1: "unsupported version", 2: "not authorized", 3: "malformed request", 4: "unsupported opcode", 5: "unsupported option",
	6: "malformed option", 7: "network failure", 8: "no resources", 9: "unsupported protocol", 10: "quota exceeded",
	11: "cannot provide the external address", 12: "address mismatch: there is a NAT on the way to the router", 13: "too many remote peers",
}

// Error names the result.
func (r pcpResult) Error() string {
	if text, ok := pcpResults[r]; ok {
		return "pcp: " + text
	}
	return fmt.Sprintf("pcp: result %d", uint8(r))
}

// appendPCP starts a request (section 7.1).
func appendPCP(dst []byte, opcode byte, lifetime time.Duration, self netip.Addr) []byte {
	dst = append(dst, pcpVersion, opcode, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, seconds(lifetime))
	addr := self.As16() // IPv4 as IPv4-mapped IPv6 (section 5)
	return append(dst, addr[:]...)
}

// encodeAnnounce is the smallest request there is: it changes nothing (section 14.1).
func encodeAnnounce(self netip.Addr) []byte {
	return appendPCP(make([]byte, 0, pcpHeader), pcpAnnounce, 0, self)
}

// encodeMap asks for a mapping, or with a lifetime of 0 for its end (section 11.1).
func encodeMap(r request, nonce pcpNonce) []byte {
	b := appendPCP(make([]byte, 0, pcpHeader+pcpMapData), pcpMap, r.lifetime, r.self)
	b = append(b, nonce[:]...)
	b = append(b, protocolUDP, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, r.port)
	b = binary.BigEndian.AppendUint16(b, r.wish())
	external := netip.IPv4Unspecified()
	if r.external.IsValid() {
		external = r.external.Addr()
	}
	addr := external.As16()
	return append(b, addr[:]...)
}

// readPCP reads the common header of an answer (section 7.2): any answer with the request's opcode. It gives errPCP for what
// is none, and a pcpResult where the router refuses. A NAT-PMP server refuses in its own format, which begins alike (RFC
// 6886, section 3.5).
func readPCP(b []byte, opcode byte) (lifetime time.Duration, epoch uint32, err error) {
	if len(b) >= 4 && b[0] == 0 && b[1] >= pcpResponse && binary.BigEndian.Uint16(b[2:]) == 1 {
		return 0, 0, pcpResult(1)
	}
	if len(b) < pcpHeader || len(b) > pcpMax || len(b)%4 != 0 || b[0] != pcpVersion || b[1] != opcode|pcpResponse {
		return 0, 0, errPCP
	}
	lifetime = time.Duration(binary.BigEndian.Uint32(b[4:])) * time.Second
	epoch = binary.BigEndian.Uint32(b[8:])
	if b[3] != 0 {
		err = pcpResult(b[3])
	}
	return lifetime, epoch, err
}

// readMap reads the answer to encodeMap(r, nonce) (section 11.1).
func readMap(b []byte, r request, nonce pcpNonce) (mapping, error) {
	lifetime, _, err := readPCP(b, pcpMap)
	if refused := pcpResult(0); errors.As(err, &refused) && len(b) < pcpHeader+pcpMapData {
		return mapping{}, err // some routers leave out what they refuse
	} else if errors.Is(err, errPCP) || len(b) < pcpHeader+pcpMapData {
		return mapping{}, errPCP
	}
	d := b[pcpHeader:]
	if pcpNonce(d[:12]) != nonce || d[12] != protocolUDP || binary.BigEndian.Uint16(d[16:]) != r.port {
		return mapping{}, errPCP
	}
	if err != nil {
		return mapping{}, err
	}
	addr := netip.AddrFrom16([16]byte(d[20:36])).Unmap()
	return mapping{external: netip.AddrPortFrom(addr, binary.BigEndian.Uint16(d[18:])), lifetime: lifetime}, nil
}

// seconds rounds up to what the protocols count in.
func seconds(d time.Duration) uint32 { return uint32((d + time.Second - 1) / time.Second) }
