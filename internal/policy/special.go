package policy

import "net/netip"

// closedRange is a range that no wider grant opens.
type closedRange struct {
	prefix netip.Prefix
	reason string
	local  bool // the gateway's own policy has to name the exact address too
}

// NotGranted begins the reason of what an allow line would open. What has another reason is closed, whatever a grant says.
const NotGranted = "not granted"

// Why an address is closed, in words for the job's owner.
const (
	reasonMetadata    = "cloud metadata address"
	reasonLinkLocal   = "link-local address"
	reasonLoopback    = "loopback address"
	reasonMulticast   = "multicast address"
	reasonUnspecified = "unspecified address"
	reasonBroadcast   = "broadcast address"
	reasonOwn         = "the gateway's own address"
	reasonOverlay     = "another session's address"
	reasonNotGranted  = NotGranted
	reasonMalformed   = "not an address that a flow can go to"
)

func closed(reason string, local bool, prefixes ...string) []closedRange {
	out := make([]closedRange, 0, len(prefixes))
	for _, p := range prefixes {
		out = append(out, closedRange{prefix: netip.MustParsePrefix(p), reason: reason, local: local})
	}
	return out
}

// closedRanges are all of them; the first that holds an address names the reason, so metadata comes before the ranges
// that it lies in.
var closedRanges = concat(
	closed(reasonMetadata, true,
		"169.254.169.254/32",   // AWS, Azure, Google Cloud, OpenStack, Oracle, DigitalOcean, Hetzner and others
		"169.254.169.253/32",   // AWS resolver
		"169.254.170.2/32",     // AWS ECS task credentials
		"169.254.170.23/32",    // AWS EKS pod identity
		"169.254.0.23/32",      // Tencent Cloud
		"169.254.42.42/32",     // Scaleway
		"168.63.129.16/32",     // Azure's wire server and resolver
		"100.100.100.200/32",   // Alibaba Cloud
		"192.0.0.192/32",       // Oracle Cloud, classic
		"fd00:ec2::/64",        // AWS: metadata (::254), resolver (::253), EKS pod identity (::23)
		"fd20:ce::254/128",     // Google Cloud
		"fd00:42::42/128",      // Scaleway
		"fe80::a9fe:a9fe/128",  // OpenStack
		"fe80::a9fe:a9fd/128"), // the same for its resolver
	closed(reasonLinkLocal, false, "169.254.0.0/16", "fe80::/10"), // RFC 3927, RFC 4291
	closed(reasonLoopback, true, "127.0.0.0/8", "::1/128"),        // RFC 1122, RFC 4291
	closed(reasonMulticast, true, "224.0.0.0/4", "ff00::/8"),      // RFC 5771, RFC 4291
	closed(reasonUnspecified, true, "0.0.0.0/8", "::/128"),        // RFC 1122 3.2.1.3: a socket may take it for this host
	closed(reasonBroadcast, true, "255.255.255.255/32"),           // RFC 919
)

func concat(lists ...[]closedRange) []closedRange {
	var out []closedRange
	for _, l := range lists {
		out = append(out, l...)
	}
	return out
}

// closedBy gives the range that closes an address, nil where none does.
func closedBy(addr netip.Addr) *closedRange {
	for i := range closedRanges {
		if closedRanges[i].prefix.Contains(addr) {
			return &closedRanges[i]
		}
	}
	return nil
}

// notPublic4 is what `internet` leaves out of IPv4: the IANA IPv4 Special-Purpose Address Registry (RFC 6890, updated by
// RFC 8190), except the blocks that it lists as globally reachable (AS112 and AMT), and multicast.
var notPublic4 = prefixes(
	"0.0.0.0/8",       // this network, RFC 791
	"10.0.0.0/8",      // private, RFC 1918
	"100.64.0.0/10",   // shared, RFC 6598
	"127.0.0.0/8",     // loopback, RFC 1122
	"169.254.0.0/16",  // link-local, RFC 3927
	"172.16.0.0/12",   // private, RFC 1918
	"192.0.0.0/24",    // IETF protocol assignments, RFC 6890
	"192.0.2.0/24",    // documentation, RFC 5737
	"192.88.99.0/24",  // former 6to4 relays, RFC 7526
	"192.168.0.0/16",  // private, RFC 1918
	"198.18.0.0/15",   // benchmarking, RFC 2544
	"198.51.100.0/24", // documentation, RFC 5737
	"203.0.113.0/24",  // documentation, RFC 5737
	"224.0.0.0/4",     // multicast, RFC 5771
	"240.0.0.0/4",     // reserved and broadcast, RFC 1112, RFC 919
)

// global6 is what IANA hands out as global unicast (RFC 4291, IPv6 Global Unicast Address Assignments). Everything
// outside is special, unique-local, link-local, multicast or unassigned.
var global6 = netip.MustParsePrefix("2000::/3")

// notPublic6 is what `internet` leaves out of global6: the IANA IPv6 Special-Purpose Address Registry (RFC 6890).
var notPublic6 = prefixes(
	"2001::/23",     // IETF protocol assignments: Teredo, benchmarking, ORCHID and others, RFC 2928
	"2001:db8::/32", // documentation, RFC 3849
	"2002::/16",     // 6to4, which wraps IPv4, RFC 3056
	"3fff::/20",     // documentation, RFC 9637
)

func prefixes(list ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(list))
	for i, s := range list {
		out[i] = netip.MustParsePrefix(s)
	}
	return out
}

// isPublic tells whether `internet` covers an address.
func isPublic(addr netip.Addr) bool {
	if addr.Is4() {
		return !contains(notPublic4, addr)
	}
	return global6.Contains(addr) && !contains(notPublic6, addr)
}

func contains(list []netip.Prefix, addr netip.Addr) bool {
	for i := range list {
		if list[i].Contains(addr) {
			return true
		}
	}
	return false
}
