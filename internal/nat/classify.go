package nat

import (
	"net/netip"
	"slices"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// Observation is what one STUN server saw of one of our sockets. Only observations of the same socket can be compared.
type Observation struct {
	Server netip.AddrPort
	Mapped netip.AddrPort
	RTT    time.Duration // of the answer's round trip, 0 where it was not measured
}

// Dependence says what a NAT's mapping, or its filter, depends on (RFC 4787, sections 4.1 and 5; RFC 5780, section 4).
type Dependence string

// The dependences, and that nothing is known.
const (
	DependenceUnknown       Dependence = ""
	EndpointIndependent     Dependence = "endpoint-independent"
	AddressDependent        Dependence = "address-dependent"
	AddressAndPortDependent Dependence = "address-and-port-dependent"
)

// Behaviour is what the observations of one socket tell about the NAT in front of it.
type Behaviour struct {
	// Mapping is easy or hard where at least two destinations have answered, or where there is no NAT; else unknown.
	Mapping wire.Mapping
	// Dependence refines Mapping. Where all destinations share one address, a mapping that depends on the address alone
	// looks endpoint-independent.
	Dependence Dependence
	// Public is the mapped address that was seen, by the first server where they differ.
	Public netip.AddrPort
	// Direct says that Public is an address of this host itself: there is no NAT.
	Direct bool
	// Destinations is the number of different destinations that were compared, Addresses that of their addresses.
	Destinations, Addresses int
}

// Classify compares what servers saw of one socket. own are the socket's addresses on this host's interfaces, by which it
// tells that there is no NAT. Where a server is listed twice, what it saw last counts. IPv4 decides, because that is where
// NATs are; observations over IPv6 are judged only where there are no others.
func Classify(observations []Observation, own []netip.AddrPort) Behaviour {
	seen := latest(observations, true)
	if len(seen) == 0 {
		seen = latest(observations, false)
	}
	if len(seen) == 0 {
		return Behaviour{}
	}
	b := Behaviour{Public: seen[0].Mapped, Destinations: len(seen), Addresses: addresses(seen)}
	b.Direct = !slices.ContainsFunc(seen, func(o Observation) bool { return !slices.Contains(own, o.Mapped) })
	if b.Dependence = dependence(seen); b.Dependence == DependenceUnknown && b.Direct {
		b.Dependence = EndpointIndependent
	}
	switch b.Dependence {
	case DependenceUnknown:
	case EndpointIndependent:
		b.Mapping = wire.MappingEasy
	default:
		b.Mapping = wire.MappingHard
	}
	return b
}

// latest keeps the last valid observation of each server of one address family, in the order in which the servers first
// appear.
func latest(in []Observation, v4 bool) []Observation {
	var out []Observation
	for _, o := range in {
		o.Server, o.Mapped = plain(o.Server), plain(o.Mapped)
		if !o.Server.IsValid() || !o.Mapped.IsValid() || o.Server.Addr().Is4() != v4 {
			continue
		}
		if i := slices.IndexFunc(out, func(e Observation) bool { return e.Server == o.Server }); i >= 0 {
			out[i] = o
		} else {
			out = append(out, o)
		}
	}
	return out
}

// dependence compares every pair of destinations.
func dependence(seen []Observation) Dependence {
	if len(seen) < 2 {
		return DependenceUnknown
	}
	result := EndpointIndependent
	for i, a := range seen {
		for _, b := range seen[i+1:] {
			switch {
			case a.Mapped == b.Mapped:
			case a.Server.Addr() == b.Server.Addr():
				return AddressAndPortDependent
			default:
				result = AddressDependent
			}
		}
	}
	return result
}

func addresses(seen []Observation) int {
	set := map[netip.Addr]struct{}{}
	for _, o := range seen {
		set[o.Server.Addr()] = struct{}{}
	}
	return len(set)
}

// plain gives an IPv4 address as such where a dual-stack socket shows it as IPv6.
func plain(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
