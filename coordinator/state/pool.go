package state

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

// Pool is a network's range of session addresses. The first two addresses are the range's own and the gateways'; the
// last one is never given either.
type Pool struct {
	V4 netip.Prefix
	V6 netip.Prefix // /96 or shorter; a session's IPv6 address is this with its IPv4 address in the last 32 bits
	// Hold is how long an address is kept for a session from the start, where its lease is shorter. A lease that is extended within
	// it costs no second write of the address; one whose node dies before that keeps its address so long.
	Hold time.Duration
}

const (
	reservedFirst = 2 // the range's own address and the gateways'
	reservedLast  = 1 // what would be its broadcast address
)

// Validate refuses a range without IPv4, or one whose IPv6 part is longer than /96. A zero V6 means IPv4 only.
func (p Pool) Validate() error {
	if !p.V4.IsValid() || !p.V4.Addr().Is4() {
		return errors.New("a pool needs an IPv4 range")
	}
	if p.V6.IsValid() && (!p.V6.Addr().Is6() || p.V6.Addr().Is4In6() || p.V6.Bits() > 96) {
		return errors.New("a pool's IPv6 range is a /96 or shorter")
	}
	return nil
}

// Size is how many sessions the pool has addresses for.
func (p Pool) Size() int {
	if p.V4.Bits() < 1 { // the whole of IPv4 is no range of ours
		return 0
	}
	return max(1<<(32-p.V4.Bits())-reservedFirst-reservedLast, 0)
}

// Addresses gives a session's addresses by number, from 0 to Size-1: IPv4, then IPv6 where there is some.
func (p Pool) Addresses(n int) []netip.Addr {
	base := p.V4.Masked().Addr().As4()
	v4 := binary.BigEndian.Uint32(base[:]) + reservedFirst + uint32(n)
	binary.BigEndian.PutUint32(base[:], v4)
	return p.both(netip.AddrFrom4(base))
}

// Holds reports whether addrs is what this pool gives to one session: a check for what a gateway re-asserts.
func (p Pool) Holds(addrs []netip.Addr) bool {
	if p.Validate() != nil || len(addrs) == 0 || !addrs[0].Is4() || !p.V4.Contains(addrs[0]) {
		return false
	}
	base, addr := p.V4.Masked().Addr().As4(), addrs[0].As4()
	n := int64(binary.BigEndian.Uint32(addr[:])) - int64(binary.BigEndian.Uint32(base[:])) - reservedFirst
	return n >= 0 && n < int64(p.Size()) && slices.Equal(addrs, p.both(addrs[0]))
}

// both adds the IPv6 address that goes with an IPv4 one.
func (p Pool) both(v4 netip.Addr) []netip.Addr {
	if !p.V6.IsValid() {
		return []netip.Addr{v4}
	}
	v6, last := p.V6.Masked().Addr().As16(), v4.As4()
	copy(v6[12:], last[:])
	return []netip.Addr{v4, netip.AddrFrom16(v6)}
}

// candidates yields numbers of addresses to try: tries random ones first, then every one from a random start. A free
// address of a pool that is not nearly full is among the first two or three.
func (p Pool) candidates(tries int) func(yield func(int) bool) {
	return func(yield func(int) bool) {
		size := p.Size()
		if size == 0 {
			return
		}
		for range tries {
			if !yield(rand.IntN(size)) { //nolint:gosec // spreads load; nothing rests on it being hard to guess
				return
			}
		}
		start := rand.IntN(size) //nolint:gosec // as above
		for i := range size {
			if !yield((start + i) % size) {
				return
			}
		}
	}
}

// leaseAddress gives the IPv4 address by which a lease's addresses are held. It refuses any but one IPv4 address with
// at most one IPv6 address that ends in it.
func leaseAddress(addrs []netip.Addr) (netip.Addr, error) {
	if len(addrs) == 0 || len(addrs) > 2 || !addrs[0].Is4() {
		return netip.Addr{}, fmt.Errorf("a lease holds one IPv4 address and at most one IPv6 address, not %v", addrs)
	}
	if len(addrs) == 2 {
		v4, v6 := addrs[0].As4(), addrs[1].As16()
		if !addrs[1].Is6() || [4]byte(v6[12:]) != v4 {
			return netip.Addr{}, fmt.Errorf("a lease's IPv6 address ends in its IPv4 address, unlike %v", addrs)
		}
	}
	return addrs[0], nil
}
