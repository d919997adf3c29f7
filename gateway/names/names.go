// Package names lets a job reach services by name: it gives granted names addresses from a range of their own, answers for
// them in DNS inside the tunnel, and resolves them for the gateway when a flow arrives.
//
//	job ── A db.internal? ──▶ Server ── Book: 198.19.x.y ──▶ job
//	job ── TCP 198.19.x.y ──▶ forward ── Book: db.internal ──▶ Resolver ──▶ 10.20.0.5 ── policy ──▶ dial
//
// So a name's address never reaches the job: networks may overlap, a wildcard never widens to a range, and a name that is
// pointed elsewhere leads nowhere that policy closes.
//
// # What DNS cannot be used for
//
// Names outside a session's grant are refused before anything is asked upstream. A granted name is answered from the range
// of services; only a name that a grant spells out is looked up first, to say that it does not exist. A name under a
// wildcard is looked up when a flow to it arrives, or for SRV and CNAME records, and a session has a bounded number of such
// names for its whole life. What remains: somebody who runs a DNS zone inside a granted wildcard, or sees its queries, can
// be told as much as those names hold.
package names

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"sync"
)

// Ranges are where service addresses come from: an IPv4 range, and the IPv6 range that mirrors it in its last 32 bits. The
// zero value holds no address.
type Ranges struct {
	four, six netip.Prefix
}

// NewRanges takes the IPv4 range and any address of the overlay's IPv6 /96.
func NewRanges(four netip.Prefix, overlay6 netip.Addr) (Ranges, error) {
	if !four.IsValid() || !four.Addr().Is4() || four.Bits() > 29 || four != four.Masked() || !overlay6.Is6() || overlay6.Is4In6() {
		return Ranges{}, fmt.Errorf("%v and %v make no range of service addresses", four, overlay6)
	}
	r := Ranges{four: four}
	r.six = netip.PrefixFrom(mirror(overlay6, four.Addr()), 96+four.Bits())
	return r, nil
}

// mirror puts an IPv4 address into the last 32 bits of an IPv6 one.
func mirror(six, four netip.Addr) netip.Addr {
	b, v := six.As16(), four.As4()
	copy(b[12:], v[:])
	return netip.AddrFrom16(b)
}

// Prefixes are the two ranges, for routes.
func (r Ranges) Prefixes() []netip.Prefix {
	if !r.four.IsValid() {
		return nil
	}
	return []netip.Prefix{r.four, r.six}
}

// Contains tells whether an address is a service's, given out or not.
func (r Ranges) Contains(a netip.Addr) bool { return r.four.Contains(a) || r.six.Contains(a) }

// size is how many names the ranges can hold. The first and the last address stay free: some systems take them for the
// network's and for broadcast.
func (r Ranges) size() uint32 { return 1<<(32-r.four.Bits()) - 2 }

// at gives the addresses with an index below size.
func (r Ranges) at(index uint32) (four, six netip.Addr) {
	b := r.four.Addr().As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+1+index)
	four = netip.AddrFrom4(b)
	return four, mirror(r.six.Addr(), four)
}

// index is the inverse of at.
func (r Ranges) index(a netip.Addr) (uint32, bool) {
	if !r.Contains(a) {
		return 0, false
	}
	var last uint32
	if a.Is4() {
		b := a.As4()
		last = binary.BigEndian.Uint32(b[:])
	} else {
		b := a.As16()
		last = binary.BigEndian.Uint32(b[12:])
	}
	base := r.four.Addr().As4()
	index := last - binary.BigEndian.Uint32(base[:]) - 1
	return index, index < r.size()
}

// Book holds one session's service addresses. They are the session's own: another's may have the same address for another
// name. An address stays with its name until the session ends, and nearly always is the same at another gateway and in the
// job's next session, because it is derived from the name: what a job has cached stays right.
type Book struct {
	ranges Ranges
	limit  int

	mu      sync.Mutex
	byName  map[string]uint32
	byIndex map[uint32]string
	counted map[string]struct{} // names that no grant spells out
}

// NewBook makes an empty book. limit bounds the names that no grant spells out over the session's whole life.
func NewBook(r Ranges, limit int) *Book {
	return &Book{
		ranges: r, limit: limit,
		byName: map[string]uint32{}, byIndex: map[uint32]string{}, counted: map[string]struct{}{},
	}
}

// Fix gives the names that grants spell out their addresses, before any that are asked for. So two gateways give the same,
// even where two names want one address.
func (b *Book) Fix(exact []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, name := range slices.Sorted(slices.Values(exact)) {
		b.place(name)
	}
}

// Lease gives a name's addresses. False says that the session has had as many names as it may, or that the range is full.
func (b *Book) Lease(name string, exact bool) (four, six netip.Addr, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !exact && !b.count(name) {
		return four, six, false
	}
	index, ok := b.place(name)
	if !ok {
		return four, six, false
	}
	four, six = b.ranges.at(index)
	return four, six, true
}

// Restore gives a name that no grant spells out the address that another gateway has given it, as far as it is free, and counts it as
// [Book.Lease] does. False says that it cannot have that address.
func (b *Book) Restore(name string, a netip.Addr) bool {
	index, ok := b.ranges.index(a)
	if !ok {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if has, known := b.byName[name]; known {
		return has == index
	}
	if _, taken := b.byIndex[index]; taken || !b.count(name) {
		return false
	}
	b.byName[name], b.byIndex[index] = index, name
	return true
}

// Count takes a name that no grant spells out from the session's allowance, without an address for it: it is about to be
// asked for upstream. A name counts once.
func (b *Book) Count(name string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.count(name)
}

func (b *Book) count(name string) bool {
	if _, known := b.counted[name]; known {
		return true
	}
	if len(b.counted) >= b.limit {
		return false
	}
	b.counted[name] = struct{}{}
	return true
}

// place finds a free address, beginning with the one that the name's hash points at.
func (b *Book) place(name string) (uint32, bool) {
	if index, known := b.byName[name]; known {
		return index, true
	}
	size := b.ranges.size()
	if !b.ranges.four.IsValid() || uint32(len(b.byIndex)) >= size {
		return 0, false
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(name)) // never fails, see package hash
	index := uint32(h.Sum64() % uint64(size))
	for {
		if _, taken := b.byIndex[index]; !taken {
			b.byName[name], b.byIndex[index] = index, name
			return index, true
		}
		index = (index + 1) % size
	}
}

// Name gives the name behind an address; false where there is none.
func (b *Book) Name(a netip.Addr) (string, bool) {
	index, ok := b.ranges.index(a)
	if !ok {
		return "", false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	name, ok := b.byIndex[index]
	return name, ok
}
