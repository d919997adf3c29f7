package api

import (
	"container/list"
	"net/netip"
	"sync"

	"golang.org/x/time/rate"
)

// limiter is a token bucket for each address, in a table that forgets the addresses not heard of for longest.
type limiter struct {
	rate  rate.Limit
	burst int
	max   int

	mu     sync.Mutex
	recent *list.List // of *bucket, the last one heard of in front
	byAddr map[netip.Prefix]*list.Element
}

type bucket struct {
	who    netip.Prefix
	tokens *rate.Limiter
}

func newLimiter(r rate.Limit, burst, maxAddresses int) *limiter {
	return &limiter{rate: r, burst: burst, max: maxAddresses, recent: list.New(), byAddr: map[netip.Prefix]*list.Element{}}
}

// allow takes a token from the bucket of an address. Everybody without a known address shares one.
func (l *limiter) allow(addr netip.Addr) bool {
	who := oneSource(addr)
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.byAddr[who]
	if e == nil {
		if l.recent.Len() >= l.max {
			oldest := l.recent.Back()
			delete(l.byAddr, l.recent.Remove(oldest).(*bucket).who)
		}
		e = l.recent.PushFront(&bucket{who, rate.NewLimiter(l.rate, l.burst)})
		l.byAddr[who] = e
	} else {
		l.recent.MoveToFront(e)
	}
	return e.Value.(*bucket).tokens.Allow()
}

// oneSource is what counts as one asker: an IPv4 address, or the /64 that an IPv6 host can choose its addresses from.
func oneSource(addr netip.Addr) netip.Prefix {
	addr = addr.Unmap().WithZone("")
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	p, _ := addr.Prefix(bits) // the zero Prefix for the zero Addr
	return p
}
