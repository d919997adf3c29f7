package agent

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// testRelays are relays whose names resolve by the test gatherer's rules, and a tunnel that only remembers.
func testRelays() (r *relays, set *[][]tunnel.Relay, status *[]tunnel.RelayStatus) {
	g := testGatherer()
	set, status = &[][]tunnel.Relay{}, &[]tunnel.RelayStatus{}
	g.relays.set = func(list []tunnel.Relay) { *set = append(*set, list) }
	g.relays.status = func() []tunnel.RelayStatus { return *status }
	return g.relays, set, status
}

func relayNames(list []wire.Relay) (names []string) {
	for _, r := range list {
		names = append(names, r.Name)
	}
	return names
}

// TestHostileRelayLists: whatever a coordinator lists, what is kept is bounded, and only https is dialled.
func TestHostileRelayLists(t *testing.T) {
	long := strings.Repeat("x", 2000)
	var many []wire.Relay
	for i := range 1000 {
		many = append(many, wire.Relay{Name: fmt.Sprintf("r%d", i), UDP: ":3478"})
	}
	for name, c := range map[string]struct {
		in       []wire.Relay
		insecure bool
		want     int
	}{
		"sound":                 {[]wire.Relay{{Name: "a", UDP: ":3478", URL: "https://culvert.example.com/v1/relay"}, {Name: "b", URL: "https://b.example/x"}}, false, 2},
		"too many":              {many, false, wire.MaxRelays},
		"plain http":            {[]wire.Relay{{Name: "a", UDP: ":3478", URL: "http://culvert.example.com/v1/relay"}}, false, 0},
		"plain http, allowed":   {[]wire.Relay{{Name: "a", UDP: ":3478", URL: "http://culvert.example.com/v1/relay"}}, true, 1},
		"plain http, loopback":  {[]wire.Relay{{Name: "a", URL: "http://127.0.0.1:80/v1/relay"}}, false, 1},
		"another scheme":        {[]wire.Relay{{Name: "a", URL: "file:///etc/passwd"}, {Name: "b", URL: "gopher://x"}}, true, 0},
		"credentials":           {[]wire.Relay{{Name: "a", URL: "https://u:p@culvert.example.com/"}}, false, 0},
		"no host":               {[]wire.Relay{{Name: "a", URL: "https:///v1/relay"}}, false, 0},
		"no address":            {[]wire.Relay{{Name: "a"}}, false, 0},
		"a name that is none":   {[]wire.Relay{{Name: "a\n", UDP: ":1"}, {Name: "", UDP: ":1"}, {Name: long, UDP: ":1"}}, false, 0},
		"twice":                 {[]wire.Relay{{Name: "a", UDP: ":1"}, {Name: "a", UDP: ":2"}}, false, 1},
		"a URL without end":     {[]wire.Relay{{Name: "a", URL: "https://x/" + long}}, false, 0},
		"an address without it": {[]wire.Relay{{Name: "a", UDP: long}}, false, 0},
	} {
		r := newRelays(&Options{InsecureHTTP: c.insecure}, slog.New(slog.DiscardHandler))
		r.list(c.in)
		if got := relayNames(r.listed); len(got) != c.want {
			t.Errorf("%s: kept %q, want %d", name, got, c.want)
		}
	}
}

// TestRelaysAreNotAimed: a relay's UDP address is not one at which questions do harm.
func TestRelaysAreNotAimed(t *testing.T) {
	r, set, _ := testRelays()
	g := testGatherer()
	g.resolve = func(_ context.Context, host string) ([]netip.Addr, error) {
		a, err := netip.ParseAddr(host)
		return []netip.Addr{a}, err
	}
	r.lookup = g.lookup
	for i, addr := range []string{"169.254.169.254:80", "224.0.0.1:5000", "255.255.255.255:9", "0.0.0.0:9", "[fe80::1]:9", "[ff02::1]:9"} {
		r.list([]wire.Relay{{Name: "a", UDP: addr}})
		r.refresh(t.Context())
		if got := r.known; len(got) != 1 || len(got[0].UDP) != 0 {
			t.Errorf("%d: %s is asked: %v", i, addr, *set)
		}
	}
}

// TestRelaysAreLookedUp: once, and again only while they do not answer.
func TestRelaysAreLookedUp(t *testing.T) {
	r, set, status := testRelays()
	var lookups atomic.Int32
	addr := netip.MustParseAddrPort("203.0.113.1:3478")
	r.lookup = func(context.Context, string) []netip.AddrPort { lookups.Add(1); return []netip.AddrPort{addr} }
	listed := []wire.Relay{{Name: "a", UDP: "a.example:3478"}, {Name: "b", URL: "https://b.example/v1/relay"}}
	r.list(listed)
	r.refresh(t.Context())
	want := []tunnel.Relay{{Name: "a", UDP: []netip.AddrPort{addr}}, {Name: "b", URL: "https://b.example/v1/relay"}}
	if len(*set) != 1 || !slices.EqualFunc((*set)[0], want, sameRelay) {
		t.Fatalf("the tunnel was told %v", *set)
	}
	*status = []tunnel.RelayStatus{{Relay: want[0], Reachable: true}}
	r.list(listed)
	r.refresh(t.Context())
	if lookups.Load() != 1 || len(*set) != 1 {
		t.Errorf("%d lookups and told %d times though all is well", lookups.Load(), len(*set))
	}
	*status, addr = nil, netip.MustParseAddrPort("203.0.113.9:3478")
	r.refresh(t.Context())
	if lookups.Load() != 2 || len(*set) != 2 || (*set)[1][0].UDP[0] != addr {
		t.Errorf("a relay that does not answer: %d lookups, %v", lookups.Load(), *set)
	}
}

// TestGrantsAreForListedRelays: an offer cannot name other relays than the welcome, nor other addresses.
func TestGrantsAreForListedRelays(t *testing.T) {
	r, _, _ := testRelays()
	r.list([]wire.Relay{{Name: "a", UDP: ":3478"}})
	r.refresh(t.Context())
	ends := time.Now().Add(time.Hour)
	got := r.grants(t.Context(), []wire.RelayGrant{
		{Relay: wire.Relay{Name: "a", UDP: "192.0.2.66:53", URL: "https://evil.example/"}, Ticket: "t", Expires: time.Unix(0, 0)},
		{Relay: wire.Relay{Name: "b", UDP: "192.0.2.66:53"}, Ticket: "t"},
		{Relay: wire.Relay{Name: "a"}, Ticket: wire.Secret(strings.Repeat("t", 5000))},
	}, ends)
	if len(got) != 1 || got[0].Relay.URL != "" || got[0].Relay.UDP[0].Addr().String() != "203.0.113.1" || !got[0].Expires.Equal(ends) {
		t.Errorf("grants %+v", got)
	}
}

// TestGrantsWaitForTheirNames: an offer may come right after the welcome, but is not held up for long.
func TestGrantsWaitForTheirNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _, _ := testRelays()
		r.list([]wire.Relay{{Name: "a", UDP: ":3478"}})
		in := []wire.RelayGrant{{Relay: wire.Relay{Name: "a"}, Ticket: "t"}}
		began := time.Now()
		if got := r.grants(t.Context(), in, began); len(got) != 0 || time.Since(began) != relayWait {
			t.Errorf("%v after %v", got, time.Since(began))
		}
		go func() { time.Sleep(time.Second); r.refresh(t.Context()) }()
		began = time.Now()
		if got := r.grants(t.Context(), in, began); len(got) != 1 || time.Since(began) != time.Second {
			t.Errorf("%v after %v", got, time.Since(began))
		}
		began = time.Now()
		if got := r.grants(t.Context(), nil, began); got != nil || time.Since(began) != 0 {
			t.Error("an offer without relays waits")
		}
	})
}

// TestMapping: what two destinations see tells the mapping, a single disagreement does not change it, and a hard one needs no
// list of ports.
func TestMapping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := testGatherer("10.20.0.7")
		var hard atomic.Bool
		var port atomic.Uint32
		g.reflexive = func(_ context.Context, server netip.AddrPort) (netip.AddrPort, error) {
			if server.Addr().Is6() {
				return netip.AddrPort{}, errors.New("no answer")
			}
			p := uint16(40000)
			if hard.Load() {
				p += uint16(port.Add(1))
			}
			return netip.AddrPortFrom(netip.MustParseAddr("203.0.113.77"), p), nil
		}
		type told struct {
			list    []wire.Candidate
			mapping wire.Mapping
		}
		var latest atomic.Pointer[told]
		g.changed = func(c []wire.Candidate, m wire.Mapping) { latest.Store(&told{c, m}) }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); g.run(ctx) }()
		last := func() told { synctest.Wait(); return *latest.Load() }
		g.setServers([]string{":3478", ":3479"})
		if got := last(); got.mapping != wire.MappingEasy {
			t.Errorf("one port for two destinations: %+v", got)
		}
		hard.Store(true)
		time.Sleep(gatherEvery)
		if got := last(); got.mapping != wire.MappingEasy {
			t.Errorf("told at once that the mapping is %q", got.mapping)
		}
		time.Sleep(gatherEvery)
		if got := last(); got.mapping != wire.MappingHard {
			t.Errorf("two rounds of two ports: %+v", got)
		}
		time.Sleep(gatherEvery)
		if got := last(); len(got.list) != 2 || got.list[1].Kind != wire.Reflexive {
			t.Errorf("candidates behind a hard NAT: %v", got.list)
		}
		hard.Store(false)
		g.moved()
		if got := last(); got.mapping != wire.MappingEasy {
			t.Errorf("after a move: %+v", got)
		}
		cancel()
		<-done
	})
}

// TestRelaysTellTheMapping: relays at other addresses than the coordinator's count as well.
func TestRelaysTellTheMapping(t *testing.T) {
	r, _, status := testRelays()
	at := func(name, server, mapped string) tunnel.RelayStatus {
		return tunnel.RelayStatus{
			Relay:     tunnel.Relay{Name: name, UDP: []netip.AddrPort{netip.MustParseAddrPort("[2001:db8::1]:3478"), netip.MustParseAddrPort(server)}},
			Reachable: true, Mapped: netip.MustParseAddrPort(mapped),
		}
	}
	*status = []tunnel.RelayStatus{at("a", "192.0.2.1:3478", "203.0.113.7:5"), at("b", "192.0.2.2:3478", "203.0.113.7:6"), {}}
	if got := r.observations(); len(got) != 2 || nat.Classify(got, nil).Mapping != wire.MappingHard {
		t.Errorf("observations %+v", got)
	}
}

// relayed is a world with a relay, on loopback, that takes tickets of the world's own making.
type relayed struct {
	*world
	key    ed25519.PrivateKey
	server *relay.Server
	http   *httptest.Server
	listed wire.Relay
}

func newRelayed(t *testing.T, udp bool) *relayed {
	t.Helper()
	r := &relayed{}
	var public ed25519.PublicKey
	var err error
	if public, r.key, err = ed25519.GenerateKey(nil); err != nil {
		t.Fatal(err)
	}
	o := relay.Options{Keys: []ed25519.PublicKey{public}, Logger: slog.New(slog.DiscardHandler)}
	if udp {
		o.UDP = "127.0.0.1:0"
	}
	if r.server, err = relay.New(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(wire.PathRelay, r.server)
	r.http = httptest.NewServer(mux)
	t.Cleanup(func() { _ = r.server.Close(); r.http.Close() })
	r.listed = wire.Relay{Name: "near", URL: r.http.URL + wire.PathRelay}
	if udp {
		r.listed.UDP = r.server.Addr().String()
	}
	r.world = newWorld(t, nil)
	r.coord.hello()
	r.coord.script(func(c *coordinator) { c.welcome.Relays = []wire.Relay{r.listed} })
	r.coord.drop()
	r.coord.hello() // it comes back and is told
	return r
}

// grant makes a ticket for one side.
func (r *relayed) grant(session string, side relay.Side, key wire.Key) wire.RelayGrant {
	r.t.Helper()
	now := time.Now()
	ticket, err := relay.Sign(r.key, relay.Claims{Session: session, Side: side, Key: key, Issued: now, Expires: now.Add(time.Hour)})
	if err != nil {
		r.t.Fatal(err)
	}
	return wire.RelayGrant{Relay: r.listed, Ticket: ticket, Expires: now.Add(time.Hour)}
}

// TestServesThroughARelay: a job that reaches the gateway through a relay alone, over UDP or over a WebSocket, uses it like
// any other, and the gateway's next job does not need another connection.
func TestServesThroughARelay(t *testing.T) {
	for name, udp := range map[string]bool{"udp": true, "websocket": false} {
		t.Run(name, func(t *testing.T) {
			r := newRelayed(t, udp)
			for range 2 {
				j := r.newJob()
				j.offer.Candidates = nil
				j.offer.Relays = []wire.RelayGrant{r.grant(j.offer.Session, relay.Gateway, r.gateway.Key())}
				a, err := r.coord.ask(wire.FrameOffer, j.offer)
				if err != nil {
					t.Fatal(err)
				}
				g := r.grant(j.offer.Session, relay.Client, j.offer.Key)
				through := tunnel.Grant{Relay: tunnel.Relay{Name: g.Name, URL: g.URL}, Ticket: g.Ticket, Expires: g.Expires}
				if udp {
					through.Relay.UDP = []netip.AddrPort{r.server.Addr()}
				}
				_, err = j.tunnel.AddPeer(tunnel.PeerOptions{
					Key: a.Gateway.Key, Session: j.offer.Session, Initiate: true, Relays: []tunnel.Grant{through},
					AllowedIPs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")},
				})
				if err != nil {
					t.Fatal(err)
				}
				j.ping(a.Gateway.Addresses[0])
				if err := j.usable(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestHostileStandingTickets: what lasts for no time or too long is not shown to any relay, and what is no ticket only logged.
func TestHostileStandingTickets(t *testing.T) {
	r, _, _ := testRelays()
	var kept []time.Duration
	r.keep = func(ticket wire.Secret, life time.Duration) error {
		if ticket != "good" {
			return errors.New("no ticket")
		}
		kept = append(kept, life)
		return nil
	}
	for _, s := range []wire.Standing{
		{Ticket: "good"}, {Ticket: "good", Life: -1}, {Ticket: "good", Life: wire.Duration(relay.StandingLife + 1)},
		{Ticket: "bad", Life: wire.Duration(time.Minute)}, {Ticket: "good", Life: wire.Duration(time.Minute)},
	} {
		r.stand(s)
	}
	if !slices.Equal(kept, []time.Duration{time.Minute}) {
		t.Errorf("kept %v", kept)
	}
}
