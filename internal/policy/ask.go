package policy

import "strings"

// KnowsName tells whether a session may ask for a canonical name at all: whether a line by name covers it on any protocol
// and port. It does not allocate.
func (s *Scope) KnowsName(name string) bool {
	return s.Offered.hasName(name) && (s.Local == nil || s.Local.hasAddresses() || s.Local.hasName(name))
}

// ExactName tells whether a line spells this very name out, so that asking for it tells nobody anything that the policy's
// author did not write.
func (s *Scope) ExactName(name string) bool {
	if s.Offered == nil {
		return false
	}
	_, ok := s.Offered.byName[hostName{name: name}]
	return ok
}

// OffersName holds a flow to a canonical name against the scope before the name is resolved. What it allows has to pass
// [Scope.DecideName] with the address; what it refuses is refused whatever the address.
func (s *Scope) OffersName(name string, proto Proto, port uint16) Verdict {
	rule, ok := s.Offered.findName(proto, name, port)
	if !ok {
		return Verdict{Reason: reasonNotGranted}
	}
	if s.Local != nil && !s.Local.hasAddresses() {
		if _, ok := s.Local.findName(proto, name, port); !ok {
			return Verdict{Reason: reasonNotGranted}
		}
	}
	return Verdict{Allowed: true, Rule: rule}
}

// hasName tells whether any line by name covers a canonical name. A nil grant covers nothing.
func (g *Grant) hasName(name string) bool {
	if g == nil || len(g.byName) == 0 {
		return false
	}
	if _, ok := g.byName[hostName{name: name}]; ok {
		return true
	}
	for rest, more := name, true; more; {
		if _, rest, more = strings.Cut(rest, "."); more {
			if _, ok := g.byName[hostName{name: rest, wild: true}]; ok {
				return true
			}
		}
	}
	return false
}
