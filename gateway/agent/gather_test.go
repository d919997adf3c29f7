package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

func testGatherer(host ...string) *gatherer {
	g := newGatherer(51820, &Options{Coordinator: coordinatorURL}, slog.New(slog.DiscardHandler))
	g.host = func(port uint16) (out []wire.Candidate, err error) {
		for _, h := range host {
			out = append(out, wire.Candidate{Kind: wire.Host, Addr: netip.AddrPortFrom(netip.MustParseAddr(h), port)})
		}
		return out, nil
	}
	g.resolve = func(_ context.Context, host string) ([]netip.Addr, error) {
		switch host {
		case "culvert.example.com":
			return []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2"), netip.MustParseAddr("2001:db8::1")}, nil
		case "192.0.2.1":
			return []netip.Addr{netip.MustParseAddr("192.0.2.1")}, nil
		}
		return nil, errors.New("no such host")
	}
	g.refresh = func() error { return nil }
	g.relays = newRelays(&Options{}, g.log)
	g.relays.lookup, g.relays.set = g.lookup, func([]tunnel.Relay) {}
	g.relays.status = func() []tunnel.RelayStatus { return nil }
	return g
}

func TestGathersAndTellsChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := testGatherer("10.20.0.7")
		g.public = netip.MustParseAddrPort("198.51.100.1:51820")
		var mu sync.Mutex
		seen := "203.0.113.77:40000"
		asked := map[netip.AddrPort]int{}
		g.reflexive = func(ctx context.Context, server netip.AddrPort) (netip.AddrPort, error) {
			mu.Lock()
			defer mu.Unlock()
			asked[server]++
			if server.Addr().Is6() || seen == "" {
				return netip.AddrPort{}, errors.New("no answer")
			}
			return netip.MustParseAddrPort(seen), nil
		}
		var told [][]wire.Candidate
		g.changed = func(c []wire.Candidate, _ wire.Mapping) { told = append(told, c) }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); g.run(ctx) }()

		g.update()
		g.setServers([]string{":3478", "nowhere.example.com:3478", "no port", "192.0.2.1:3478", "192.0.2.2:3478"})
		synctest.Wait()
		want := []wire.Candidate{
			{Kind: wire.Public, Addr: g.public},
			{Kind: wire.Host, Addr: netip.MustParseAddrPort("10.20.0.7:51820")},
			{Kind: wire.Reflexive, Addr: netip.MustParseAddrPort("203.0.113.77:40000")},
		}
		if len(told) != 1 || !slices.Equal(told[0], want) {
			t.Fatalf("told %v, want %v once", told, want)
		}
		mu.Lock()
		if len(asked) != 3 {
			t.Errorf("asked %v, want one address of each family and the second server", asked)
		}
		mu.Unlock()

		time.Sleep(10 * gatherEvery)
		synctest.Wait()
		if len(told) != 1 {
			t.Errorf("told %d times without a change", len(told))
		}
		mu.Lock()
		if n := asked[netip.MustParseAddrPort("203.0.113.1:3478")]; n != 11 {
			t.Errorf("asked %d times in 200 s, want every 20 s to keep the mapping open", n)
		}
		seen = ""
		mu.Unlock()
		time.Sleep(gatherEvery)
		synctest.Wait()
		if len(told) != 1 {
			t.Error("a server that is away costs the candidate")
		}
		mu.Lock()
		seen = "203.0.113.77:40001"
		mu.Unlock()
		time.Sleep(gatherEvery)
		synctest.Wait()
		if len(told) != 2 || told[1][2].Addr.Port() != 40001 {
			t.Errorf("told %v, want the new mapping", told)
		}
		cancel()
		<-done
	})
}

func TestDistinctKeepsWhatWasConfigured(t *testing.T) {
	var in []wire.Candidate
	for i := range 40 {
		in = append(in, wire.Candidate{Kind: wire.Host, Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 1)})
	}
	mapped := wire.Candidate{Kind: wire.Reflexive, Addr: netip.MustParseAddrPort("203.0.113.1:1")}
	in = append(in, mapped, mapped, wire.Candidate{Kind: wire.Reflexive, Addr: in[39].Addr})
	out := distinct(in)
	if len(out) != wire.MaxCandidates || !slices.Contains(out, mapped) {
		t.Errorf("%d candidates, mapped kept: %t", len(out), slices.Contains(out, mapped))
	}
}

func TestSaneCandidates(t *testing.T) {
	in := []wire.Candidate{{}}
	for _, a := range []string{
		"192.0.2.1:0", "224.0.0.1:5", "255.255.255.255:5", "0.0.0.0:5", "169.254.169.254:80", "[fe80::1]:5", "[ff02::1]:5",
		"[fd00::1%eth0]:5", "192.0.2.1:5", "[2001:db8::1]:5", "[::ffff:192.0.2.2]:5", "127.0.0.1:5",
	} {
		in = append(in, wire.Candidate{Kind: wire.Host, Addr: netip.MustParseAddrPort(a)})
	}
	var got []string
	for _, c := range saneCandidates(in) {
		got = append(got, c.Addr.String())
	}
	if want := []string{"192.0.2.1:5", "[2001:db8::1]:5", "192.0.2.2:5", "127.0.0.1:5"}; !slices.Equal(got, want) {
		t.Errorf("kept %v, want %v", got, want)
	}
	if n := len(saneCandidates(slices.Repeat(in, 20))); n != wire.MaxCandidates {
		t.Errorf("%d kept, want at most %d", n, wire.MaxCandidates)
	}
}

// What a router forwards is told at once, without waiting for STUN, and is more than what STUN sees at the same address.
func TestGathersMappedPorts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := testGatherer("10.20.0.7")
		forwarded := wire.Candidate{Kind: wire.Mapped, Addr: netip.MustParseAddrPort("203.0.113.77:51820")}
		var on atomic.Bool
		on.Store(true)
		g.mapped = func() (wire.Candidate, bool) { return forwarded, on.Load() }
		g.reflexive = func(ctx context.Context, _ netip.AddrPort) (netip.AddrPort, error) {
			select {
			case <-time.After(time.Second):
				return forwarded.Addr, nil
			case <-ctx.Done():
				return netip.AddrPort{}, ctx.Err()
			}
		}
		var told [][]wire.Candidate
		g.changed = func(c []wire.Candidate, _ wire.Mapping) { told = append(told, c) }
		g.setServers([]string{":3478"})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); g.run(ctx) }()
		g.again()
		synctest.Wait()
		host := wire.Candidate{Kind: wire.Host, Addr: netip.MustParseAddrPort("10.20.0.7:51820")}
		if want := []wire.Candidate{host, forwarded}; len(told) != 1 || !slices.Equal(told[0], want) {
			t.Errorf("told %v, want %v at once", told, want)
		}
		time.Sleep(2 * time.Second)
		on.Store(false)
		g.again()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		seen := wire.Candidate{Kind: wire.Reflexive, Addr: forwarded.Addr}
		if want := []wire.Candidate{host, seen}; len(told) != 2 || !slices.Equal(told[1], want) {
			t.Errorf("told %v, want %v at last", told, want)
		}
		cancel()
		<-done
	})
}
