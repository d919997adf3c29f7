package policy

import (
	"net/netip"
	"slices"
)

// span is a range of addresses of one family, inclusive at both ends. IPv4 sorts before IPv6.
type span struct{ lo, hi netip.Addr }

func spanOf(p netip.Prefix) span { return span{p.Addr(), lastOf(p)} }

// lastOf is the last address of a masked prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}

// mergeSpans sorts spans and joins those that overlap or touch.
func mergeSpans(spans []span) []span {
	slices.SortFunc(spans, func(a, b span) int { return a.lo.Compare(b.lo) })
	var out []span
	for _, s := range spans {
		if n := len(out); n > 0 && out[n-1].reaches(s.lo) {
			if out[n-1].hi.Less(s.hi) {
				out[n-1].hi = s.hi
			}
			continue
		}
		out = append(out, s)
	}
	return out
}

// reaches tells whether addr lies in the span or just behind it.
func (s span) reaches(addr netip.Addr) bool {
	return s.hi.BitLen() == addr.BitLen() && (!s.hi.Less(addr) || s.hi.Next() == addr)
}

// subtract takes cut from spans; both are merged.
func subtract(spans, cut []span) []span {
	var out []span
	for _, s := range spans {
		for _, c := range cut {
			if c.hi.Less(s.lo) || c.lo.BitLen() != s.lo.BitLen() {
				continue
			}
			if s.hi.Less(c.lo) {
				break
			}
			if s.lo.Less(c.lo) {
				out = append(out, span{s.lo, c.lo.Prev()})
			}
			s.lo = c.hi.Next() // the zero Addr behind the family's last address
			if !s.lo.IsValid() || s.hi.Less(s.lo) {
				s = span{}
				break
			}
		}
		if s.lo.IsValid() {
			out = append(out, s)
		}
	}
	return out
}

// appendPrefixes adds the fewest prefixes that make up the span.
func (s span) appendPrefixes(out []netip.Prefix) []netip.Prefix {
	for lo := s.lo; lo.IsValid() && !s.hi.Less(lo); {
		p := s.longest(lo)
		out = append(out, p)
		lo = lastOf(p).Next()
	}
	return out
}

// longest is the largest prefix that begins at lo and ends within the span.
func (s span) longest(lo netip.Addr) netip.Prefix {
	best := netip.PrefixFrom(lo, lo.BitLen())
	for bits := lo.BitLen() - 1; bits >= 0; bits-- {
		p, err := lo.Prefix(bits)
		if err != nil || p.Addr() != lo || s.hi.Less(lastOf(p)) {
			break
		}
		best = p
	}
	return best
}
