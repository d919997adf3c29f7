package names

import (
	"fmt"
	"net/netip"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var overlay6 = netip.MustParseAddr("fd63:756c:7665:7274::c612:1")

func ranges(t testing.TB, four string) Ranges {
	t.Helper()
	r, err := NewRanges(netip.MustParsePrefix(four), overlay6)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRanges(t *testing.T) {
	r := ranges(t, "198.19.0.0/16")
	if got := fmt.Sprint(r.Prefixes()); got != "[198.19.0.0/16 fd63:756c:7665:7274::c613:0/112]" {
		t.Errorf("ranges %s", got)
	}
	four, six := r.at(0)
	if four.String() != "198.19.0.1" || six.String() != "fd63:756c:7665:7274::c613:1" {
		t.Errorf("the first addresses are %v and %v", four, six)
	}
	if four, _ := r.at(r.size() - 1); four.String() != "198.19.255.254" {
		t.Errorf("the last address is %v", four)
	}
	for _, a := range []string{"198.19.0.0", "198.19.255.255", "198.18.0.1", "198.20.0.1", "fd63:756c:7665:7274::c612:1", "fd63:756c:7665:7274:1::c613:1", "::c613:1"} {
		if i, ok := r.index(netip.MustParseAddr(a)); ok {
			t.Errorf("%s has the index %d", a, i)
		}
	}
	for _, bad := range []string{"198.19.0.0/30", "198.19.0.1/16", "fd00::/64"} {
		if _, err := NewRanges(netip.MustParsePrefix(bad), overlay6); err == nil {
			t.Errorf("%s was taken", bad)
		}
	}
	if _, err := NewRanges(netip.MustParsePrefix("198.19.0.0/16"), netip.MustParseAddr("10.0.0.1")); err == nil {
		t.Error("an IPv4 overlay address was taken for IPv6")
	}
	var zero Ranges
	if zero.Contains(netip.MustParseAddr("0.0.0.1")) || zero.Prefixes() != nil {
		t.Error("the zero value holds addresses")
	}
}

// Every name has one address in each family and every address at most one name, however the names were drawn.
func TestBookIsABijection(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r, err := NewRanges(netip.PrefixFrom(netip.MustParseAddr("198.19.0.0"), rapid.IntRange(26, 29).Draw(t, "bits")), overlay6)
		if err != nil {
			t.Fatal(err)
		}
		limit := rapid.IntRange(0, 20).Draw(t, "limit")
		b := NewBook(r, limit)
		b.Fix(rapid.SliceOfN(rapid.StringMatching(`[ab]{1,4}`), 0, 5).Draw(t, "exact"))
		seen, counted := map[netip.Addr]string{}, map[string]bool{}
		for range 60 {
			name := rapid.StringMatching(`[a-d]{1,3}`).Draw(t, "name")
			exact := rapid.Bool().Draw(t, "spelt out")
			four, six, ok := b.Lease(name, exact)
			if !exact && (ok || counted[name]) {
				counted[name] = true
			}
			if len(counted) > limit {
				t.Fatalf("%d names where %d are allowed", len(counted), limit)
			}
			if !ok {
				continue
			}
			for _, a := range []netip.Addr{four, six} {
				if other, taken := seen[a]; taken && other != name {
					t.Fatalf("%v is for %s and for %s", a, other, name)
				}
				seen[a] = name
				if got, known := b.Name(a); !known || got != name || !r.Contains(a) {
					t.Fatalf("%v leads to %q, %v, not to %s", a, got, known, name)
				}
			}
		}
		if uint32(len(b.byIndex)) > r.size() || len(b.byIndex) != len(b.byName) {
			t.Fatalf("%d addresses, %d names, room for %d", len(b.byIndex), len(b.byName), r.size())
		}
	})
}

// Two gateways give the same addresses for what grants spell out, in whatever order they are asked.
func TestBooksAgree(t *testing.T) {
	exact := make([]string, 200)
	for i := range exact {
		exact[i] = fmt.Sprintf("service-%d.corp", i)
	}
	r := ranges(t, "198.19.0.0/24") // small, so that names meet
	a, b := NewBook(r, 100), NewBook(r, 100)
	a.Fix(exact)
	b.Fix(exact)
	a.Lease("x.wild", false)
	b.Lease("y.wild", false)
	for i := range exact {
		four, _, ok := a.Lease(exact[i], true)
		other, _, also := b.Lease(exact[len(exact)-1-i], true)
		if !ok || !also {
			t.Fatal("the range is full too soon")
		}
		if again, _, _ := b.Lease(exact[i], true); again != four {
			t.Errorf("%s is %v here and %v there", exact[i], four, again)
		}
		_ = other
	}
}

// TestBookRestores: a name gets the address that it had elsewhere, unless that is another's or none of this range; it counts.
func TestBookRestores(t *testing.T) {
	there, here := NewBook(ranges(t, "198.19.0.0/24"), 100), NewBook(ranges(t, "198.19.0.0/24"), 3)
	here.Fix([]string{"db.internal"})
	four, six, _ := there.Lease("a.wild", false)
	taken, _, _ := here.Lease("db.internal", true)
	for _, c := range []struct {
		name string
		addr netip.Addr
		want bool
	}{
		{"a.wild", four, true},
		{"a.wild", six, true},
		{"a.wild", four.Next(), false},
		{"b.wild", four, false},
		{"b.wild", taken, false},
		{"b.wild", netip.MustParseAddr("10.0.0.1"), false},
		{"b.wild", netip.MustParseAddr("198.19.0.0"), false},
		{"b.wild", netip.MustParseAddr("198.19.0.255"), false},
		{"b.wild", netip.Addr{}, false},
		{"b.wild", netip.MustParseAddr("198.19.0.254"), true},
		{"c.wild", netip.MustParseAddr("198.19.0.253"), true},
		{"d.wild", netip.MustParseAddr("198.19.0.252"), false}, // over the limit
	} {
		if got := here.Restore(c.name, c.addr); got != c.want {
			t.Errorf("%s at %v: %v", c.name, c.addr, got)
		}
	}
	if again, _, ok := here.Lease("a.wild", false); !ok || again != four {
		t.Errorf("asked for, it has %v", again)
	}
}

func TestBookIsBounded(t *testing.T) {
	b := NewBook(ranges(t, "198.19.0.0/16"), 10)
	for i := range 100 {
		_, _, ok := b.Lease(fmt.Sprintf("n%d.wild", i), false)
		if ok != (i < 10) {
			t.Errorf("name %d: %v", i, ok)
		}
	}
	if _, _, ok := b.Lease("n3.wild", false); !ok {
		t.Error("a name that was counted is refused")
	}
	if b.Count("other.wild") || !b.Count("n3.wild") {
		t.Error("names without an address are counted apart")
	}
	if _, _, ok := b.Lease("db.internal", true); !ok {
		t.Error("a name that a grant spells out is refused")
	}
	if _, _, ok := NewBook(Ranges{}, 10).Lease("db.internal", true); ok {
		t.Error("an address comes from nowhere")
	}
}
