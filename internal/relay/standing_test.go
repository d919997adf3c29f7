package relay

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// standing signs a standing ticket for a key, from now for a while.
func standing(tb testing.TB, holder wire.PrivateKey, issued, expires time.Time) Standing {
	tb.Helper()
	secret, err := SignStanding(signer, holder.Public(), issued, expires)
	if err != nil {
		tb.Fatal(err)
	}
	t, err := DecodeStanding(secret)
	if err != nil {
		tb.Fatal(err)
	}
	return t
}

// stand shows a standing ticket on a stream and gives the relay's answer.
func stand(tb testing.TB, s *streamEnd, holder wire.PrivateKey, ticket Standing, edit func(*Stand)) int {
	tb.Helper()
	key, err := DeriveBindKey(holder, s.Offer().Key)
	if err != nil {
		tb.Fatal(err)
	}
	m := Stand{ID: txid(), Nonce: s.Offer().Nonce, Ticket: ticket}
	if edit != nil {
		edit(&m)
	}
	s.stun(AppendStand(nil, m, &key))
	for {
		msg, _, _ := s.next()
		if id, code, ok := ParseStandAnswer(msg); ok && id == m.ID {
			if code == 0 && !VerifyMessage(msg, &key) {
				tb.Fatal("a success that the relay has not signed")
			}
			return code
		}
	}
}

func TestStandingTicketsSayWhatWasSigned(t *testing.T) {
	holder := key(t, 3)
	ticket := standing(t, holder, epoch, epoch.Add(10*time.Minute))
	got, expires, err := VerifyStanding(ticket, signers(), epoch)
	if err != nil || got != holder.Public() || !expires.Equal(epoch.Add(10*time.Minute)) {
		t.Errorf("%v until %v, %v", got, expires, err)
	}
	other, _, _ := ed25519.GenerateKey(nil)
	for name, tc := range map[string]struct {
		ticket Standing
		keys   []ed25519.PublicKey
		now    time.Time
	}{
		"another coordinator's": {ticket, []ed25519.PublicKey{other}, epoch},
		"expired":               {ticket, signers(), epoch.Add(10 * time.Minute)},
		"from the future":       {ticket, signers(), epoch.Add(-ClockSkew - time.Second)},
		"cut short":             {ticket[:len(ticket)-1], signers(), epoch},
		"none":                  {nil, signers(), epoch},
	} {
		if _, _, err := VerifyStanding(tc.ticket, tc.keys, tc.now); !errors.Is(err, ErrTicket) {
			t.Errorf("%s: %v", name, err)
		}
	}
	long := append([]byte(standingDomain), ticket[:standingClaimsSize]...) // what no coordinator of ours signs
	binary.BigEndian.PutUint64(long[len(long)-8:], uint64(epoch.Add(StandingLife+time.Second).Unix()))
	long = append(long, ed25519.Sign(signer, long)...)
	if _, _, err := VerifyStanding(long[len(standingDomain):], signers(), epoch); !errors.Is(err, ErrTicket) {
		t.Errorf("one that lasts too long: %v", err)
	}
	for i := range ticket {
		forged := bytes.Clone(ticket)
		forged[i] ^= 1
		if _, _, err := VerifyStanding(forged, signers(), epoch); err == nil {
			t.Fatalf("with byte %d changed it is taken", i)
		}
	}
	for _, life := range []time.Duration{0, -time.Second, StandingLife + time.Second} {
		if _, err := SignStanding(signer, holder.Public(), epoch, epoch.Add(life)); err == nil {
			t.Errorf("signed for %v", life)
		}
	}
	if _, err := SignStanding(signer, wire.Key{}, epoch, epoch.Add(time.Minute)); err == nil {
		t.Error("signed for no key")
	}
}

// Neither kind of ticket is ever taken for the other, whatever is put before, behind or around it.
func TestTicketsOfOneKindAreNotTakenForTheOther(t *testing.T) {
	holder := key(t, 1)
	session := ticket(t, Gateway, holder, nil)
	standing := standing(t, holder, epoch, epoch.Add(10*time.Minute))
	for _, b := range [][]byte{session, session[:standingSize], session[len(session)-standingSize:]} {
		if _, _, err := VerifyStanding(b, signers(), epoch); err == nil {
			t.Error("a session's ticket is taken as a standing one")
		}
	}
	// The claims of one under the signature of the other.
	mixed := append(bytes.Clone(session[:standingClaimsSize]), standing[standingClaimsSize:]...)
	if _, _, err := VerifyStanding(mixed, signers(), epoch); err == nil {
		t.Error("a mixture is taken as a standing ticket")
	}
	for pad := range TicketSize - standingSize + 1 {
		b := append(append(make([]byte, pad), standing...), make([]byte, TicketSize-standingSize-pad)...)
		b[0], b[1] = ticketVersion, byte(Gateway)
		if _, err := Verify(b, signers(), epoch); err == nil {
			t.Fatal("a standing ticket is taken as a session's")
		}
	}
	if _, err := DecodeTicket(wire.Secret(base64.RawURLEncoding.EncodeToString(standing))); err == nil {
		t.Error("a standing ticket decodes as a session's")
	}
	if _, err := DecodeStanding(wire.Secret(base64.RawURLEncoding.EncodeToString(session))); err == nil {
		t.Error("a session's ticket decodes as a standing one")
	}
}

// A standing WebSocket stays as long as its ticket and is of no more use than any other: what forwards is a session's ticket.
func TestAStandingWebSocketStays(t *testing.T) {
	bubble(t, func(t *testing.T, s *Server, _ func() net.Conn, client *http.Client) {
		stream, err := Dial(t.Context(), DialOptions{URL: "http://relay/", HTTP: client})
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		e, holder, other := &streamEnd{tb: t, Stream: stream}, key(t, 3), key(t, 1)
		until := time.Now().Add(10 * time.Minute)
		if code := stand(t, e, holder, standing(t, holder, time.Now(), until), nil); code != 0 {
			t.Fatalf("refused with %d", code)
		}
		key, err := DeriveBindKey(holder, stream.Offer().Key)
		if err != nil {
			t.Fatal(err)
		}
		until = until.Add(5 * time.Minute)
		renewal := Stand{ID: txid(), Nonce: stream.Offer().Nonce, Ticket: standing(t, holder, time.Now(), until)}
		stop := time.AfterFunc(9*time.Minute, func() {
			if st := s.Stats(); st.Links != 1 || st.Sessions != 0 || len(s.unbound) != 0 {
				t.Errorf("%+v, %d count as unbound", st, len(s.unbound))
			}
			stream.SendSTUN(AppendStand(nil, renewal, &key))
		})
		defer stop.Stop()
		if msg, _, _ := e.next(); !VerifyMessage(msg, &key) { // after many pings
			t.Fatal("the renewal is refused")
		}
		session := &talk{client: other, gateway: holder, id: other.Public().SessionID()}
		mustBind(t, e, session, Gateway)
		msg, _ := bindMessage(t, session, Gateway, stream.Offer(), func(b *Bind) { b.Unbind = true })
		e.stun(msg)
		if _, err := stream.Receive(); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Receive(); !errors.Is(err, errClosed) || time.Since(until).Round(time.Second) != BindTimeout {
			t.Fatalf("%v after its ticket's end: %v", time.Since(until), err)
		}
		synctest.Wait()
		if s.Stats().Links != 0 || len(s.standing) != 0 || len(s.unbound) != 0 {
			t.Error("it is still counted")
		}
	})
}

// One that is never bound leaves with its ticket.
func TestAStandingWebSocketLeavesWithItsTicket(t *testing.T) {
	bubble(t, func(t *testing.T, s *Server, _ func() net.Conn, client *http.Client) {
		stream, err := Dial(t.Context(), DialOptions{URL: "http://relay/", HTTP: client})
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		holder, until := key(t, 3), time.Now().Add(10*time.Minute)
		if code := stand(t, &streamEnd{tb: t, Stream: stream}, holder, standing(t, holder, time.Now(), until), nil); code != 0 {
			t.Fatalf("refused with %d", code)
		}
		if _, err := stream.Receive(); !errors.Is(err, errClosed) || time.Since(until).Round(time.Second) != BindTimeout {
			t.Fatalf("%v after its ticket's end: %v", time.Since(until), err)
		}
		synctest.Wait()
		if s.Stats().Links != 0 || len(s.standing) != 0 || len(s.unbound) != 0 {
			t.Error("it is still counted")
		}
	})
}

// A key has two standing WebSockets at most: the newest ones.
func TestAKeyHasFewStandingWebSockets(t *testing.T) {
	bubble(t, func(t *testing.T, s *Server, _ func() net.Conn, client *http.Client) {
		holder := key(t, 3)
		ticket := standing(t, holder, time.Now(), time.Now().Add(10*time.Minute))
		var ended [maxStanding + 2]chan error
		for i := range ended {
			stream, err := Dial(t.Context(), DialOptions{URL: "http://relay/", HTTP: client})
			if err != nil {
				t.Fatal(err)
			}
			defer stream.Close()
			if code := stand(t, &streamEnd{tb: t, Stream: stream}, holder, ticket, nil); code != 0 {
				t.Fatalf("refused with %d", code)
			}
			ended[i] = make(chan error, 1)
			go func() {
				_, err := stream.Receive()
				ended[i] <- err
			}()
		}
		for _, end := range ended[:2] {
			if err := <-end; !errors.Is(err, errClosed) {
				t.Errorf("an older one: %v", err)
			}
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if st := s.Stats(); st.Links != maxStanding || len(s.standing[holder.Public()]) != maxStanding {
			t.Errorf("%d are open, %d stand", st.Links, len(s.standing[holder.Public()]))
		}
	})
}

func TestOnlyItsHolderStandsAndOnlyOnItsWebSocket(t *testing.T) {
	st := newStage(t, nil)
	holder, thief, now := key(t, 3), key(t, 4), time.Now()
	good := standing(t, holder, now, now.Add(10*time.Minute))
	s, other := newStream(t, st), newStream(t, st)
	for name, tc := range map[string]struct {
		by     wire.PrivateKey
		ticket Standing
		edit   func(*Stand)
		want   int
	}{
		"another's ticket": {thief, good, nil, CodeTicket},
		"expired":          {holder, standing(t, holder, now.Add(-time.Hour), now.Add(-time.Minute)), nil, CodeTicket},
		"forged":           {holder, append(bytes.Clone(good[:standingSize-1]), good[standingSize-1]^1), nil, CodeTicket},
		"another's nonce":  {holder, good, func(m *Stand) { m.Nonce = other.Offer().Nonce }, CodeStaleNonce},
	} {
		if code := stand(t, s, tc.by, tc.ticket, tc.edit); code != tc.want {
			t.Errorf("%s: %d, want %d", name, code, tc.want)
		}
	}
	if len(st.standing) != 0 {
		t.Error("one stands that was refused")
	}
	for range 2 {
		if code := stand(t, s, holder, good, nil); code != 0 {
			t.Errorf("its own: %d", code)
		}
	}
	if code := stand(t, s, thief, standing(t, thief, now, now.Add(time.Minute)), nil); code != CodeTicket {
		t.Errorf("a second key on one WebSocket: %d", code)
	}
	// Over UDP nothing stands, and nothing is answered.
	u, session := newUDP(t, st.Addr()), newTalk(t)
	mustBind(t, u, session, Client)
	peer := newUDP(t, st.Addr())
	mustBind(t, peer, session, Gateway)
	bindKey, err := DeriveBindKey(holder, s.Offer().Key)
	if err != nil {
		t.Fatal(err)
	}
	u.stun(AppendStand(nil, Stand{ID: txid(), Nonce: u.offer().Nonce, Ticket: good}, &bindKey))
	silent(t, peer, u, session)
}

func FuzzStand(f *testing.F) {
	seedMessages(f)
	k := BindKey{1}
	msg := AppendStand(nil, Stand{Ticket: standing(f, key(f, 3), epoch, epoch.Add(time.Minute))}, &k)
	f.Add(msg)
	f.Add(msg[:len(msg)-4])
	f.Add(appendStandAnswer(nil, nat.TxID{1}, CodeTicket, nil))
	f.Add(appendStandAnswer(nil, nat.TxID{1}, 0, &k))
	f.Fuzz(func(t *testing.T, msg []byte) {
		before := bytes.Clone(msg)
		m, ok := ParseStand(msg)
		_, code, answer := ParseStandAnswer(msg)
		if !bytes.Equal(msg, before) {
			t.Fatal("wrote to its input")
		}
		if answer && ok || answer && code != 0 && (code < 300 || code > 699) {
			t.Fatalf("a request and an answer, or no code: %d", code)
		}
		if !ok {
			return
		}
		if holder, _, err := VerifyStanding(m.Ticket, signers(), epoch); err == nil && holder != key(t, 3).Public() {
			t.Fatalf("forged: %v", holder)
		}
		again, ok := ParseStand(AppendStand(nil, m, &BindKey{1}))
		if !ok || again.ID != m.ID || again.Nonce != m.Nonce || !bytes.Equal(again.Ticket, m.Ticket) {
			t.Fatalf("%+v comes back as %+v", m, again)
		}
	})
}
