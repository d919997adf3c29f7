package relay

import (
	"bytes"
	"crypto/ed25519"
	"net/http"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
)

// scene is a session that works, and a stranger. After each attack the session must work on, and nothing else may have
// reached its ends: what silent sends must be the next thing that comes.
type scene struct {
	*stage
	*talk
	client, gateway end
	stranger        *udpEnd
}

func newScene(t *testing.T, edit func(*Options)) *scene {
	t.Helper()
	s := &scene{stage: newStage(t, edit), talk: newTalk(t)}
	s.client, s.gateway, s.stranger = newUDP(t, s.Addr()), newUDP(t, s.Addr()), newUDP(t, s.Addr())
	mustBind(t, s.client, s.talk, Client)
	mustBind(t, s.gateway, s.talk, Gateway)
	return s
}

func (s *scene) unharmed(t *testing.T) {
	t.Helper()
	silent(t, s.client, s.gateway, s.talk)
	silent(t, s.gateway, s.client, s.talk)
	if n := s.Stats().Sessions; n != 1 {
		t.Fatalf("there are %d sessions", n)
	}
}

// refused wants a bind of the stranger's to be refused with a code.
func (s *scene) refused(t *testing.T, code int, by *talk, side Side, edit func(*Bind)) {
	t.Helper()
	if a := bind(t, s.stranger, by, side, edit); a.Code != code {
		t.Errorf("the relay says %d, not %d", a.Code, code)
	}
}

func TestFramesOfStrangersGoNowhere(t *testing.T) {
	s := newScene(t, nil)
	s.stranger.frames(s.channel, []byte("forged"))
	s.stranger.frames(s.channel^1, []byte("no such channel"))
	s.unharmed(t)
	eventually(t, "both are counted", func() bool { return s.Stats().Strangers == 2 })
}

// A side cannot speak into a session that is not its own, with a session of its own at hand.
func TestFramesIntoAnotherSessionGoNowhere(t *testing.T) {
	s := newScene(t, nil)
	own := newTalk(t)
	mustBind(t, s.stranger, own, Client)
	s.stranger.frames(s.channel, []byte("forged"))
	web := newStream(t, s.stage)
	mustBind(t, web, own, Gateway)
	web.frames(s.channel, []byte("forged"))
	silent(t, s.stranger, web, own)
	bind(t, s.stranger, own, Client, func(b *Bind) { b.Unbind = true })
	bind(t, web, own, Gateway, func(b *Bind) { b.Unbind = true })
	s.unharmed(t)
}

func TestTicketsAreRefused(t *testing.T) {
	s := newScene(t, nil)
	other := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{8}, ed25519.SeedSize))
	by := newTalk(t)
	use := func(ticket Ticket) func(*Bind) { return func(b *Bind) { b.Ticket = ticket } }
	forged := bytes.Clone(by.ticket(t, Client, nil))
	copy(forged[claimsSize:], ed25519.Sign(other, append([]byte(ticketDomain), forged[:claimsSize]...)))
	moved := bytes.Clone(by.ticket(t, Client, nil))
	copy(moved[2:], s.ticket(t, Client, nil)[2:2+SessionSize])
	side := bytes.Clone(by.ticket(t, Client, nil))
	side[1] = byte(Gateway)
	version := bytes.Clone(by.ticket(t, Client, nil))
	version[0]++
	for name, edit := range map[string]func(*Bind){
		"forged":                      use(forged),
		"for another session":         use(moved),
		"for the other side":          use(side),
		"of another version":          use(version),
		"expired":                     use(by.ticket(t, Client, func(c *Claims) { c.Issued, c.Expires = c.Issued.Add(-2*time.Hour), time.Now().Add(-time.Second) })),
		"of the future":               use(by.ticket(t, Client, func(c *Claims) { c.Issued = time.Now().Add(time.Hour); c.Expires = c.Issued.Add(time.Hour) })),
		"another's, not its key":      use(s.ticket(t, Client, nil)),
		"another's, known to be good": use(s.client.(*udpEnd).ticketOf(t, s.talk)),
	} {
		t.Run(name, func(t *testing.T) {
			s.refused(t, CodeTicket, by, Client, edit)
			s.refused(t, CodeTicket, by, Client, func(b *Bind) { edit(b); b.Unbind = true })
			s.unharmed(t)
		})
	}
}

// ticketOf gives a ticket with which this end is bound, so that the relay knows it.
func (e *udpEnd) ticketOf(t *testing.T, s *talk) Ticket {
	known := s.ticket(t, Client, nil)
	bind(t, e, s, Client, func(b *Bind) { b.Ticket = known })
	return known
}

// Whoever records a bind and sends it from elsewhere gains nothing, and neither does who has a nonce from elsewhere.
func TestNoncesBelongToAnAddress(t *testing.T) {
	s := newScene(t, nil)
	recorded, _ := bindMessage(t, s.talk, Client, s.client.offer(), nil)
	recordedUnbind, _ := bindMessage(t, s.talk, Client, s.client.offer(), func(b *Bind) { b.Unbind = true })
	for _, msg := range [][]byte{recorded, recordedUnbind} {
		s.stranger.stun(msg)
		if a := answer(t, s.stranger, nil); a.Code != CodeStaleNonce {
			t.Errorf("a replayed bind gets %d", a.Code)
		}
	}
	web := newStream(t, s.stage)
	web.stun(recorded)
	if a := answer(t, web, nil); a.Code != CodeStaleNonce {
		t.Errorf("a bind replayed over a WebSocket gets %d", a.Code)
	}
	own := newTalk(t)
	s.refused(t, CodeStaleNonce, own, Client, func(b *Bind) { b.Nonce = s.client.offer().Nonce })
	s.refused(t, CodeStaleNonce, own, Client, func(b *Bind) { b.Nonce = web.Offer().Nonce })
	s.refused(t, CodeStaleNonce, own, Client, func(b *Bind) { b.Nonce = Nonce{} })
	s.unharmed(t)
	if n := s.Stats(); n.Refused != 0 {
		t.Errorf("%d tickets were looked at without a nonce", n.Refused)
	}
}

// A message that was changed on the way is refused, whatever was changed.
func TestBindsAreAuthenticated(t *testing.T) {
	s := newScene(t, nil)
	own := newTalk(t)
	good, _ := bindMessage(t, own, Client, s.stranger.offer(), nil)
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 0x10
		s.stranger.stun(bad)
	}
	s.unharmed(t)
}

// A channel is 28 bits of the session's id, so another session may have the same.
func TestChannelsAreNotTaken(t *testing.T) {
	s := newScene(t, nil)
	raw, err := ParseSession(s.id)
	if err != nil {
		t.Fatal(err)
	}
	raw[SessionSize-1] ^= 1
	own := newTalk(t)
	twin := func(b *Bind) {
		b.Ticket = own.ticket(t, Client, func(c *Claims) { c.Session = sessionText(raw) })
	}
	s.refused(t, CodeTaken, own, Client, twin)
	s.unharmed(t)
	bind(t, s.stranger, own, Client, func(b *Bind) { twin(b); b.Unbind = true })
	s.unharmed(t)
}

// A gateway that the coordinator has given up does not take a session back from the one that has it now.
func TestTheNewestTicketHoldsASide(t *testing.T) {
	s := newScene(t, nil)
	late := &talk{client: s.talk.client, gateway: newTalk(t).gateway, id: s.id, channel: s.channel}
	s.refused(t, CodeTicket, late, Gateway, func(b *Bind) {
		b.Ticket = late.ticket(t, Gateway, func(c *Claims) { c.Issued = c.Issued.Add(-time.Minute) })
	})
	s.unharmed(t)
	s.refused(t, 0, late, Gateway, func(b *Bind) {
		b.Ticket = late.ticket(t, Gateway, func(c *Claims) { c.Issued = c.Issued.Add(30 * time.Second) })
	})
	silent(t, s.client, s.stranger, s.talk)
	silent(t, s.stranger, s.client, s.talk)
}

// No answer is larger than what asked for it, so a forged source address gains nobody anything.
func TestNothingIsAmplified(t *testing.T) {
	s := newScene(t, nil)
	own, stranger := newTalk(t), s.stranger
	bound, _ := bindMessage(t, own, Client, Offer{Key: s.public}, nil)
	short := nat.AppendHeader(nil, nat.TypeBindingRequest, txid())
	want := nat.AppendAttr(nat.AppendHeader(nil, nat.TypeBindingRequest, txid()), attrWant, "")
	nat.SetLength(want, len(want))
	tests := []struct {
		name    string
		request []byte
		answers bool
	}{
		{"a binding request", nat.BindingRequest(txid()), true},
		{"one that wants a relay", WantRequest(txid()), true},
		{"one that leaves no room", want, false},
		{"one that is empty", short, false},
		{"a bind with a wrong nonce", bound, true},
		{"an answer", AppendAnswer(nil, Answer{Code: CodeStaleNonce, Offer: Offer{Key: s.public}}, nil), false},
		{"a hello", AppendHello(nil, txid(), Offer{Key: s.public}), false},
		{"junk", make([]byte, 1200), false},
		{"a frame", append([]byte{0x41, 2, 3, 4}, make([]byte, 100)...), false},
	}
	for _, tt := range tests {
		stranger.stun(tt.request)
		probe := nat.BindingRequest(txid()) // its answer comes last
		stranger.stun(probe)
		got := stranger.read(time.Minute)
		if answered := !bytes.Equal(got[8:20], probe[8:20]); answered != tt.answers || answered && len(got) > len(tt.request) {
			t.Errorf("%s of %d bytes: %d bytes come back", tt.name, len(tt.request), len(got))
		} else if answered {
			stranger.read(time.Minute)
		}
	}
	s.unharmed(t)
}

// Verifying tickets is work: one source gets only so much of it, and the rest goes unanswered.
func TestVerificationsAreBounded(t *testing.T) {
	g, now := newGuard(), time.Now().UnixNano()
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	count := func(from netip.Addr, now int64) (n int) {
		for n < 100_000 && g.admit(from, now) {
			n++
		}
		return n
	}
	if n := count(a, now); n < 3900 || n > 4000 {
		t.Errorf("a first source gets %d at once", n) // the bound on all of them
	}
	if n := count(b, now+int64(time.Second)); n < 1900 || n > 2000 {
		t.Errorf("a second one gets %d a second later", n)
	}
	if n := count(netip.MustParseAddr("2001:db8::2"), now+int64(time.Second)); n != 0 {
		t.Errorf("its neighbour gets %d", n)
	}
	g = newGuard()
	total := 0
	for i := range int64(100) {
		total += count(a, now+i*int64(time.Second)/2)
	}
	if want := int(sourceBurst.Seconds()+50) * sourceRate; total > want {
		t.Errorf("one source gets %d in 50 seconds, not %d", total, want)
	}
}

// Whoever has a nonce makes the relay verify as many tickets as his source may, over UDP and on WebSockets alike, and gets no answer beyond that.
// A ticket in use is not verified again.
func TestTicketsBeyondTheBoundAreNotLookedAt(t *testing.T) {
	s, err := New(t.Context(), Options{Keys: signers()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	talk, now := newTalk(t), time.Now().UnixNano()
	udp := origin{addr: netip.MustParseAddrPort("192.0.2.1:5000")}
	web := origin{link: &link{server: s, source: netip.MustParseAddr("198.51.100.7"), nonce: Nonce{7}}}
	forged := bytes.Clone(talk.ticket(t, Gateway, nil))
	forged[len(forged)-1] ^= 1
	ask := func(from origin, ticket Ticket, side Side) int {
		msg, _ := bindMessage(t, talk, side, s.offer(from), func(b *Bind) { b.Ticket = ticket })
		answer, ok := ParseAnswer(s.answer(nil, msg, from, now, &s.counts))
		if !ok {
			return codeSilent
		}
		return answer.Code
	}
	held := talk.ticket(t, Client, nil)
	if code := ask(udp, held, Client); code != 0 {
		t.Fatalf("refused with %d", code)
	}
	for name, from := range map[string]origin{"udp": udp, "websocket": web} {
		s.guard = newGuard()
		s.guard.source = 1
		for range int(sourceBurst / time.Second) {
			if code := ask(from, forged, Gateway); code != CodeTicket {
				t.Fatalf("%s: within the bound the relay says %d", name, code)
			}
		}
		if code := ask(from, forged, Gateway); code != codeSilent {
			t.Errorf("%s: beyond the bound the relay says %d", name, code)
		}
		if code := ask(udp, held, Client); code != 0 {
			t.Errorf("%s: a ticket in use: %d", name, code)
		}
	}
	if n := s.counts.limited.Load(); n != 2 {
		t.Errorf("%d are counted", n)
	}
}

// Nothing about strangers is kept: after any number of their packets the relay is as it was.
func TestStrangersLeaveNothingBehind(t *testing.T) {
	s := newScene(t, nil)
	junk := junkPackets(t, s)
	measure := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	sent := uint64(0)
	flood := func(n int) {
		for range n {
			for _, b := range junk {
				_, _ = s.stranger.conn.Write(b)
				sent++
			}
			for s.stranger.read(time.Microsecond) != nil {
			}
		}
	}
	flood(20)
	before := measure()
	flood(300)
	seen := func() uint64 {
		st := s.Stats()
		return st.Junk + st.Unserved + st.Strangers + st.STUN + st.Stale + st.Refused + st.Limited + st.Unread
	}
	eventually(t, "all is counted", func() bool { return seen() >= sent })
	if grown := measure() - before; grown > 1<<20 {
		t.Errorf("the heap grew by %d bytes with %d packets", grown, sent)
	}
	for s.stranger.read(10*time.Millisecond) != nil {
	}
	s.unharmed(t)
}

// junkPackets are what a stranger may send, one of each kind.
func junkPackets(tb testing.TB, s *scene) [][]byte {
	own := newTalk(tb)
	offer := s.stranger.offer()
	stale, _ := bindMessage(tb, own, Client, Offer{Key: s.public}, nil)
	forged, _ := bindMessage(tb, own, Client, offer, func(b *Bind) { b.Ticket = make(Ticket, TicketSize) })
	frame := append(make([]byte, FrameHeader), make([]byte, 1400)...)
	PutHeader(frame, s.channel)
	other := bytes.Clone(frame)
	PutHeader(other, s.channel^5)
	return [][]byte{
		{0}, make([]byte, 1400), bytes.Repeat([]byte{0xFF}, 100), {0x40, 0, 0, 0}, frame, other,
		nat.BindingRequest(txid()), WantRequest(txid()), stale, forged, stale[:len(stale)-4], forged[:30],
		append([]byte{1, 0, 0, 0}, make([]byte, 144)...), // a WireGuard initiation
	}
}

func TestWebSocketsWithoutABindingAreBounded(t *testing.T) {
	st := newStage(t, nil)
	for range maxUnbound {
		l := st.newLink(netip.MustParseAddr("127.0.0.1"))
		if l == nil {
			t.Fatal("they are bounded too early")
		}
		defer st.drop(l)
	}
	resp, err := st.http.Client().Get(st.http.URL)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Fatalf("one more gets %s", resp.Status)
	}
	other := st.newLink(netip.MustParseAddr("127.0.0.2"))
	if other == nil {
		t.Fatal("another source has no room")
	}
	st.drop(other)
	if len(st.unbound) != 1 {
		t.Fatalf("sources are kept: %v", st.unbound)
	}
}

func TestWebSocketsAreBounded(t *testing.T) {
	st := newStage(t, func(o *Options) { o.Links = 1 })
	s := newTalk(t)
	e := newStream(t, st)
	mustBind(t, e, s, Client)
	if _, err := Dial(fast(t), DialOptions{URL: st.http.URL, HTTP: st.http.Client()}); err == nil {
		t.Fatal("there is no end to them")
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "there is room again", func() bool { return st.Stats().Links == 0 })
	newStream(t, st)
}

// A WebSocket that breaks the protocol ends, and with it its bindings; others go on.
func TestMalformedMessagesEndAWebSocket(t *testing.T) {
	for name, msg := range map[string][]byte{
		"a cut block":  AppendBlockHeader(nil, 100, 50),
		"no block":     []byte("hello"),
		"a long block": AppendBlockHeader(nil, 1<<31, 50),
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, nil)
			own, bad := newTalk(t), newStream(t, s.stage)
			mustBind(t, bad, own, Client)
			if err := bad.socket.writeMessage(append(make([]byte, headroom), msg...)); err != nil {
				t.Fatal(err)
			}
			eventually(t, "it is gone", func() bool { return s.Stats().Links == 0 })
			s.unharmed(t)
		})
	}
}

// What is in a well-formed message but no frame of a bound session is dropped; the WebSocket goes on.
func TestWebSocketsJunkGoesNowhere(t *testing.T) {
	s := newScene(t, nil)
	own, e := newTalk(t), newStream(t, s.stage)
	mustBind(t, e, own, Client)
	msg := AppendBlockHeader(make([]byte, headroom), 40, 10)
	msg = append(msg, bytes.Repeat([]byte{1}, 40)...)                                                                                 // no frames
	msg = append(AppendBlockHeader(msg, 20, 0), make([]byte, 20)...)                                                                  // no STUN
	msg = append(AppendBlockHeader(msg, 44, 0), nat.BindingRequest(txid())...)                                                        // not here, though well-formed
	msg = append(AppendBlockHeader(msg, 5, 5), 0x40|byte(s.channel>>24), byte(s.channel>>16), byte(s.channel>>8), byte(s.channel), 9) // another's
	if err := e.socket.writeMessage(msg); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all is counted", func() bool { st := s.Stats(); return st.Junk == 5 && st.Unserved == 1 && st.Strangers == 1 })
	bind(t, e, own, Client, func(b *Bind) { b.Unbind = true })
	s.unharmed(t)
}

// TestWhatIsNotServedIsNotMalformed: netcheck's request for an answer from another port gets none, and is no sign of an attack.
func TestWhatIsNotServedIsNotMalformed(t *testing.T) {
	s := newScene(t, nil)
	for _, msg := range [][]byte{nat.ChangeRequest(txid(), true), nat.ChangeRequest(txid(), false)} {
		_, _ = s.stranger.conn.Write(msg)
	}
	_, _ = s.stranger.conn.Write(nat.BindingRequest(txid())[:21])
	eventually(t, "all is counted", func() bool { st := s.Stats(); return st.Unserved == 2 && st.Junk == 1 })
	s.unharmed(t)
}

// One session on a shared WebSocket that nobody reads fast enough takes no room from another.
func TestOneSessionCannotStarveAnother(t *testing.T) {
	st, hog, small := newStage(t, func(o *Options) { o.FlowQueue, o.Queue = 1<<17, 1<<20 }), newTalk(t), newTalk(t)
	gateway := newStream(t, st) // which does not read for now
	flood, calm := newUDP(t, st.Addr()), newUDP(t, st.Addr())
	for s, e := range map[*talk]end{hog: flood, small: calm} {
		mustBind(t, gateway, s, Gateway)
		mustBind(t, e, s, Client)
	}
	sent := uint64(0)
	for ; st.Stats().OverQueue < 100; sent += 100 {
		for range 100 {
			flood.frames(hog.channel, make([]byte, 1400))
		}
	}
	eventually(t, "the flood is through", func() bool { s := st.Stats(); return s.Packets+s.OverQueue+s.OverShare+s.Unread >= sent })
	calm.frames(small.channel, []byte("hello"))
	for n := 0; ; n++ {
		_, c, pkt := gateway.next()
		if c == small.channel && string(pkt) == "hello" {
			break
		}
		if n > 100_000 {
			t.Fatal("the small session never gets its turn")
		}
	}
}

// A session goes on while strangers send whatever they can think of. How much of it a relay bears is measured, not tested:
// see BenchmarkFlood.
func TestASessionGoesOnThroughAFlood(t *testing.T) {
	s := newScene(t, nil)
	junk := junkPackets(t, s)
	stop := make(chan struct{})
	var flood sync.WaitGroup
	defer flood.Wait()
	defer close(stop)
	for range 2 {
		conn := newUDP(t, s.Addr()).conn
		flood.Go(func() {
			for pause := time.NewTicker(time.Millisecond); ; {
				select {
				case <-stop:
					pause.Stop()
					return
				case <-pause.C:
				}
				for _, b := range junk {
					_, _ = conn.Write(b)
				}
			}
		})
	}
	client, gateway := s.client.(*udpEnd), s.gateway.(*udpEnd)
	for got, deadline := 0, time.Now().Add(time.Minute); got < 100; {
		client.frames(s.channel, []byte("through"))
		if gateway.read(100*time.Millisecond) != nil {
			got++
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d packets came through", got)
		}
	}
}
