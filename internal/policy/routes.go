package policy

import "net/netip"

// Routes are the destinations a session can reach at all, merged and sorted: the intersection of Offered and Local less
// what is always denied at whole-prefix level. `internet` stays two default routes less the stripped ranges.
//
// Everything that [Scope.Decide] allows lies in a route (an IPv4-mapped address in that of the IPv4 address), but for what means
// the host itself or its own network to every host, the runner as well: loopback, multicast, unspecified and broadcast. A line that opens
// such an address serves names that lead there. The converse does not hold: routes know no ports, and the gateway's own addresses are not cut out. Closed ranges and the
// overlay are, so that a grant of 0.0.0.0/0 does not take the runner's own metadata and resolver into the tunnel.
//
// Size: n lines make at most n ranges of addresses, each of the about 30 closed and overlay ranges cuts one of them in
// two, and a range takes at most 62 prefixes in IPv4, 254 in IPv6. In practice `internet` is about 180 routes,
// 0.0.0.0/0 about 140 and ::/0 about 500; a test holds these numbers.
func (s *Scope) Routes() []netip.Prefix {
	var reached []span
	var exact []netip.Prefix
	s.common(func(p netip.Prefix, inBoth bool) {
		reached = append(reached, spanOf(p))
		if p.IsSingleIP() && s.opens(p.Addr(), inBoth) && routable(p.Addr()) {
			exact = append(exact, p)
		}
	})
	var cut []span
	for i := range closedRanges {
		cut = append(cut, spanOf(closedRanges[i].prefix))
	}
	open := subtract(mergeSpans(reached), mergeSpans(cut))
	for _, p := range exact {
		open = append(open, spanOf(p))
	}
	var overlay []span
	for _, p := range s.Overlay {
		overlay = append(overlay, spanOf(p.Masked()))
	}
	var routes []netip.Prefix
	for _, r := range subtract(mergeSpans(open), mergeSpans(overlay)) {
		routes = r.appendPrefixes(routes)
	}
	return routes
}

// routable tells an address that another host can be at from one that means this host, or its network, wherever it is used.
func routable(addr netip.Addr) bool {
	switch closedBy(addr).reason {
	case reasonLoopback, reasonMulticast, reasonUnspecified, reasonBroadcast:
		return false
	}
	return true
}

// opens tells whether a line that names addr opens it although it is closed.
func (s *Scope) opens(addr netip.Addr, inBoth bool) bool {
	c := closedBy(addr)
	return c != nil && (inBoth || s.Local == nil && !c.local)
}

// common calls yield for every prefix of either grant for which the other has a prefix around it with a protocol and
// port in common: the intersection, because of two prefixes that overlap one holds the other. inBoth says that both
// grants name this very prefix.
func (s *Scope) common(yield func(p netip.Prefix, inBoth bool)) {
	offered := s.Offered.reaches()
	if s.Local == nil {
		for p := range offered {
			yield(p, false)
		}
		return
	}
	local := s.Local.reaches()
	for p, r := range offered {
		within(p, r, local, yield)
	}
	for p, r := range local {
		within(p, r, offered, yield)
	}
}

// within yields p if a prefix of other that holds p has something in common with its reach.
func within(p netip.Prefix, r *reach, other map[netip.Prefix]*reach, yield func(netip.Prefix, bool)) {
	for bits := p.Bits(); bits >= 0; bits-- {
		around, err := p.Addr().Prefix(bits)
		if err != nil {
			return
		}
		if o := other[around]; o != nil && r.meets(o) {
			yield(p, bits == p.Bits())
			return
		}
	}
}

// reach is what a grant's lines for one prefix give together.
type reach struct {
	tcp, udp []portRange
	icmp     bool
}

func (r *reach) add(e *entry) {
	if e.protos&TCP != 0 {
		r.tcp = append(r.tcp, e.ports...)
	}
	if e.protos&UDP != 0 {
		r.udp = append(r.udp, e.ports...)
	}
	r.icmp = r.icmp || e.protos&ICMP != 0
}

func (r *reach) meets(o *reach) bool {
	return r.icmp && o.icmp || portsMeet(r.tcp, o.tcp) || portsMeet(r.udp, o.udp)
}

// reaches gives the grant as one reach for every prefix, `internet` spelt out as the public prefixes.
func (g *Grant) reaches() map[netip.Prefix]*reach {
	all := map[netip.Prefix]*reach{}
	if g == nil {
		return all
	}
	for p, entries := range g.byPrefix {
		all[p] = &reach{}
		for i := range entries {
			all[p].add(&entries[i])
		}
	}
	for p, r := range g.observed.reaches() {
		if all[p] == nil {
			all[p] = &reach{}
		}
		all[p].tcp, all[p].udp, all[p].icmp = append(all[p].tcp, r.tcp...), append(all[p].udp, r.udp...), true
	}
	if len(g.internet) > 0 {
		addInternet(all, g.internet)
	}
	for _, r := range all {
		r.tcp, r.udp = mergePorts(r.tcp), mergePorts(r.udp)
	}
	return all
}

func addInternet(all map[netip.Prefix]*reach, entries []entry) {
	var sum reach
	for i := range entries {
		sum.add(&entries[i])
	}
	sum.tcp, sum.udp = mergePorts(sum.tcp), mergePorts(sum.udp)
	for _, p := range publicPrefixes {
		r := all[p]
		if r == nil {
			r = &reach{}
			all[p] = r
		}
		r.tcp, r.udp, r.icmp = append(r.tcp, sum.tcp...), append(r.udp, sum.udp...), r.icmp || sum.icmp
	}
}

// publicPrefixes is what `internet` covers, disjoint and sorted.
var publicPrefixes = func() []netip.Prefix {
	var special []span
	for _, p := range append(append([]netip.Prefix(nil), notPublic4...), notPublic6...) {
		special = append(special, spanOf(p))
	}
	all := []span{spanOf(netip.MustParsePrefix("0.0.0.0/0")), spanOf(global6)}
	var out []netip.Prefix
	for _, s := range subtract(all, mergeSpans(special)) {
		out = s.appendPrefixes(out)
	}
	return out
}()
