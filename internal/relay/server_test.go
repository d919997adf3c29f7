package relay

import (
	"bytes"
	"crypto/ed25519"
	"fmt"
	"net/netip"
	"testing"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// ways are the ways in which an end reaches a relay.
var ways = map[string]func(testing.TB, *stage) end{
	"UDP":       func(tb testing.TB, st *stage) end { return newUDP(tb, st.Addr()) },
	"WebSocket": func(tb testing.TB, st *stage) end { return newStream(tb, st) },
}

func TestForwards(t *testing.T) {
	for clientWay, newClient := range ways {
		for gatewayWay, newGateway := range ways {
			t.Run(clientWay+" to "+gatewayWay, func(t *testing.T) {
				st, session := newStage(t, nil), newTalk(t)
				client, gateway := newClient(t, st), newGateway(t, st)
				mustBind(t, client, session, Client)
				mustBind(t, gateway, session, Gateway)
				exchange(t, client, gateway, session.channel)
				exchange(t, gateway, client, session.channel)
				eventually(t, "all is counted", func() bool {
					s := st.Stats()
					return s.Sessions == 1 && s.Packets == 2*60 && s.Bound == 2 && s.Junk == 0
				})
			})
		}
	}
}

// exchange sends packets of several sizes and wants them in order.
func exchange(t *testing.T, from, to end, c Channel) {
	t.Helper()
	for i := range 60 {
		want := bytes.Repeat([]byte{byte(i)}, 1+(i/3%20)*75)
		from.frames(c, want)
		if _, got, pkt := to.next(); got != c || !bytes.Equal(pkt, want) {
			t.Fatalf("packet %d: %d bytes came on %x", i, len(pkt), got)
		}
	}
}

// A side binds and sends at once; the answer comes first, and nothing is lost.
func TestFramesFollowABindAtOnce(t *testing.T) {
	for way, newEnd := range ways {
		t.Run(way, func(t *testing.T) {
			st, session := newStage(t, nil), newTalk(t)
			gateway, client := newUDP(t, st.Addr()), newEnd(t, st)
			mustBind(t, gateway, session, Gateway)
			msg, k := bindMessage(t, session, Client, client.offer(), nil)
			client.stun(msg)
			client.frames(session.channel, []byte("handshake"))
			if _, _, pkt := gateway.next(); string(pkt) != "handshake" {
				t.Fatalf("got %q", pkt)
			}
			if a := answer(t, client, &k); a.Code != 0 {
				t.Fatalf("refused with %d", a.Code)
			}
		})
	}
}

func TestBindsAnswerCarriesTheMappedAddress(t *testing.T) {
	st, session := newStage(t, nil), newTalk(t)
	client := newUDP(t, st.Addr())
	if a := bind(t, client, session, Client, nil); a.Mapped != client.addr() {
		t.Fatalf("mapped to %s, not %s", a.Mapped, client.addr())
	}
}

// A NAT gives a side another address, or it changes between UDP and WebSocket: the new binding takes over, the old one is
// worth nothing, and taking it back does not harm the new one.
func TestBindingMoves(t *testing.T) {
	for oldWay, newOld := range ways {
		for newWay, newNew := range ways {
			t.Run(oldWay+" to "+newWay, func(t *testing.T) {
				st, session := newStage(t, nil), newTalk(t)
				gateway, before, after := newUDP(t, st.Addr()), newOld(t, st), newNew(t, st)
				mustBind(t, gateway, session, Gateway)
				mustBind(t, before, session, Client)
				silent(t, before, gateway, session)
				mustBind(t, after, session, Client)
				before.frames(session.channel, []byte("stale"))
				if a := bind(t, before, session, Client, func(b *Bind) { b.Unbind = true }); a.Code != 0 || !a.Unbind {
					t.Fatalf("unbinding gives %+v", a)
				}
				silent(t, after, gateway, session)
				silent(t, gateway, after, session)
			})
		}
	}
}

func TestUnbind(t *testing.T) {
	for way, newEnd := range ways {
		t.Run(way, func(t *testing.T) {
			st, session, other := newStage(t, nil), newTalk(t), newTalk(t)
			client, gateway := newEnd(t, st), newUDP(t, st.Addr())
			for _, s := range []*talk{session, other} {
				mustBind(t, client, s, Client)
				mustBind(t, gateway, s, Gateway)
			}
			if a := bind(t, client, session, Client, func(b *Bind) { b.Unbind = true }); a.Code != 0 {
				t.Fatalf("refused with %d", a.Code)
			}
			gateway.frames(session.channel, []byte("nobody is there"))
			client.frames(session.channel, []byte("nobody may"))
			silent(t, client, gateway, other)
			silent(t, gateway, client, other)
			if s := st.Stats(); s.Sessions != 2 || s.Alone != 1 || s.Strangers != 1 {
				t.Fatalf("counts %+v", s)
			}
			bind(t, gateway, session, Gateway, func(b *Bind) { b.Unbind = true })
			if s := st.Stats(); s.Sessions != 1 {
				t.Fatalf("%d sessions are left", s.Sessions)
			}
		})
	}
}

// A gateway's WebSocket carries all its sessions; when it goes, nothing is left of them on its side.
func TestOneWebSocketCarriesManySessions(t *testing.T) {
	const sessions = 50
	st := newStage(t, nil)
	gateway := newStream(t, st)
	var talks []*talk
	var clients []*udpEnd
	for range sessions {
		s, c := newTalk(t), newUDP(t, st.Addr())
		s.gateway = key(t, 2)
		mustBind(t, gateway, s, Gateway)
		mustBind(t, c, s, Client)
		talks, clients = append(talks, s), append(clients, c)
	}
	for i, s := range talks {
		silent(t, gateway, clients[i], s)
		silent(t, clients[i], gateway, s)
	}
	if s := st.Stats(); s.Sessions != sessions || s.Links != 1 {
		t.Fatalf("counts %+v", s)
	}
	if err := gateway.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the WebSocket is gone", func() bool { return st.Stats().Links == 0 })
	clients[0].frames(talks[0].channel, []byte("nobody is there"))
	eventually(t, "the frame is dropped", func() bool { return st.Stats().Alone == 1 })
	for i, s := range talks {
		bind(t, clients[i], s, Client, func(b *Bind) { b.Unbind = true })
	}
	if s := st.Stats(); s.Sessions != 0 {
		t.Fatalf("%d sessions are left", s.Sessions)
	}
}

// A relay that starts anew knows nobody, and its key says so.
func TestARestartChangesTheKey(t *testing.T) {
	session := newTalk(t)
	first, second := newStage(t, nil), newStage(t, nil)
	o, client := newUDP(t, first.Addr()).offer(), newUDP(t, second.Addr())
	if client.offer().Key == o.Key {
		t.Fatal("the key is the same")
	}
	msg, k := bindMessage(t, session, Client, o, nil)
	client.stun(msg)
	a := answer(t, client, &k)
	if a.Code != CodeStaleNonce {
		t.Fatalf("a bind from before gets %d", a.Code)
	}
	msg, k = bindMessage(t, session, Client, a.Offer, nil)
	client.stun(msg)
	if a := answer(t, client, &k); a.Code != 0 {
		t.Fatalf("what comes with 438 is not good: %d", a.Code)
	}
}

// The relay answers STUN like any server, on its probe port too.
func TestSTUN(t *testing.T) {
	st := newStage(t, func(o *Options) { o.Probe = "127.0.0.1:0" })
	for _, to := range []netip.AddrPort{st.Addr(), st.ProbeAddr()} {
		e, id := newUDP(t, to), txid()
		e.stun(nat.BindingRequest(id))
		msg, _, _ := e.next()
		if got, mapped, err := nat.BindingResponse(msg); err != nil || got != id || mapped != e.addr() {
			t.Errorf("%s: %s, %v", to, mapped, err)
		}
	}
	e := newUDP(t, st.ProbeAddr())
	e.stun(WantRequest(txid()))
	msg, _, _ := e.next()
	if _, ok := ParseOffer(msg); ok {
		t.Error("the probe port offers to relay")
	}
}

func TestWebSocketsAlone(t *testing.T) {
	st, session := newStage(t, func(o *Options) { o.UDP = "" }), newTalk(t)
	if st.Addr().IsValid() || st.ProbeAddr().IsValid() {
		t.Fatal("a UDP port is open")
	}
	client, gateway := newStream(t, st), newStream(t, st)
	mustBind(t, client, session, Client)
	mustBind(t, gateway, session, Gateway)
	exchange(t, client, gateway, session.channel)
}

func TestRateIsBounded(t *testing.T) {
	st, session := newStage(t, nil), newTalk(t)
	client, gateway := newUDP(t, st.Addr()), newUDP(t, st.Addr())
	slow := func(c *Claims) { c.Rate = 1 } // raised to MinRate: a few packets in the time of a burst
	bind(t, client, session, Client, func(b *Bind) { b.Ticket = session.ticket(t, Client, slow) })
	mustBind(t, gateway, session, Gateway)
	sent := uint64(0)
	for ; st.Stats().OverRate < 100; sent++ {
		client.frames(session.channel, make([]byte, 100))
	}
	eventually(t, "all are counted", func() bool { s := st.Stats(); return s.Packets+s.OverRate+s.Unread >= sent })
	through := st.Stats().Packets
	if through == 0 || through == sent {
		t.Fatalf("%d of %d come through", through, sent)
	}
	for range through {
		gateway.next()
	}
	silent(t, gateway, client, session) // the other direction has a rate of its own
}

func TestSessionsAreBounded(t *testing.T) {
	for way, newEnd := range ways {
		t.Run(way, func(t *testing.T) {
			st := newStage(t, func(o *Options) { o.Sessions = 2 })
			e := newEnd(t, st)
			mustBind(t, e, newTalk(t), Client)
			mustBind(t, e, newTalk(t), Gateway)
			if a := bind(t, e, newTalk(t), Client, nil); a.Code != CodeFull {
				t.Fatalf("the third gets %d", a.Code)
			}
			if n := st.Stats().Sessions; n != 2 {
				t.Fatalf("%d sessions", n)
			}
		})
	}
}

func TestOptionsAreChecked(t *testing.T) {
	for name, edit := range map[string]func(*Options){
		"no key":       func(o *Options) { o.Keys = nil },
		"a broken key": func(o *Options) { o.Keys = []ed25519.PublicKey{{1}} },
		"rate":         func(o *Options) { o.Rate = 1 },
		"queue":        func(o *Options) { o.FlowQueue = 1 },
		"queues":       func(o *Options) { o.FlowQueue, o.Queue = 1<<20, 1<<19 },
		"sockets":      func(o *Options) { o.Sockets = -1 },
		"sessions":     func(o *Options) { o.Sessions = -1 },
		"links":        func(o *Options) { o.Links = -1 },
		"address":      func(o *Options) { o.UDP = "nonsense" },
		"probe":        func(o *Options) { o.Probe = "nonsense" },
	} {
		opts := Options{UDP: "127.0.0.1:0", Keys: signers()}
		edit(&opts)
		if s, err := New(t.Context(), opts); err == nil {
			_ = s.Close()
			t.Errorf("%s passes", name)
		}
	}
}

// Nothing in what is printed or logged of a ticket, a claim or an option gives a secret away.
func TestSecretsDoNotPrint(t *testing.T) {
	s, err := Sign(signer, Claims{Session: key(t, 1).Public().SessionID(), Key: key(t, 1).Public(), Issued: epoch, Expires: epoch.Add(1e10)})
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("%v %+v %s %q", s, wire.RelayGrant{Ticket: s}, s, s); bytes.Contains([]byte(got), []byte(s.Reveal())) {
		t.Fatal(got)
	}
}

// Two relays on one port would take half of each other's packets.
func TestAPortIsNotShared(t *testing.T) {
	st := newStage(t, nil)
	if s, err := New(t.Context(), Options{UDP: st.Addr().String(), Keys: signers()}); err == nil {
		_ = s.Close()
		t.Fatal("a second relay serves on the same port")
	}
}

func TestKeysCanBeReplaced(t *testing.T) {
	st, before, after := newStage(t, nil), newTalk(t), newTalk(t)
	client := newUDP(t, st.Addr())
	known := before.ticket(t, Client, nil)
	use := func(b *Bind) { b.Ticket = known }
	bind(t, client, before, Client, use)
	other := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{8}, ed25519.SeedSize)).Public().(ed25519.PublicKey)
	if err := st.SetKeys(nil); err == nil {
		t.Fatal("no key at all is taken")
	}
	if err := st.SetKeys([]ed25519.PublicKey{other}); err != nil {
		t.Fatal(err)
	}
	if a := bind(t, client, after, Client, nil); a.Code != CodeTicket {
		t.Fatalf("a ticket of a coordinator that is gone gets %d", a.Code)
	}
	if a := bind(t, client, before, Client, use); a.Code != 0 {
		t.Fatalf("a ticket in use gets %d", a.Code)
	}
}
