package policy

import "net/netip"

// Prefixes whose IPv6 addresses stand for IPv4 ones: a host or router may deliver a packet for such an address to the
// IPv4 address inside. (The IPv4-mapped prefix is not among them: a mapped address is the IPv4 address to every socket,
// so it is judged as that alone.) Network-specific NAT64 prefixes (RFC 6052) cannot be known.
var (
	compatible = netip.MustParsePrefix("::/96")           // IPv4-compatible, RFC 4291 2.5.5.1
	translated = netip.MustParsePrefix("::ffff:0:0:0/96") // IPv4-translated, RFC 2765
	nat64      = netip.MustParsePrefix("64:ff9b::/96")    // well-known NAT64, RFC 6052
	nat64Local = netip.MustParsePrefix("64:ff9b:1::/48")  // local-use NAT64, RFC 8215
	sixToFour  = netip.MustParsePrefix("2002::/16")       // RFC 3056
	teredo     = netip.MustParsePrefix("2001::/32")       // RFC 4380
)

// inner holds the IPv4 addresses inside one IPv6 address, without allocating.
type inner struct {
	addrs [4]netip.Addr
	n     int
}

func (in *inner) add(a, b, c, d byte) {
	in.addrs[in.n] = netip.AddrFrom4([4]byte{a, b, c, d})
	in.n++
}

// embedded lists every IPv4 address that addr may stand for.
func embedded(addr netip.Addr) (in inner) {
	if !addr.Is6() {
		return in
	}
	b := addr.As16()
	switch {
	case compatible.Contains(addr):
		if addr != netip.IPv6Unspecified() && addr != netip.IPv6Loopback() {
			in.add(b[12], b[13], b[14], b[15])
		}
	case translated.Contains(addr), nat64.Contains(addr):
		in.add(b[12], b[13], b[14], b[15])
	case nat64Local.Contains(addr):
		in.addLocalUse(b)
	case sixToFour.Contains(addr):
		in.add(b[2], b[3], b[4], b[5])
	case teredo.Contains(addr):
		in.add(b[4], b[5], b[6], b[7])         // the server
		in.add(^b[12], ^b[13], ^b[14], ^b[15]) // the client, every bit flipped
	}
	return in
}

// addLocalUse adds what a translator may read from an address of the local-use prefix. It may use any length from /48 to
// /96 (RFC 6052, 2.2), which the address does not show, so every reading counts; those shorter than /96 only where they
// are no address of 0.0.0.0/8, which is what the zeros of a longer prefix give.
func (in *inner) addLocalUse(b [16]byte) {
	in.add(b[12], b[13], b[14], b[15])
	for _, at := range [3][4]int{{6, 7, 9, 10}, {7, 9, 10, 11}, {9, 10, 11, 12}} {
		if b[at[0]] != 0 {
			in.add(b[at[0]], b[at[1]], b[at[2]], b[at[3]])
		}
	}
}
