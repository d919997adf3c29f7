package policy

import (
	"net/netip"
	"strings"
)

// Who would have to change what, in words for the job's owner.
const (
	remedyRule  = "ask for a rule that allows it, or for the address that you mean"
	remedyLocal = "the coordinator's policy grants it; the gateway's own --policy has to as well"
	remedyBoth  = "ask for a rule that allows it, and for a line in the gateway's own --policy as well"
	remedyNone  = "nothing opens it: sessions never reach each other; ask for the address of the service itself"
)

// Remedy says what would have to change for a flow that [Scope.Decide] refuses to be let through, and in whose policy; "" where the flow is
// let through, or can never be meant.
func (s *Scope) Remedy(f Flow) string {
	return s.remedy(f, s.decide, func(addr netip.Addr, exact bool) (offered, local bool) {
		_, _, offered = s.Offered.look(f.Proto, addr, f.Dst.Port(), exact)
		_, _, local = s.Local.look(f.Proto, addr, f.Dst.Port(), exact)
		return offered, local
	})
}

// RemedyName is [Scope.Remedy] for what [Scope.DecideName] refuses.
func (s *Scope) RemedyName(name string, f Flow) string {
	decide := func(proto Proto, addr netip.Addr, port uint16) Verdict { return s.decideName(name, proto, addr, port) }
	return s.remedy(f, decide, func(addr netip.Addr, exact bool) (offered, local bool) {
		_, offered = s.Offered.findName(f.Proto, name, f.Dst.Port())
		_, local = s.Local.findName(f.Proto, name, f.Dst.Port())
		if offered && !exact {
			_, _, byAddr := s.Local.look(f.Proto, addr, f.Dst.Port(), false)
			return true, local || byAddr
		}
		if offered { // and closed: lines by address alone count
			_, _, offered = s.Offered.look(f.Proto, addr, f.Dst.Port(), true)
			_, _, local = s.Local.look(f.Proto, addr, f.Dst.Port(), true)
		}
		return offered, local
	})
}

// RemedyOffer is [Scope.Remedy] for what [Scope.OffersName] refuses, and for names that a session may not ask for at all.
func (s *Scope) RemedyOffer(name string, proto Proto, port uint16) string {
	_, offered := s.Offered.findName(proto, name, port)
	if s.Local == nil {
		return remedyOpen(offered, true)
	}
	_, local := s.Local.findName(proto, name, port)
	return remedyOpen(offered, local || s.Local.hasAddresses())
}

// remedy looks at the spelling of the address that is refused. lines tells which policies have a line for it; exact wants one that names it.
func (s *Scope) remedy(f Flow, decide func(Proto, netip.Addr, uint16) Verdict, lines func(addr netip.Addr, exact bool) (offered, local bool)) string {
	if !f.wellFormed() {
		return ""
	}
	addr := f.Dst.Addr().Unmap()
	in := embedded(addr)
	for _, a := range append([]netip.Addr{addr}, in.addrs[:in.n]...) {
		if decide(f.Proto, a, f.Dst.Port()).Allowed {
			continue
		}
		if contains(s.Overlay, a) {
			return remedyNone
		}
		reason, own := s.closed(a)
		offered, local := lines(a, reason != "")
		if reason != "" {
			return s.remedyClosed(a, own, offered, local)
		}
		return remedyOpen(offered, local || s.Local == nil)
	}
	return ""
}

// remedyOpen is for what any line opens.
func remedyOpen(offered, local bool) string {
	switch {
	case offered && local:
		return ""
	case offered:
		return remedyLocal
	case local:
		return remedyRule
	}
	return remedyBoth
}

// remedyClosed is for an address that only lines open which name it exactly: one of the coordinator's policy, and where own is true, or the
// gateway has a policy of its own, one there as well.
func (s *Scope) remedyClosed(addr netip.Addr, own, offered, local bool) string {
	var lacks []string
	if !offered {
		lacks = append(lacks, "the coordinator's policy has none")
	}
	switch {
	case own && s.Local == nil:
		lacks = append(lacks, "this gateway runs without a --policy of its own")
	case s.Local != nil && !local:
		lacks = append(lacks, "the gateway's own --policy has none")
	}
	where := "in the coordinator's policy"
	if own || s.Local != nil {
		where += " and in the gateway's own --policy"
	}
	return "only a line that names exactly " + addr.String() + " opens it, " + where + "; " + strings.Join(lacks, ", and ")
}
