package host

import (
	"cmp"
	"net/netip"
	"slices"
)

// plan computes which prefixes to route: all of want, less the keep addresses, less the connected subnets, as the fewest
// prefixes that cover exactly that. left is the part of want that lies in connected subnets. Both are sorted, IPv4 first.
func plan(want []netip.Prefix, keep []netip.Addr, connected []netip.Prefix) (routes, left []netip.Prefix) {
	single := make([]netip.Prefix, 0, len(keep))
	for _, addr := range keep {
		addr = addr.Unmap().WithZone("")
		if addr.IsValid() {
			single = append(single, netip.PrefixFrom(addr, addr.BitLen()))
		}
	}
	wanted, links := spansOf(want), spansOf(connected)
	left = prefixesOf(intersect(wanted, links))
	return prefixesOf(subtract(subtract(wanted, links), spansOf(single))), left
}

// yields tells of each part that was left out to which link it goes; what is lost goes to none that is known.
func yields(left, lost []netip.Prefix, connected []Yield) []Yield {
	var all []Yield
	for _, c := range connected {
		for _, p := range prefixesOf(intersect(spansOf(left), spansOf([]netip.Prefix{c.Prefix}))) {
			all = append(all, Yield{p, c.Link})
		}
	}
	slices.SortFunc(all, func(a, b Yield) int { return cmp.Or(a.Prefix.Compare(b.Prefix), cmp.Compare(a.Link, b.Link)) })
	all = slices.Compact(all)
	for _, p := range lost {
		all = append(all, Yield{Prefix: p})
	}
	return all
}

// Without gives what lies in want and not in cut, as the fewest prefixes, sorted.
func Without(want, cut []netip.Prefix) []netip.Prefix {
	return prefixesOf(subtract(spansOf(want), spansOf(cut)))
}

// split replaces each prefix that is taken, or is the default route, by its halves, and those by theirs where they are
// taken too. Single addresses that are taken cannot be split and come back as lost.
func split(routes []netip.Prefix, taken map[netip.Prefix]bool) (free, lost []netip.Prefix) {
	for _, p := range routes {
		switch {
		case p.Bits() > 0 && !taken[p]:
			free = append(free, p)
		case p.IsSingleIP():
			lost = append(lost, p)
		default:
			f, l := split(halves(p), taken)
			free, lost = append(free, f...), append(lost, l...)
		}
	}
	return free, lost
}

func halves(p netip.Prefix) []netip.Prefix {
	bits := p.Bits() + 1
	low := netip.PrefixFrom(p.Addr(), bits)
	return []netip.Prefix{low, netip.PrefixFrom(lastOf(low).Next(), bits)}
}

// span is the addresses from first to last, both included, of one family.
type span struct{ first, last netip.Addr }

// spansOf gives the addresses that the prefixes cover as sorted spans with gaps between them. Invalid prefixes cover none.
func spansOf(prefixes []netip.Prefix) []span {
	var all []span
	for _, p := range prefixes {
		if p = canonical(p); p.IsValid() {
			all = append(all, span{p.Addr(), lastOf(p)})
		}
	}
	slices.SortFunc(all, func(a, b span) int { return a.first.Compare(b.first) })
	var merged []span
	for _, s := range all {
		if n := len(merged); n > 0 && touch(merged[n-1], s) {
			if merged[n-1].last.Less(s.last) {
				merged[n-1].last = s.last
			}
			continue
		}
		merged = append(merged, s)
	}
	return merged
}

// touch reports whether b, which does not begin before a, overlaps or directly follows it.
func touch(a, b span) bool {
	if a.last.BitLen() != b.first.BitLen() {
		return false
	}
	return b.first.Compare(a.last) <= 0 || a.last.Next() == b.first
}

// canonical writes a prefix of IPv4-mapped addresses as one of IPv4, and clears the bits behind its length.
func canonical(p netip.Prefix) netip.Prefix {
	if !p.IsValid() {
		return netip.Prefix{}
	}
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked()
}

// lastOf is a prefix's highest address.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 1 << (7 - bit%8)
	}
	addr, _ := netip.AddrFromSlice(b)
	return addr
}

// subtract gives what lies in a and not in b; both are sorted with gaps, and so is the result.
func subtract(a, b []span) []span {
	var rest []span
	for _, s := range a {
		for len(b) > 0 && b[0].last.Less(s.first) {
			b = b[1:]
		}
		gone := false
		for _, hole := range b {
			if s.last.Less(hole.first) {
				break
			}
			if s.first.Less(hole.first) {
				rest = append(rest, span{s.first, hole.first.Prev()})
			}
			if gone = !hole.last.Less(s.last); gone {
				break
			}
			s.first = hole.last.Next()
		}
		if !gone {
			rest = append(rest, s)
		}
	}
	return rest
}

// intersect gives what lies in both.
func intersect(a, b []span) []span { return subtract(a, subtract(a, b)) }

// prefixesOf gives the fewest prefixes that cover exactly the spans.
func prefixesOf(spans []span) []netip.Prefix {
	var prefixes []netip.Prefix
	for _, s := range spans {
		for first := s.first; ; {
			p := widest(first, s.last)
			prefixes = append(prefixes, p)
			end := lastOf(p)
			if end == s.last {
				break
			}
			first = end.Next()
		}
	}
	return prefixes
}

// widest is the shortest prefix that begins at first and does not pass last.
func widest(first, last netip.Addr) netip.Prefix {
	p := netip.PrefixFrom(first, first.BitLen())
	for p.Bits() > 0 {
		wider := netip.PrefixFrom(first, p.Bits()-1)
		if wider.Masked().Addr() != first || last.Less(lastOf(wider)) {
			break
		}
		p = wider
	}
	return p
}
