package tunnel

import (
	"context"
	"crypto/ed25519"
	"errors"
	"net/http/httptest"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun/tuntest"

	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// realRelay is a relay that takes WebSockets alone, and the key that signs tickets for it.
func realRelay(t *testing.T) (*relay.Server, *httptest.Server, ed25519.PrivateKey) {
	t.Helper()
	public, signer, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	s, err := relay.New(t.Context(), relay.Options{Keys: []ed25519.PublicKey{public}})
	if err != nil {
		t.Fatal(err)
	}
	front := httptest.NewServer(s)
	t.Cleanup(func() { _ = s.Close(); front.Close() })
	return s, front, signer
}

// A gateway keeps a WebSocket ready before there is a session where UDP does not answer, and a session takes it as it is.
func TestAWebSocketStandsBeforeThereIsASession(t *testing.T) {
	server, front, signer := realRelay(t)
	one := Relay{Name: "r", URL: front.URL}
	newEnd := func(keep bool) *end {
		key, err := wire.NewPrivateKey()
		if err != nil {
			t.Fatal(err)
		}
		ct := tuntest.NewChannelTUN()
		tunnel, err := New(Options{Key: key, TUN: ct.TUN(), Relays: RelayOptions{Dial: DialRelay(front.Client(), nil), Keep: keep}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = tunnel.Close() })
		tunnel.SetRelays([]Relay{one})
		return &end{Tunnel: tunnel, key: key, tun: ct}
	}
	gateway := newEnd(true)
	if err := gateway.SetStanding("not a ticket", time.Minute); err == nil {
		t.Error("what is no ticket was taken")
	}
	ticket, err := relay.SignStanding(signer, gateway.PublicKey(), time.Now(), time.Now().Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if err := gateway.SetStanding(ticket, time.Minute); err != nil {
		t.Fatal(err)
	}
	within(t, patient, "a WebSocket that stands", func() bool { return gateway.Relays()[0].Standing })
	if st := server.Stats(); st.Links != 1 || st.Sessions != 0 {
		t.Errorf("%+v", st)
	}
	if err := gateway.SetStanding(ticket, time.Minute); err != nil {
		t.Fatal(err)
	}
	within(t, patient, "a renewal", func() bool { return server.Stats().Bound == 2 })

	client := newEnd(false)
	session := client.PublicKey().SessionID()
	grant := func(side relay.Side, key wire.Key) []Grant {
		secret, err := relay.Sign(signer, relay.Claims{Session: session, Side: side, Key: key, Issued: time.Now(), Expires: time.Now().Add(time.Hour)})
		if err != nil {
			t.Fatal(err)
		}
		return []Grant{{Relay: one, Ticket: secret, Expires: time.Now().Add(time.Hour)}}
	}
	c, g := joinGranted(t, client, gateway, grant(relay.Client, client.PublicKey()), grant(relay.Gateway, gateway.PublicKey()))
	ping(t, client, gateway)
	on(t, "through the relay's WebSocket", c, g, overStream("r"))
	if st := server.Stats(); st.Links != 2 {
		t.Errorf("%d WebSockets, want one for each side", st.Links)
	}
}

// A relay that has long been away is dialled anew as soon as a ticket comes, and when a session needs it, not when the pause after the last
// failure is over.
func TestARelayThatIsBackIsNotWaitedFor(t *testing.T) {
	_, front, signer := realRelay(t)
	one := Relay{Name: "r", URL: front.URL}
	var away atomic.Bool
	away.Store(true)
	real := DialRelay(front.Client(), nil)
	key, err := wire.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	g, err := New(Options{Key: key, TUN: tuntest.NewChannelTUN().TUN(), Relays: RelayOptions{Keep: true, Dial: func(ctx context.Context, url string) (RelayStream, error) {
		if away.Load() {
			return nil, errors.New("nobody is there")
		}
		return real(ctx, url)
	}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Close() })
	ticket, err := relay.SignStanding(signer, g.PublicKey(), time.Now(), time.Now().Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	g.SetRelays([]Relay{one})
	n := func() *node { return g.relays.nodes["r"] }
	long := func() { // as after many failures
		t.Helper()
		within(t, patient, "a dial that fails", func() bool {
			g.relays.mu.Lock()
			defer g.relays.mu.Unlock()
			if n().failed == 0 || n().dialing {
				return false
			}
			n().redial, n().failed = time.Now().Add(time.Hour), 10
			return true
		})
	}
	if err := g.SetStanding(ticket, time.Minute); err != nil {
		t.Fatal(err)
	}
	long()
	away.Store(false)
	if err := g.SetStanding(ticket, time.Minute); err != nil {
		t.Fatal(err)
	}
	within(t, patient, "a WebSocket after a ticket", func() bool { return g.Relays()[0].Standing })

	away.Store(true)
	g.relays.mu.Lock()
	open := n().stream
	g.relays.mu.Unlock()
	open.close()
	long()
	away.Store(false)
	job, err := wire.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	public := job.Public()
	secret, err := relay.Sign(signer, relay.Claims{Session: public.SessionID(), Side: relay.Gateway, Key: g.PublicKey(), Issued: time.Now(), Expires: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.AddPeer(PeerOptions{Key: public, Session: public.SessionID(), Relays: []Grant{{Relay: one, Ticket: secret, Expires: time.Now().Add(time.Hour)}}}); err != nil {
		t.Fatal(err)
	}
	within(t, patient, "a WebSocket for a session", func() bool { return g.Relays()[0].Stream })
}

// Without a ticket, with one that has ended, and while UDP answers, no WebSocket is kept.
func TestNoWebSocketStandsThatIsNotNeeded(t *testing.T) {
	now := time.Now()
	n := newNode(Relay{Name: "r", URL: "ws://r", UDP: []netip.AddrPort{loopback(1)}})
	n.kept = true
	for _, tc := range []struct {
		state  udpState
		unsure bool
		stands bool
		legs   int
		want   bool
	}{
		{udpUnknown, false, true, 0, true}, // in parallel with the first question
		{udpUnknown, false, false, 0, false},
		{udpDown, false, true, 0, true},
		{udpDown, false, false, 0, false},
		{udpDown, false, false, 1, true},
		{udpUp, false, true, 1, false},
		{udpUp, true, true, 0, true}, // the network has changed, and UDP may be gone
	} {
		n.state, n.unsure, n.legs = tc.state, tc.unsure, map[*leg]struct{}{}
		for range tc.legs {
			n.legs[&leg{}] = struct{}{}
		}
		if got := n.needs(true, false, tc.stands); got != tc.want {
			t.Errorf("%+v: %v", tc, got)
		}
	}
	s := stands{relay.Standing{1}, now}
	if s.expire(now.Add(-time.Second)); s.until.IsZero() {
		t.Error("a ticket is forgotten before its end")
	}
	if s.expire(now); !s.until.IsZero() || s.ticket != nil {
		t.Error("a ticket is kept after its end")
	}
}
