package tunnel

import (
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// ports are those that a hard NAT maps to, both ends included. The zero value says that they are not known.
type ports struct{ low, high uint16 }

// anyPort is what a NAT maps to that has no range of its own.
var anyPort = ports{1024, 65535}

const (
	fewSamples  = 16   // mapped ports that are needed to believe in a range
	widestRange = 8192 // a wider one is as good as any port
	leastRange  = 256  // what a peer claims is widened to this: its ports are guessed, none is hammered
)

func (p ports) known() bool { return p.high != 0 }

func (p ports) size() int {
	if !p.known() {
		return 0
	}
	return int(p.high) - int(p.low) + 1
}

// reaching gives the range that was seen, or [anyPort] where it is too wide to be one.
func reaching(seen []uint16) ports {
	if len(seen) == 0 {
		return ports{}
	}
	p := ports{slices.Min(seen), slices.Max(seen)}
	if p.size() > widestRange {
		return anyPort
	}
	return p
}

// estimate gives the range that mapped ports were drawn from: the seen one, and at each end the mean gap between two samples.
// It is not known from a few.
func estimate(seen []uint16) ports {
	p := reaching(seen)
	if p == anyPort || len(seen) < fewSamples {
		return p.orUnknown()
	}
	gap := p.size()/len(seen) + 1
	return ports{uint16(max(int(p.low)-gap, 1)), uint16(min(int(p.high)+gap, 65535))}
}

// orUnknown keeps nothing but [anyPort]: few samples that lie far apart prove a wide range, and nothing proves a narrow one.
func (p ports) orUnknown() ports {
	if p == anyPort {
		return p
	}
	return ports{}
}

// sane makes of a range that the other side claims what may be tried: no privileged ports, and not few.
func (p ports) sane() ports {
	if !p.known() || p.size() > widestRange {
		return anyPort
	}
	low, high := max(int(p.low), int(anyPort.low)), max(int(p.high), int(anyPort.low))
	if short := leastRange - (high - low + 1); short > 0 {
		low = max(low-short/2, int(anyPort.low))
		high = min(low+leastRange-1, int(anyPort.high))
		low = high - leastRange + 1
	}
	return ports{uint16(low), uint16(high)}
}

// guesses gives the ports of a range in random order, all of them before any comes again.
type guesses struct {
	in    ports
	order []uint16
}

// shuffled gives all ports of a range in random order.
func (p ports) shuffled() []uint16 {
	order := make([]uint16, p.size())
	for i := range order {
		order[i] = p.low + uint16(i)
	}
	rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	return order
}

func (g *guesses) next(shuffle func(ports) []uint16) uint16 {
	if len(g.order) == 0 {
		g.order = shuffle(g.in)
	}
	port := g.order[0]
	g.order = g.order[1:]
	return port
}

// mapper is what is known of the NAT in front of the tunnel's socket. It never changes.
type mapper struct {
	mapping wire.Mapping
	ports   ports          // known where they are [anyPort] for certain
	server  netip.AddrPort // which says where it sees a socket
}

// newMapper makes it of what servers saw of the tunnel's socket. Birthdays are for IPv4, where NATs are.
func newMapper(mapping wire.Mapping, seen []nat.Observation) *mapper {
	m := &mapper{mapping: mapping}
	var mapped []uint16
	for _, o := range seen {
		if server := unmap(o.Server); server.Addr().Is4() {
			mapped = append(mapped, o.Mapped.Port())
			if !m.server.IsValid() {
				m.server = server
			}
		}
	}
	if mapping == wire.MappingHard {
		m.ports = reaching(mapped).orUnknown()
	}
	return m
}

// closedRanges are where no NAT's outer address lies: the special-purpose registry of RFC 6890 but for the documentation
// ranges, behind which nobody is, multicast, reserved addresses, and a cloud's address for its own guests.
var closedRanges = func() (list []netip.Prefix) {
	for _, p := range []string{
		"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
		"192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32",
	} {
		list = append(list, netip.MustParsePrefix(p))
	}
	return list
}()

// public reports whether a NAT's outer address can be this one.
func public(a netip.Addr) bool {
	return a.Is4() && !slices.ContainsFunc(closedRanges, func(p netip.Prefix) bool { return p.Contains(a) })
}
