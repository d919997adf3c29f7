package server

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/culvertnet/culvert/coordinator/api"
	"github.com/culvertnet/culvert/coordinator/api/apitest"
	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// configured changes a rig's file and restarts it with that.
func (r *rig) configured(old, replacement string) {
	r.t.Helper()
	r.stop()
	if !strings.Contains(r.doc, old) {
		r.t.Fatalf("the file has no %q", old)
	}
	r.doc = strings.Replace(r.doc, old, replacement, 1)
	r.write(r.doc)
	r.start()
}

func (r *rig) info() (info wire.Info) {
	r.t.Helper()
	if err := r.call(http.MethodGet, wire.PathInfo, "", nil, &info); err != nil {
		r.t.Fatal(err)
	}
	return info
}

// ticketKey is the key with which a node's tickets are verified.
func ticketKey(t *testing.T, r *rig) []ed25519.PublicKey {
	t.Helper()
	key, err := r.server.store.TicketKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return []ed25519.PublicKey{key.Public().(ed25519.PublicKey)}
}

// holds reports whether a relay that knows these keys takes a ticket.
func holds(t *testing.T, g wire.RelayGrant, keys []ed25519.PublicKey) bool {
	t.Helper()
	ticket, err := relay.DecodeTicket(g.Ticket)
	if err != nil {
		t.Fatal(err)
	}
	_, err = relay.Verify(ticket, keys, time.Now())
	return err == nil
}

// TestWithoutUDP: a coordinator on a platform without UDP names other STUN servers and relays, and its own over WebSocket.
func TestWithoutUDP(t *testing.T) {
	r := newRig(t, Options{})
	r.configured(`udp: "127.0.0.1:0"`, `udp: off
stun: ["stun.example.com:3478", "stun.example.com:3479"]
relays: [{name: far, udp: "relay.example.com:3478"}]`)
	if r.server.STUNAddr() != nil {
		t.Errorf("UDP is open at %s", r.server.STUNAddr())
	}
	info := r.info()
	if !slices.Equal(info.STUN, []string{"stun.example.com:3478", "stun.example.com:3479"}) ||
		!slices.Equal(info.Relays, []wire.Relay{{Name: "coordinator", URL: publicURL + wire.PathRelay}, {Name: "far", UDP: "relay.example.com:3478"}}) {
		t.Errorf("info %+v", info)
	}
	g := r.gateway()
	if !slices.Equal(g.Welcome.STUN, info.STUN) || !slices.Equal(g.Welcome.Relays, info.Relays) {
		t.Errorf("welcome %+v", g.Welcome)
	}
	if s := r.job().mustJoin(); len(s.Relays) != 2 || s.Relays[0].UDP != "" || !holds(t, s.Relays[0], ticketKey(t, r)) {
		t.Errorf("relays %+v", s.Relays)
	}
}

// TestNoRelayAtAll: without its own relay and others, a coordinator gives no tickets and serves no relay.
func TestNoRelayAtAll(t *testing.T) {
	r := newRig(t, Options{})
	r.configured("state: {dir: state}", "state: {dir: state}\nrelay: off\nprobe: off")
	r.gateway()
	if info := r.info(); len(info.Relays) != 0 || len(info.STUN) != 1 {
		t.Errorf("info %+v", info)
	}
	if s := r.job().mustJoin(); len(s.Relays) != 0 {
		t.Errorf("relays %+v", s.Relays)
	}
	resp, err := r.do(http.MethodGet, wire.PathRelay, "", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("the relay's path answers %s", resp.Status)
	}
}

// TestTicketsOutliveARestart: a ticket holds for as long as the session, whatever the coordinator does meanwhile.
func TestTicketsOutliveARestart(t *testing.T) {
	r := newRig(t, Options{})
	r.gateway()
	s := r.job().mustJoin()
	before := r.info().TicketKey
	r.stop()
	r.start()
	if !holds(t, s.Relays[0], ticketKey(t, r)) {
		t.Error("the coordinator does not take its own ticket any more")
	}
	if after := r.info().TicketKey; after == "" || after != before {
		t.Errorf("the key that relays are given changed from %q to %q", before, after)
	}
}

// TestNodesShareTheTicketKey: what one node signs, a relay of another takes.
func TestNodesShareTheTicketKey(t *testing.T) {
	nats := natsServer(t)
	one, two := newRig(t, Options{}), newRig(t, Options{})
	for _, r := range []*rig{one, two} {
		r.configured("state: {dir: state}", "audit: {max_size: 64MiB}\nstate: {nats: ['"+nats+"']}")
	}
	one.gateway()
	s := one.job().mustJoin()
	if a, b := one.info().TicketKey, two.info().TicketKey; a != b || !holds(t, s.Relays[0], ticketKey(t, two)) {
		t.Errorf("two nodes, keys %q and %q", a, b)
	}
}

// TestGatewaysHearOfNewRelays: a gateway comes back to be told when the list of relays changes.
func TestGatewaysHearOfNewRelays(t *testing.T) {
	r := newRig(t, Options{})
	g := r.gateway()
	r.write(r.doc + `relays: [{name: far, udp: "relay.example.com:3478"}]` + "\n")
	if err := r.server.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-g.Done()
	if websocket.CloseStatus(g.Err()) != websocket.StatusServiceRestart {
		t.Errorf("the stream ended with %v", g.Err())
	}
	r.eventually("the old stream is gone", func() bool { return len(r.server.store.Gateways("corp")) == 0 })
	g = r.gateway(func(o *apitest.Options) { o.Hello = hello("east") })
	if len(g.Welcome.Relays) != 2 {
		t.Errorf("welcome %+v", g.Welcome)
	}
	if s := r.job().mustJoin(); len(s.Relays) != 2 || s.Relays[1].Name != "far" {
		t.Errorf("relays %+v", s.Relays)
	}
	if err := r.server.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-g.Done():
		t.Error("a reload that changes nothing ended the stream")
	default:
	}
}

// side is one side of a session on the coordinator's relay over a WebSocket.
type side struct {
	t       *testing.T
	stream  *relay.Stream
	channel relay.Channel
}

// bind opens a WebSocket to a rig's relay and binds it with a ticket.
func (r *rig) bind(t *testing.T, session string, g wire.RelayGrant, key wire.PrivateKey) *side {
	t.Helper()
	s, err := relay.Dial(t.Context(), relay.DialOptions{URL: r.url() + wire.PathRelay, HTTP: &http.Client{Transport: r.client.Transport}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	ticket, err := relay.DecodeTicket(g.Ticket)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := relay.DeriveBindKey(key, s.Offer().Key)
	if err != nil {
		t.Fatal(err)
	}
	s.SendSTUN(relay.AppendBind(nil, relay.Bind{ID: nat.TxID{1}, Nonce: s.Offer().Nonce, Ticket: ticket}, &secret))
	channel, err := relay.ChannelOf(session)
	if err != nil {
		t.Fatal(err)
	}
	out := &side{t, s, channel}
	if a, ok := relay.ParseAnswer(out.receive()); !ok || a.Code != 0 {
		t.Fatalf("the bind is answered with %d, %t", a.Code, ok)
	}
	return out
}

// receive gives the next STUN message or packet.
func (s *side) receive() []byte {
	s.t.Helper()
	msg, err := s.stream.Receive()
	if err != nil {
		s.t.Fatal(err)
	}
	blocks := relay.WalkBlocks(msg)
	if !blocks.Next() {
		s.t.Fatal("an empty message")
	}
	if frames := blocks.Frames(); frames.Next() {
		return slices.Clone(frames.Packet)
	}
	return blocks.Data
}

// TestRelaysASession: with the tickets that a join gives, both sides meet on the coordinator's own relay, and with those of
// before a restart as well.
func TestRelaysASession(t *testing.T) {
	r := newRig(t, Options{})
	ours, err1 := wire.NewPrivateKey()
	theirs, err2 := wire.NewPrivateKey()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	g := r.gateway(func(o *apitest.Options) { o.Hello.Key = theirs.Public() })
	j := r.job()
	j.key = ours.Public()
	s := j.mustJoin()
	var offer wire.Offer
	if err := json.Unmarshal(g.Frames(wire.FrameOffer)[0].Body, &offer); err != nil {
		t.Fatal(err)
	}
	for _, when := range []string{"at first", "after a restart"} {
		client, gateway := r.bind(t, s.ID, s.Relays[0], ours), r.bind(t, s.ID, offer.Relays[0], theirs)
		client.stream.Send(client.channel, [][]byte{[]byte("up")})
		if got := gateway.receive(); string(got) != "up" {
			t.Errorf("%s: the gateway got %q", when, got)
		}
		gateway.stream.Send(gateway.channel, [][]byte{[]byte("down")})
		if got := client.receive(); string(got) != "down" {
			t.Errorf("%s: the client got %q", when, got)
		}
		r.stop()
		if _, err := client.stream.Receive(); err == nil {
			t.Errorf("%s: a WebSocket outlives the coordinator", when)
		}
		r.start()
	}
}

// TestGatewaysMayStand: a gateway is given what it keeps WebSockets to relays ready with, for its own key, and again in time.
func TestGatewaysMayStand(t *testing.T) {
	var ahead atomic.Int64
	clock := func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	r := newRig(t, Options{API: api.Options{Now: clock, PresenceEvery: 20 * time.Millisecond, PresenceTTL: time.Minute}})
	h := hello("stands")
	g := r.gateway(func(o *apitest.Options) { o.Hello = h })
	stands := func(s *wire.Standing) {
		t.Helper()
		if s == nil {
			t.Fatal("the gateway gets no ticket")
		}
		ticket, err := relay.DecodeStanding(s.Ticket)
		if err != nil {
			t.Fatal(err)
		}
		key, expires, err := relay.VerifyStanding(ticket, ticketKey(t, r), time.Now())
		if err != nil || key != h.Key || time.Until(expires) > time.Duration(s.Life) {
			t.Errorf("for %v until %v, %v", key, expires, err)
		}
	}
	stands(g.Welcome.Standing)
	if n := len(g.Frames(wire.FrameStanding)); n != 0 {
		t.Errorf("%d more at once", n)
	}
	ahead.Store(int64(time.Duration(g.Welcome.Standing.Life) / 2))
	r.eventually("the next ticket comes", func() bool { return len(g.Frames(wire.FrameStanding)) > 0 })
	var next wire.Standing
	if err := json.Unmarshal(g.Frames(wire.FrameStanding)[0].Body, &next); err != nil {
		t.Fatal(err)
	}
	stands(&next)
}
