package tunnel

import (
	"slices"
	"time"
)

// DefaultMTU is the largest packet inside the tunnel, in bytes, where 1,500 fit outside: WireGuard adds 32, UDP 8, IPv6 40. Over
// IPv4 there are 20 to spare, of which a relay takes 4.
const DefaultMTU = 1420

// StartMTU is what is sent at most, in bytes inside the tunnel, until it is known that more fits: the least that an interface with IPv6
// may have (RFC 8200, section 5). On a usual path more is known after the round trip in which its first check was answered and
// another one.
const StartMTU = 1280

// MinMTU is the smallest that is looked for. Below it a path carries small packets only.
const MinMTU = 576

// overhead is what WireGuard adds to a packet: type, receiver, counter, and the tag. For its padding see [unpadded].
const overhead = 32

// unpadded is the largest packet that is not longer than fits once WireGuard has padded it to a multiple of 16 bytes. The device pads
// no packet beyond most, but knows of nothing less.
func unpadded(fits, most int) int {
	if fits >= most {
		return fits
	}
	return fits &^ 15
}

// mtus are the sizes that are tried, in bytes inside the tunnel, largest first. Between them lie the links that exist: relays
// over IPv6, PPPoE, tunnels in tunnels, overlay networks of clusters, mobile networks.
var mtus = [...]int{
	1420, 1416, 1412, 1404, 1400, 1396, 1392, 1388, 1384, 1372, 1360, 1348, 1332, 1316, 1300, 1280, 1240, 1200, 1100, 1000, 800, MinMTU,
}

// Timing of the search for the MTU.
const (
	sizeWait     = 150 * time.Millisecond // for the answers of a round, at least
	sizeSlack    = 5 * time.Millisecond   // for packets that overtake each other, at least
	sizeRounds   = 4                      // rounds before what has been found stands
	sizeRaise    = 10 * time.Minute       // a path that takes less than the most is tried anew after this
	streamSearch = 500 * time.Millisecond // where either side is on a WebSocket a search waits so long: there the first packets would wait for it
	sizeMissing  = 2                      // full-sized checks in a row that go missing where small ones come back
)

// sizer finds how large a packet a path takes, both ways, by checks that are padded to a packet's size and are answered in the
// same size. It waits for no ICMP message and believes none. The leading side searches:
//
//	most and StartMTU ──most answered──► stands
//	  │ nothing comes back, or the smaller one alone
//	  ▼
//	all sizes, in a few rounds ──► the largest that came back stands ──(sizeRaise)──► all that are larger
//
// From then on the checks of a busy path are as large as its packets. When those alone go missing, the search begins anew.
type sizer struct {
	most    int       // what is hoped for
	stands  int       // what is relied upon; 0 while nothing is known
	found   int       // the largest that came back in this search
	round   int       // of this search
	next    time.Time // when the next round is due; zero means none
	missing int
}

// search begins a search.
func (s *sizer) search(most int, now time.Time) {
	*s = sizer{most: min(most, mtus[0]), stands: s.stands, next: now}
}

// due gives the sizes to be tried now; rtt is the path's.
func (s *sizer) due(rtt time.Duration, now time.Time) []int {
	if s.next.IsZero() || now.Before(s.next) {
		return nil
	}
	s.round++
	switch {
	case s.round == 1:
		s.next = now.Add(max(2*rtt, sizeWait))
		if s.most > StartMTU {
			return []int{s.most, StartMTU}
		}
		return []int{s.most}
	case s.round <= sizeRounds:
		if s.round > 2 && s.found > 0 {
			s.stands = s.found // so far: two rounds have tried the larger ones
		}
		s.next = now.Add(max(2*rtt, sizeWait) << (s.round - 2))
		return s.larger()
	}
	if s.stands = s.found; s.found == 0 {
		s.stands = MinMTU
	}
	s.round = 1 // and all that are larger once more
	s.next = now.Add(sizeRaise)
	return nil
}

// larger are the sizes above what has come back.
func (s *sizer) larger() []int {
	var sizes []int
	for _, mtu := range mtus {
		if mtu > s.found && mtu <= s.most {
			sizes = append(sizes, mtu)
		}
	}
	return sizes
}

// answered notes that a check of this size has come back. The smaller one of the first round was sent last: where it is back alone, the
// other is not coming.
func (s *sizer) answered(mtu int, rtt time.Duration, now time.Time) {
	s.missing = 0
	if s.round == 1 && mtu == StartMTU && s.searching(now) {
		s.next = sooner(s.next, now.Add(max(rtt/4, sizeSlack)))
	}
	if mtu <= s.found {
		return
	}
	s.found = mtu
	if mtu >= s.most {
		s.stands, s.next = mtu, time.Time{}
	} else if mtu > s.stands && s.stands > 0 {
		s.stands = mtu
	}
}

// missed notes that a full-sized check went missing while a small one came back.
func (s *sizer) missed(now time.Time) {
	if s.searching(now) {
		return
	}
	if s.missing++; s.missing >= sizeMissing {
		s.search(s.most, now)
		s.round = 1 // all sizes at once: the most has just been tried
	}
}

// searching reports whether a search is under way.
func (s *sizer) searching(now time.Time) bool {
	return !s.next.IsZero() && s.next.Sub(now) < sizeRaise/2
}

// search begins to look for the sizes that a path takes.
func (e *engine) search(p *path, now time.Time) {
	if p.spot.stream() || p.far {
		now = now.Add(streamSearch)
	}
	p.size.search(e.most, now)
}

// sized learns from an answer which sizes a path takes.
func (e *engine) sized(p *path, s sent, now time.Time) {
	if s.mtu > 0 {
		p.size.answered(s.mtu, p.srtt, now)
		return
	}
	if p.size.searching(now) {
		return
	}
	p.outgoing = slices.DeleteFunc(p.outgoing, func(o sent) bool {
		lost := o.mtu > 0 && o.mtu == p.size.stands && o.at.Before(s.at)
		if lost {
			p.size.missed(now)
		}
		return lost
	})
}

// settle gives the session's MTU: what every validated path takes, so that it stays the same when the path changes. The following
// side has been told. It is 0 while nothing is known.
func (e *engine) settle() int {
	if !e.lead {
		return e.mtu
	}
	least := 0
	for _, p := range e.paths {
		if s := p.size.stands; p.valid && s > 0 && (least == 0 || s < least) {
			least = s
		}
	}
	if least > 0 {
		e.mtu = least
	}
	return e.mtu
}

// fit is what may be sent: the session's MTU, or less while nothing has come back yet; 0 where that is to stay as it is. A WebSocket
// takes packets of any size.
func (e *engine) fit() int {
	m, c := e.settle(), e.chosen
	switch {
	case m > 0 || !e.lead || c == nil:
		return unpadded(m, e.most)
	case c.spot.stream():
		return e.most
	}
	return unpadded(max(c.size.found, StartMTU), e.most)
}

// told is what our checks say fits; 0 while that is not known.
func (e *engine) told() int {
	c := e.chosen
	if !e.lead || c == nil {
		return e.said
	}
	if m := e.settle(); m > 0 || c.size.found < StartMTU {
		return m
	}
	return c.size.found
}
