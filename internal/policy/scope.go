package policy

import (
	"net/netip"
	"slices"
)

// Flow is one flow that a session wants to open. Dst's port is 0 for ICMP.
type Flow struct {
	Proto Proto
	Dst   netip.AddrPort
}

// Verdict is what the grants say to a flow.
type Verdict struct {
	Allowed  bool
	Observed bool   // allowed by an observe line alone, of the coordinator's policy or of the gateway's own
	Rule     string // the rule that allows it
	Reason   string // why not, for the job's owner: "not granted", "link-local address", …
}

// Scope is what a gateway holds a flow against.
type Scope struct {
	Offered *Grant                // what the coordinator's policy gives
	Local   *Grant                // what the gateway's own policy gives; nil where it has none
	Own     func(netip.Addr) bool // the gateway's own addresses, interfaces included; nil means none
	Overlay []netip.Prefix        // sessions' and services' ranges; never reachable
}

// Decide holds one flow against a session's scope. It is the only place where a flow is allowed. It does not allocate.
//
// A flow needs a line of Offered and, where there is one, a line of Local. Besides:
//
//   - Addresses of the overlay are never reachable.
//   - Link-local addresses are reachable only where the lines name that exact address.
//   - Loopback, cloud metadata, multicast, unspecified and broadcast addresses and the gateway's own are reachable only
//     where, in addition, the gateway has a policy of its own, so that a hostile coordinator opens none of them.
//   - An IPv4-mapped address is the IPv4 address. Any other IPv6 address that stands for an IPv4 one (NAT64, 6to4,
//     Teredo, IPv4-compatible, IPv4-translated) has to be allowed in both spellings.
func (s *Scope) Decide(f Flow) Verdict {
	addr := f.Dst.Addr().Unmap()
	if !f.wellFormed() {
		return Verdict{Reason: reasonMalformed}
	}
	v := s.decide(f.Proto, addr, f.Dst.Port())
	if !v.Allowed || !addr.Is6() {
		return v
	}
	in := embedded(addr)
	for _, a := range in.addrs[:in.n] {
		w := s.decide(f.Proto, a, f.Dst.Port())
		if !w.Allowed {
			return w
		}
		v.Observed = v.Observed || w.Observed
	}
	return v
}

// wellFormed refuses flows that no line can mean: no address, a zone (which would pick an interface of the gateway),
// several protocols or none, port 0.
func (f Flow) wellFormed() bool {
	if addr := f.Dst.Addr(); !addr.IsValid() || addr.Zone() != "" {
		return false
	}
	switch f.Proto {
	case TCP, UDP:
		return f.Dst.Port() != 0
	case ICMP:
		return true
	}
	return false
}

// decide judges one spelling of the address.
func (s *Scope) decide(proto Proto, addr netip.Addr, port uint16) Verdict {
	if contains(s.Overlay, addr) {
		return Verdict{Reason: reasonOverlay}
	}
	reason, local := s.closed(addr)
	exact := reason != ""
	if !exact {
		reason = reasonNotGranted
	}
	rule, observed, ok := s.Offered.look(proto, addr, port, exact)
	if !ok || local && s.Local == nil {
		return Verdict{Reason: reason}
	}
	if s.Local != nil {
		_, also, ok := s.Local.look(proto, addr, port, exact)
		if !ok {
			return Verdict{Reason: reason}
		}
		observed = observed || also
	}
	return Verdict{Allowed: true, Observed: observed, Rule: rule}
}

// closed gives why only an exact line opens an address, "" where any line does, and whether the gateway's own policy has
// to have one too.
func (s *Scope) closed(addr netip.Addr) (reason string, local bool) {
	if s.Own != nil && s.Own(addr) {
		return reasonOwn, true
	}
	if c := closedBy(addr); c != nil {
		return c.reason, c.local
	}
	return "", false
}

// DecideName holds a flow to a name, which the gateway has resolved to f.Dst, against a session's scope. It does not
// allocate. The name is canonical, see [CanonicalName].
//
// Offered has to have a line by name for it, and Local, where there is one, a line by name or by address. A line by name
// never opens an address that is closed (see [Scope.Decide]): DNS is in other hands than the policy. Only lines that name
// the exact address do.
func (s *Scope) DecideName(name string, f Flow) Verdict {
	addr := f.Dst.Addr().Unmap()
	if !f.wellFormed() {
		return Verdict{Reason: reasonMalformed}
	}
	v := s.decideName(name, f.Proto, addr, f.Dst.Port())
	if !v.Allowed || !addr.Is6() {
		return v
	}
	in := embedded(addr)
	for _, a := range in.addrs[:in.n] {
		w := s.decideName(name, f.Proto, a, f.Dst.Port())
		if !w.Allowed {
			return w
		}
		v.Observed = v.Observed || w.Observed
	}
	return v
}

// decideName judges one spelling of the address.
func (s *Scope) decideName(name string, proto Proto, addr netip.Addr, port uint16) Verdict {
	rule, ok := s.Offered.findName(proto, name, port)
	if !ok {
		return Verdict{Reason: reasonNotGranted}
	}
	if contains(s.Overlay, addr) {
		return Verdict{Reason: reasonOverlay}
	}
	if reason, _ := s.closed(addr); reason != "" {
		return s.decide(proto, addr, port)
	}
	v := Verdict{Allowed: true, Rule: rule}
	if s.Local != nil {
		if _, byName := s.Local.findName(proto, name, port); byName {
			return v
		}
		if _, v.Observed, ok = s.Local.look(proto, addr, port, false); !ok {
			return Verdict{Reason: reasonNotGranted}
		}
	}
	return v
}

// Names are the names that a session may ask for, sorted: exact ones, and domains of which every name below is granted but
// not the domain itself. A name that the gateway's own policy covers neither by name nor, possibly, by address is left out.
func (s *Scope) Names() (exact, below []string) {
	if s.Offered == nil {
		return nil, nil
	}
	for h := range s.Offered.byName {
		switch {
		case s.Local != nil && !s.Local.hasAddresses() && !s.Local.meetsName(h):
		case h.wild:
			below = append(below, h.name)
		default:
			exact = append(exact, h.name)
		}
	}
	slices.Sort(exact)
	slices.Sort(below)
	return exact, below
}

// Empty tells whether nothing at all can be reached.
func (s *Scope) Empty() bool {
	exact, below := s.Names()
	return len(exact)+len(below) == 0 && len(s.Routes()) == 0
}
