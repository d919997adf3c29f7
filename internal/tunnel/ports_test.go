package tunnel

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

func drawn(n int, low, high int) (seen []uint16) {
	for range n {
		seen = append(seen, uint16(low+rand.IntN(high-low+1)))
	}
	return seen
}

// A range of a thousand ports is found to a few, and one that is no range is not mistaken for one.
func TestRangeIsEstimated(t *testing.T) {
	for range 100 {
		got := estimate(drawn(sampled, 30000, 30999))
		if got.size() < 700 || got.size() > 1200 || got.low < 29900 || got.high > 31100 {
			t.Errorf("a thousand ports from 30000 look like %v", got)
		}
		if got := estimate(drawn(sampled, 1024, 65535)); got != anyPort {
			t.Errorf("all ports look like %v", got)
		}
	}
	for name, seen := range map[string][]uint16{"none": nil, "few": drawn(fewSamples-1, 30000, 30999)} {
		if got := estimate(seen); got.known() {
			t.Errorf("%s: %v is believed", name, got)
		}
	}
	if got := estimate([]uint16{1024, 60000}); got != anyPort {
		t.Errorf("two ports far apart prove %v", got)
	}
}

// Whatever range a peer claims, no privileged port is tried, and never few ports again and again.
func TestClaimedRangeIsBounded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		low := rapid.Uint16().Draw(t, "low")
		claimed := ports{low, rapid.Uint16Range(low, 65535).Draw(t, "high")}
		got := claimed.sane()
		if got.low < 1024 || got.low > got.high || got.size() < leastRange || got != anyPort && got.size() > widestRange {
			t.Fatalf("%v becomes %v", claimed, got)
		}
		if claimed.low >= 1024 && claimed.size() <= widestRange && claimed.known() && (got.low > claimed.low || got.high < claimed.high) {
			t.Fatalf("%v becomes %v, which leaves ports out", claimed, got)
		}
	})
}

// Every port of a range comes before any comes again.
func TestGuessesDoNotRepeatThemselves(t *testing.T) {
	g := guesses{in: ports{2000, 2999}}
	for range 2 {
		var got []uint16
		for range 1000 {
			got = append(got, g.next(ports.shuffled))
		}
		if slices.IsSorted(got) {
			t.Error("the ports are tried in order, as a scan does")
		}
		slices.Sort(got)
		if got = slices.Compact(got); len(got) != 1000 || got[0] != 2000 || got[999] != 2999 {
			t.Errorf("%d ports from %d to %d", len(got), got[0], got[len(got)-1])
		}
	}
}

func TestOnlyPublicAddressesArePublic(t *testing.T) {
	for text, want := range map[string]bool{
		"20.10.5.1": true, "203.0.113.7": true, "8.8.8.8": true,
		"10.1.2.3": false, "172.31.0.1": false, "192.168.1.1": false, "100.64.0.1": false, "127.0.0.1": false, "0.0.0.0": false,
		"169.254.169.254": false, "224.0.0.1": false, "239.1.1.1": false, "255.255.255.255": false, "240.0.0.1": false,
		"198.18.0.1": false, "168.63.129.16": false, "::1": false, "2001:db8::1": false, "fe80::1": false, "::": false,
		"::ffff:10.0.0.1": false,
	} {
		if got := public(netip.MustParseAddr(text)); got != want {
			t.Errorf("public(%s) = %v", text, got)
		}
	}
}

func TestWhatServersSawTellsTheRange(t *testing.T) {
	see := func(mapped ...uint16) (list []nat.Observation) {
		for i, port := range mapped {
			server := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, 1}), uint16(3478+i))
			list = append(list, nat.Observation{Server: server, Mapped: netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, 2}), port)})
		}
		return list
	}
	if m := newMapper(wire.MappingHard, see(2000, 50000)); m.ports != anyPort || m.server != see(1)[0].Server {
		t.Errorf("ports far apart: %+v", m)
	}
	if m := newMapper(wire.MappingHard, see(30100, 30200, 30900)); m.ports.known() {
		t.Errorf("three ports prove a range: %+v", m)
	}
	if m := newMapper(wire.MappingEasy, see(30100, 30100)); m.ports.known() {
		t.Errorf("an easy NAT has a range: %+v", m)
	}
	six := []nat.Observation{{Server: netip.MustParseAddrPort("[2001:db8::1]:3478"), Mapped: netip.MustParseAddrPort("[2001:db8::2]:9")}}
	if m := newMapper(wire.MappingEasy, six); m.server.IsValid() {
		t.Errorf("a server over IPv6 is asked over IPv4: %+v", m)
	}
}
