package relay

import (
	"net/netip"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// tied makes a binding of a session whose channel is c.
func tied(c Channel, side Side, from string, holder byte, issued int64) *binding {
	b := &binding{origin: origin{addr: netip.MustParseAddrPort(from)}, credential: &credential{issued: issued, expires: 1 << 62, holder: wire.Key{holder}}}
	b.ticket[1] = byte(side)
	raw := uint32(c) << 4
	copy(b.ticket[2:], []byte{byte(raw >> 24), byte(raw >> 16), byte(raw >> 8), byte(raw)})
	return b
}

// TestATableForgetsAndKeeps: a session without sides is not in the table any more, and others of its shard are where they were.
func TestATableForgetsAndKeeps(t *testing.T) {
	tab, now := &table{limit: 3}, time.Now().UnixNano()
	const one, two = Channel(7), Channel(7 + tableShards)
	for _, b := range []*binding{
		tied(one, Client, "192.0.2.1:1", 1, 1), tied(two, Client, "192.0.2.1:1", 2, 1), tied(one, Gateway, "192.0.2.2:1", 3, 1),
	} {
		if _, code := tab.bind(b, now); code != 0 {
			t.Fatalf("refused with %d", code)
		}
	}
	if tab.get(one) == nil || tab.get(two) == nil || tab.count.Load() != 2 {
		t.Fatalf("%d sessions; %v, %v", tab.count.Load(), tab.get(one), tab.get(two))
	}
	mine := func(*session, *binding) bool { return true }
	tab.untie(one, Client, mine)
	if tab.get(one) == nil {
		t.Error("a session that has a side is forgotten")
	}
	tab.untie(one, Gateway, mine)
	if tab.get(one) != nil || tab.get(two) == nil || tab.count.Load() != 1 {
		t.Errorf("%d sessions; %v, %v", tab.count.Load(), tab.get(one), tab.get(two))
	}
	if tab.untie(one, Gateway, mine) != nil || tab.count.Load() != 1 {
		t.Error("a side that is not bound is untied")
	}
}

// TestWhoHoldsASide: of two holders the one with the newer ticket, of two tickets of one moment the one that came last.
func TestWhoHoldsASide(t *testing.T) {
	for _, tc := range []struct {
		first, second int64
		holder        byte
		code          int
	}{{5, 4, 2, CodeTicket}, {5, 4, 1, 0}, {5, 5, 2, 0}, {5, 6, 2, 0}} {
		tab := &table{limit: 1}
		tab.bind(tied(9, Gateway, "192.0.2.1:1", 1, tc.first), 1)
		if _, code := tab.bind(tied(9, Gateway, "192.0.2.2:1", tc.holder, tc.second), 2); code != tc.code {
			t.Errorf("%+v: the table says %d", tc, code)
		}
	}
}

// TestNoncesKnowTheWholeAddress: a nonce is good for one address and one port; the same port elsewhere has another. IPv4 is IPv4 however it is
// written.
func TestNoncesKnowTheWholeAddress(t *testing.T) {
	n := newNonces()
	seen := map[Nonce]string{}
	for _, at := range []string{"192.0.2.1:5000", "192.0.2.2:5000", "193.0.2.1:5000", "192.0.2.1:5001", "[2001:db8::1]:5000", "[2001:db8::2]:5000", "[3001:db8::1]:5000"} {
		a := netip.MustParseAddrPort(at)
		nonce := n.give(a)
		if other, taken := seen[nonce]; taken {
			t.Errorf("%s has the nonce of %s", at, other)
		}
		seen[nonce] = at
		for _, from := range []string{"192.0.2.1:5000", "192.0.2.2:5000", "[2001:db8::1]:5000"} {
			if got := n.valid(netip.MustParseAddrPort(from), nonce); got != (from == at) {
				t.Errorf("the nonce of %s is good at %s: %t", at, from, got)
			}
		}
	}
	mapped := netip.AddrPortFrom(netip.MustParseAddr("::ffff:192.0.2.1"), 5000)
	if !n.valid(netip.MustParseAddrPort("192.0.2.1:5000"), n.give(mapped)) {
		t.Error("an IPv4 address has two nonces")
	}
}
