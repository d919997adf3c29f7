package tunnel

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun/tuntest"

	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// newRelayedEnd is an end with relays; keep makes it a gateway.
func newRelayedEnd(t *testing.T, keep bool, relays ...*fakeRelay) *end {
	t.Helper()
	key, err := wire.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	ct := tuntest.NewChannelTUN()
	tunnel, err := New(Options{Key: key, TUN: ct.TUN(), Relays: RelayOptions{Dial: dialFakes(relays...), Keep: keep}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tunnel.Close() })
	var list []Relay
	for _, r := range relays {
		list = append(list, r.relay())
	}
	tunnel.SetRelays(list)
	return &end{Tunnel: tunnel, key: key, tun: ct}
}

// joinRelayed makes client and gateway peers of each other with grants for relays, and candidates of the gateway if there are any.
func joinRelayed(t *testing.T, client, gateway *end, candidates []wire.Candidate, relays ...*fakeRelay) (c, g *Peer) {
	t.Helper()
	session := client.PublicKey().SessionID()
	var mine, theirs []Grant
	for _, r := range relays {
		mine = append(mine, r.grant(t, session, relay.Client, client.PublicKey()))
		theirs = append(theirs, r.grant(t, session, relay.Gateway, gateway.PublicKey()))
	}
	c, g = joinGranted(t, client, gateway, mine, theirs)
	c.AddCandidates(candidates)
	return c, g
}

// joinGranted makes client and gateway peers of each other with these grants.
func joinGranted(t *testing.T, client, gateway *end, mine, theirs []Grant) (c, g *Peer) {
	t.Helper()
	session := client.PublicKey().SessionID()
	g, err := gateway.AddPeer(PeerOptions{
		Key: client.PublicKey(), Session: session, AllowedIPs: []netip.Prefix{netip.PrefixFrom(clientIP, 32)}, Relays: theirs,
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err = client.AddPeer(PeerOptions{
		Key: gateway.PublicKey(), Session: session, AllowedIPs: []netip.Prefix{netip.PrefixFrom(gatewayIP, 32)}, Relays: mine, Initiate: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	return c, g
}

const patient = time.Minute // for conditions that hold within milliseconds on a machine that is not busy

// on waits until both sides' traffic takes a way.
func on(t *testing.T, what string, c, g *Peer, is func(Path) bool) {
	t.Helper()
	within(t, patient, what, func() bool { return is(c.Status().Path) && is(g.Status().Path) })
}

func overUDP(name string) func(Path) bool {
	return func(p Path) bool { return p.Relay == name && p.Transport == UDP }
}

func overStream(name string) func(Path) bool {
	return func(p Path) bool { return p.Relay == name && p.Transport == WebSocket }
}

func isDirect(p Path) bool { return p.Relay == "" && p.Transport == UDP }

func TestRelayIsMeasured(t *testing.T) {
	one, two := newFakeRelay(t, "one"), newFakeRelay(t, "two")
	two.noUDP.Store(true)
	client := newRelayedEnd(t, false, two, one)
	ctx, cancel := context.WithTimeout(t.Context(), patient)
	defer cancel()
	s, err := client.Relay(ctx, "one")
	if err != nil || !s.Reachable || s.RTT <= 0 || s.Mapped != loopback(client.Port()) {
		t.Errorf("relay one: %+v, %v", s, err)
	}
	within(t, patient, "a WebSocket to the blocked relay", func() bool {
		list := client.Relays()
		return len(list) == 2 && list[0].Name == "one" && list[1].Name == "two" && list[1].Stream && !list[1].Reachable
	})
	if _, err := client.Relay(ctx, "two"); err == nil {
		t.Error("a relay that does not answer was measured")
	}
	if _, err := client.Relay(ctx, "three"); err == nil {
		t.Error("a relay that nobody named was measured")
	}
}

// A WebSocket to a relay whose addresses have changed since is closed with the tunnel, which would wait for it forever otherwise.
func TestCloseEndsTheStreamsOfFormerRelays(t *testing.T) {
	one := newFakeRelay(t, "one")
	client := newRelayedEnd(t, false, one)
	open := func() bool {
		one.mu.Lock()
		defer one.mu.Unlock()
		return len(one.streams) > 0
	}
	one.noUDP.Store(true)
	within(t, patient, "a WebSocket", open)
	changed := one.relay()
	changed.UDP = nil
	client.SetRelays([]Relay{changed})
	closed := make(chan error, 1)
	go func() { closed <- client.Close() }()
	select {
	case err := <-closed:
		if err != nil || open() {
			t.Errorf("closed: %v, and a stream is open: %v", err, open())
		}
	case <-time.After(patient):
		one.mu.Lock()
		for s := range one.streams {
			s.once.Do(func() { close(s.quit) }) // or the test would not end either
		}
		one.mu.Unlock()
		t.Error("the tunnel does not close")
		<-closed
	}
}

// Packets flow through a relay over UDP, and a better path takes over when there is one.
func TestPacketsFlowThroughARelay(t *testing.T) {
	r := newFakeRelay(t, "r")
	client, gateway := newRelayedEnd(t, false, r), newRelayedEnd(t, true, r)
	c, g := joinRelayed(t, client, gateway, nil, r)
	ping(t, client, gateway)
	on(t, "through the relay over udp", c, g, overUDP("r"))
	within(t, patient, "both sides know that the most fits", func() bool { return c.MTU() == DefaultMTU && g.MTU() == DefaultMTU })
	c.AddCandidates(hostCandidate(gateway.Port()))
	on(t, "directly", c, g, isDirect)
	ping(t, client, gateway)
}

// Where UDP is blocked on one side, or on both, the WebSocket that was dialled meanwhile is used at once.
func TestBlockedUDPTakesTheStream(t *testing.T) {
	for name, both := range map[string]bool{"client": false, "both": true} {
		t.Run(name, func(t *testing.T) {
			blocked, open := newFakeRelay(t, "r"), newFakeRelay(t, "s")
			client, gateway := newRelayedEnd(t, false, blocked, open), newRelayedEnd(t, true, blocked, open)
			if both {
				blocked.noUDP.Store(true)
			}
			c, g := joinRelayed(t, client, gateway, nil, blocked)
			if !both {
				ping(t, client, gateway)
				blocked.noUDP.Store(true)
			}
			stop := time.Now().Add(patient)
			for !overStream("r")(c.Status().Path) || !overStream("r")(g.Status().Path) {
				if time.Now().After(stop) {
					t.Fatalf("not over a websocket: %+v and %+v", c.Status(), g.Status())
				}
				client.tun.Outbound <- tuntest.Ping(gatewayIP, clientIP)
				time.Sleep(20 * time.Millisecond)
			drain:
				for {
					select {
					case <-gateway.tun.Inbound:
					default:
						break drain
					}
				}
			}
			ping(t, client, gateway)
		})
	}
}

// One relay's restart is noticed by both sides, and they bind anew.
func TestRestartedRelayIsBoundAgain(t *testing.T) {
	r := newFakeRelay(t, "r")
	client, gateway := newRelayedEnd(t, false, r), newRelayedEnd(t, true, r)
	c, g := joinRelayed(t, client, gateway, nil, r)
	ping(t, client, gateway)
	on(t, "through the relay", c, g, overUDP("r"))
	before := r.binds.Load()
	r.restart()
	stop := time.Now().Add(patient)
	for r.binds.Load() < before+2 {
		if time.Now().After(stop) {
			t.Fatalf("%d binds after the restart", r.binds.Load()-before)
		}
		client.tun.Outbound <- tuntest.Ping(gatewayIP, clientIP)
		time.Sleep(20 * time.Millisecond)
		select {
		case <-gateway.tun.Inbound:
		default:
		}
	}
	within(t, patient, "the path works again", func() bool { return overUDP("r")(c.Status().Path) })
}

// A dead relay is replaced by the second one.
func TestSecondRelayTakesOver(t *testing.T) {
	one, two := newFakeRelay(t, "one"), newFakeRelay(t, "two")
	one.noDial.Store(true)
	client, gateway := newRelayedEnd(t, false, one, two), newRelayedEnd(t, true, one, two)
	c, g := joinRelayed(t, client, gateway, nil, one, two)
	ping(t, client, gateway)
	within(t, patient, "both relays are bound", func() bool { return one.binds.Load() >= 2 && two.binds.Load() >= 2 })
	first := c.Status().Path.Relay
	dead, alive := one, "two"
	if first == "two" {
		dead, alive = two, "one"
	}
	dead.noUDP.Store(true)
	dead.noDial.Store(true)
	stop := time.Now().Add(patient)
	for !overUDP(alive)(c.Status().Path) || !overUDP(alive)(g.Status().Path) {
		if time.Now().After(stop) {
			t.Fatalf("%+v and %+v", c.Status(), g.Status())
		}
		client.tun.Outbound <- tuntest.Ping(gatewayIP, clientIP)
		time.Sleep(20 * time.Millisecond)
		select {
		case <-gateway.tun.Inbound:
		default:
		}
	}
	for _, h := range c.Status().History {
		if h.Path == (Path{}) {
			t.Errorf("there was no path at all: %+v", c.Status().History)
		}
	}
}

// A removed peer unbinds, so that the relay forgets its session.
func TestRemovedPeerUnbinds(t *testing.T) {
	r := newFakeRelay(t, "r")
	client, gateway := newRelayedEnd(t, false, r), newRelayedEnd(t, true, r)
	c, g := joinRelayed(t, client, gateway, nil, r)
	ping(t, client, gateway)
	client.RemovePeer(c)
	gateway.RemovePeer(g)
	within(t, patient, "both sides are unbound", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, ends := range r.sides {
			if *ends != ([2]fakeEnd{}) {
				return false
			}
		}
		return true
	})
}

// A ticket that the relay refuses harms nothing: the session goes on without it.
func TestRefusedTicketIsGivenUp(t *testing.T) {
	r, other := newFakeRelay(t, "r"), newFakeRelay(t, "other")
	client, gateway := newRelayedEnd(t, false, r), newRelayedEnd(t, true, r)
	other.name = "r"
	session := client.PublicKey().SessionID()
	forged := other.grant(t, session, relay.Client, client.PublicKey())
	forged.Relay = r.relay()
	if _, err := gateway.AddPeer(PeerOptions{Key: client.PublicKey(), Session: session, AllowedIPs: []netip.Prefix{netip.PrefixFrom(clientIP, 32)}}); err != nil {
		t.Fatal(err)
	}
	c, err := client.AddPeer(PeerOptions{
		Key: gateway.PublicKey(), Session: session, AllowedIPs: []netip.Prefix{netip.PrefixFrom(gatewayIP, 32)},
		Relays: []Grant{forged, {Relay: r.relay(), Ticket: "short"}}, Initiate: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	within(t, patient, "the leg is given up", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.legs) == 1 && c.legs[0].broken && c.legs[0].path == nil
	})
	c.AddCandidates(hostCandidate(gateway.Port()))
	ping(t, client, gateway)
}

// Frames are taken from the relays that a session is bound to, and from nowhere else.
func TestForeignFramesAreDropped(t *testing.T) {
	r := newFakeRelay(t, "r")
	client, gateway := newRelayedEnd(t, false, r), newRelayedEnd(t, true, r)
	c, g := joinRelayed(t, client, gateway, nil, r)
	ping(t, client, gateway)
	on(t, "through the relay", c, g, overUDP("r"))
	h := g.legs[0].header
	check, err := natCheck(c, 1<<62)
	if err != nil {
		t.Fatal(err)
	}
	from, answers := attack(t, gateway, framed(check, h))
	if answers > 0 {
		t.Errorf("a framed check from elsewhere drew %d packets", answers)
	}
	if gateway.bind.table.lookup(spot{remote: from, header: h}) != nil {
		t.Error("a framed check from elsewhere made a path")
	}
}

// A relay that has no room is asked again, by both sides, instead of being given up for the session.
func TestAFullRelayIsTriedAgain(t *testing.T) {
	r := newFakeRelay(t, "r")
	r.full.Store(true)
	client, gateway := newRelayedEnd(t, false, r), newRelayedEnd(t, true, r)
	c, g := joinRelayed(t, client, gateway, nil, r)
	for _, p := range []*Peer{c, g} {
		within(t, patient, "the leg rests", func() bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			l := p.legs[0]
			return l.mode != "" && !l.broken && !l.bound && l.tries == 0 && time.Until(l.next) > 2*bindRetry
		})
	}
	r.full.Store(false)
	for _, p := range []*Peer{c, g} {
		p.act(func(now time.Time) { p.legs[0].next = now })
	}
	ping(t, client, gateway)
	on(t, "through the relay", c, g, func(p Path) bool { return p.Relay == "r" })
}

// A binding moves from a WebSocket to UDP as soon as that answers, and packets flow.
func TestABindingMovesToUDP(t *testing.T) {
	r := newFakeRelay(t, "r")
	r.noUDP.Store(true)
	client, gateway := newRelayedEnd(t, false, r), newRelayedEnd(t, true, r)
	c, g := joinRelayed(t, client, gateway, nil, r)
	ping(t, client, gateway)
	on(t, "over websockets", c, g, overStream("r"))
	r.noUDP.Store(false)
	client.Refresh()
	gateway.Refresh()
	on(t, "over udp", c, g, overUDP("r"))
	ping(t, client, gateway)
}

// A path that moves with its binding carries on at once where the old one carried, on either side, and the old one is gone.
func TestMovedPathCarriesOn(t *testing.T) {
	for _, lead := range []bool{true, false} {
		d := newDrive(lead)
		from, to, other := d.relayed(1), d.relayed(2), d.relayed(3)
		for _, p := range []*path{from, other} {
			p.valid, p.srtt = true, 10*time.Millisecond
		}
		d.chosen, d.nominee = from, from
		d.moved(from, to, d.now)
		if d.chosen != to || d.nominee != to || !to.valid || !to.open.Load() || to.srtt != from.srtt || to.route.spot != to.spot {
			t.Errorf("lead %t: the new path does not carry on: %+v", lead, to)
		}
		if from.valid || len(d.paths) != 2 || len(d.dropped) != 1 || d.dropped[0] != from {
			t.Errorf("lead %t: the old path is still there", lead)
		}
		if len(d.carried) != 1 || d.carried[0] != to {
			t.Errorf("lead %t: traffic went over %v meanwhile", lead, d.carried)
		}
		third := d.relayed(4)
		d.moved(other, third, d.now)
		if d.chosen != to || !third.valid || len(d.carried) != 1 {
			t.Errorf("lead %t: a path that does not carry took the traffic", lead)
		}
	}
}
