package lab

import "net/netip"

// Kind is what stands between a private network and the internet: how it maps and filters (RFC 4787, sections 4 and 5),
// and what it lets out at all. Each kind is a list of rules, so that a further one is a line.
type Kind struct {
	name  string
	rules func(*rules)             // in place before there is any host
	first func(*rules, netip.Addr) // further rules once the first host behind it is known
	// public says that the first host behind it has a public address of its own.
	public bool
}

// The kinds. A NAT that keeps ports is endpoint-independent in its mapping for as long as ports do not collide.
var (
	// Open is a router, not a NAT: the first host behind it has a public address and anybody may send there. Further hosts are
	// behind an easy NAT's mapping.
	Open = Kind{name: "open", rules: (*rules).masquerade, public: true}
	// FullCone is a NAT with the first host behind it exposed: anybody may send to its mapping.
	FullCone = Kind{name: "full cone", rules: (*rules).masquerade, first: (*rules).forwardAll}
	// Restricted maps as Easy does, and lets in from every port of an address that a socket of the first host has sent to.
	Restricted = Kind{name: "address-restricted", rules: func(r *rules) { r.masquerade(); r.noteTargets(); r.dropStrangers() },
		first: (*rules).forwardNoted}
	// Easy keeps one mapping for all destinations and filters by address and port.
	Easy = Kind{name: "easy", rules: func(r *rules) { r.masquerade(); r.dropStrangers() }}
	// Hard gives every destination another port, at random (symmetric), and filters by address and port.
	Hard = Kind{name: "hard", rules: func(r *rules) { r.masqueradeRandom(); r.dropStrangers() }}
	// CarrierGrade is Hard with a thousand ports for all destinations together, as a carrier gives each customer.
	CarrierGrade = Kind{name: "carrier-grade", rules: func(r *rules) { r.masqueradeRange(30000, 30999); r.dropStrangers() }}
	// NoUDP is Easy for TCP and lets no UDP pass.
	NoUDP = Kind{name: "no UDP", rules: func(r *rules) { r.onlyTCP(); r.masquerade(); r.dropStrangers() }}
	// OnlyHTTPS is Easy for TCP to port 443 and lets nothing else out.
	OnlyHTTPS = Kind{name: "only TCP 443", rules: func(r *rules) { r.onlyHTTPS(); r.masquerade(); r.dropStrangers() }}
	// OnlyProxy lets nothing out but TCP to port 443 from hosts with [HostOptions.Proxy].
	OnlyProxy = Kind{name: "only a proxy", rules: func(r *rules) { r.onlyProxy(); r.masquerade(); r.dropStrangers() }}
)

// Kinds lists all kinds, from the most open to the most closed.
func Kinds() []Kind {
	return []Kind{Open, FullCone, Restricted, Easy, Hard, CarrierGrade, NoUDP, OnlyHTTPS, OnlyProxy}
}

// String is the kind's name.
func (k Kind) String() string { return k.name }

// Is reports whether two kinds are the same.
func (k Kind) Is(other Kind) bool { return k.name == other.name }

// UDP reports whether any UDP passes.
func (k Kind) UDP() bool {
	return k.name != NoUDP.name && k.name != OnlyHTTPS.name && k.name != OnlyProxy.name
}
