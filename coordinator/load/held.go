package load

import (
	"net/netip"
	"slices"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// held is what a played gateway remembers of its sessions. There may be a hundred thousand, on the machine that is measured, so nothing in it is a
// pointer: the garbage collector has nothing to look at.
type held struct {
	by    map[idBytes]kept
	rules []string // that were ever granted; sessions name them by their place
}

// idBytes is a session's id, see [wire.Key.SessionID].
type idBytes [22]byte

func idOf(session string) (id idBytes) {
	copy(id[:], session)
	return id
}

// kept is one session.
type kept struct {
	key           wire.Key
	addresses     [2][16]byte // as IPv6 (RFC 4291, section 2.5.5.2)
	addressed     uint8       // how many of them there are
	rule          uint32
	expires, ends int64 // Unix nanoseconds
}

func newHeld() held { return held{by: map[idBytes]kept{}} }

// take takes an offered session under a lease.
func (h *held) take(o offer, l wire.Lease) {
	k := kept{key: o.Key, expires: l.Expires.UnixNano(), ends: l.Ends.UnixNano()}
	for _, a := range o.Addresses[:min(len(o.Addresses), len(k.addresses))] {
		k.addresses[k.addressed] = a.As16()
		k.addressed++
	}
	if len(o.Grants) > 0 {
		at := slices.Index(h.rules, o.Grants[0].Rule)
		if at < 0 {
			at = len(h.rules)
			h.rules = append(h.rules, o.Grants[0].Rule)
		}
		k.rule = uint32(at) //nolint:gosec // a coordinator has few rules
	}
	h.by[idOf(o.Session)] = k
}

// all gives the sessions as a hello does.
func (h *held) all() []wire.Held {
	out := make([]wire.Held, 0, len(h.by))
	for id, k := range h.by {
		s := wire.Held{Session: string(id[:]), Key: k.key, Expires: time.Unix(0, k.expires), Ends: time.Unix(0, k.ends)}
		for _, a := range k.addresses[:k.addressed] {
			s.Addresses = append(s.Addresses, netip.AddrFrom16(a).Unmap())
		}
		if int(k.rule) < len(h.rules) {
			s.Rules = []string{h.rules[k.rule]}
		}
		out = append(out, s)
	}
	return out
}

// drop forgets a session, and reports whether it was there.
func (h *held) drop(session string) bool {
	_, was := h.by[idOf(session)]
	delete(h.by, idOf(session))
	return was
}
