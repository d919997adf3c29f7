package state

import (
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

func TestPoolNeverGivesReserved(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base := netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "base")))
		pool := Pool{V4: netip.PrefixFrom(base, rapid.IntRange(8, 32).Draw(t, "bits"))}
		if rapid.Bool().Draw(t, "ipv6") {
			pool.V6 = netip.MustParsePrefix("fd63::/64")
		}
		first := pool.V4.Masked().Addr()
		given := 0
		for n := range pool.candidates(3) {
			if given++; given > 50 {
				break
			}
			addrs := pool.Addresses(n)
			a := addrs[0]
			if !pool.V4.Contains(a) || a == first || a == first.Next() || !pool.V4.Contains(a.Next()) {
				t.Fatalf("%v of %v", a, pool.V4)
			}
			if _, err := leaseAddress(addrs); err != nil || !pool.Holds(addrs) {
				t.Fatalf("%v of %v is not taken back: %v", addrs, pool, err)
			}
		}
		if (given == 0) != (pool.Size() == 0) {
			t.Fatalf("%d of %d given", given, pool.Size())
		}
	})
}

func TestPoolTriesEveryAddress(t *testing.T) {
	pool := Pool{V4: netip.MustParsePrefix("10.0.0.0/24")}
	seen := map[int]int{}
	for n := range pool.candidates(0) {
		seen[n]++
	}
	for n := range pool.Size() {
		if seen[n] != 1 {
			t.Errorf("number %d tried %d times", n, seen[n])
		}
	}
	if len(seen) != 253 {
		t.Errorf("%d numbers", len(seen))
	}
}

func TestPoolHolds(t *testing.T) {
	pool := Pool{V4: netip.MustParsePrefix("10.9.0.0/29"), V6: netip.MustParsePrefix("fd00::/96")}
	addrs := func(s ...string) (out []netip.Addr) {
		for _, a := range s {
			out = append(out, netip.MustParseAddr(a))
		}
		return out
	}
	for name, c := range map[string]struct {
		addrs []netip.Addr
		want  bool
	}{
		"first":          {addrs("10.9.0.2", "fd00::10.9.0.2"), true},
		"last":           {addrs("10.9.0.6", "fd00::10.9.0.6"), true},
		"the range":      {addrs("10.9.0.0", "fd00::10.9.0.0"), false},
		"the gateway":    {addrs("10.9.0.1", "fd00::10.9.0.1"), false},
		"broadcast":      {addrs("10.9.0.7", "fd00::10.9.0.7"), false},
		"outside":        {addrs("10.9.0.8", "fd00::10.9.0.8"), false},
		"below":          {addrs("10.8.255.255", "fd00::10.8.255.255"), false},
		"without ipv6":   {addrs("10.9.0.2"), false},
		"another's ipv6": {addrs("10.9.0.2", "fd00::10.9.0.3"), false},
		"outside's ipv6": {addrs("10.9.0.2", "fd01::10.9.0.2"), false},
		"mapped":         {addrs("::ffff:10.9.0.2", "fd00::10.9.0.2"), false},
		"none":           {nil, false},
	} {
		if got := pool.Holds(c.addrs); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	if (Pool{}).Holds(addrs("10.9.0.2")) {
		t.Error("an empty pool holds an address")
	}
}

func TestPoolSize(t *testing.T) {
	for prefix, want := range map[string]int{
		"198.18.0.0/16": 65533, "10.0.0.0/8": 1<<24 - 3, "10.0.0.0/30": 1, "10.0.0.0/31": 0, "10.0.0.0/32": 0, "0.0.0.0/0": 0,
	} {
		if got := (Pool{V4: netip.MustParsePrefix(prefix)}).Size(); got != want {
			t.Errorf("%s has %d, want %d", prefix, got, want)
		}
	}
}
