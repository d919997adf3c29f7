package agent

import (
	"net/netip"
	"testing"
)

func TestNarrowPaths(t *testing.T) {
	var n narrow
	a, b := netip.MustParseAddr("198.18.0.5"), netip.MustParseAddr("fd63:756c:7665:7274::c612:5")
	one := &passage{addrs: []netip.Addr{a, b}}
	for _, mtu := range []int{1300, 1280, 1420, 1300, 576} {
		n.set(one, mtu)
		want := mtu
		if mtu == 1420 {
			want = 0
		}
		if n.at(a) != want || n.at(b) != want || n.at(netip.MustParseAddr("198.18.0.6")) != 0 {
			t.Errorf("with %d: %d and %d", mtu, n.at(a), n.at(b))
		}
	}
	n.forget(one)
	n.set(one, 1300) // too late: the addresses are another's
	if n.at(a) != 0 || n.count.Load() != 0 {
		t.Errorf("a session that is over keeps %d, %d in all", n.at(a), n.count.Load())
	}
}
