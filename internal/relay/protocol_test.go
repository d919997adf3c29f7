package relay

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// signer is a coordinator's signing key, always the same.
var signer = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))

func signers() []ed25519.PublicKey { return []ed25519.PublicKey{signer.Public().(ed25519.PublicKey)} }

var epoch = time.Unix(1_800_000_000, 0)

// key makes a private key from one byte.
func key(tb testing.TB, b byte) wire.PrivateKey {
	tb.Helper()
	k, err := wire.PrivateKeyFromBytes(bytes.Repeat([]byte{b}, wire.KeySize))
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

// ticket signs a ticket of one hour for one side of the session of client key 1.
func ticket(tb testing.TB, side Side, holder wire.PrivateKey, edit func(*Claims)) Ticket {
	tb.Helper()
	c := Claims{
		Session: key(tb, 1).Public().SessionID(), Side: side, Key: holder.Public(),
		Issued: epoch, Expires: epoch.Add(time.Hour), Rate: 1 << 30,
	}
	if edit != nil {
		edit(&c)
	}
	s, err := Sign(signer, c)
	if err != nil {
		tb.Fatal(err)
	}
	t, err := DecodeTicket(s)
	if err != nil {
		tb.Fatal(err)
	}
	return t
}

func TestChannelIsTheSessionsFirst28Bits(t *testing.T) {
	session := base64.RawURLEncoding.EncodeToString([]byte{0x12, 0x34, 0x56, 0x7f, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16})
	c, err := ChannelOf(session)
	if err != nil || c != 0x1234567 {
		t.Fatalf("got %x, %v", c, err)
	}
	for _, bad := range []string{"", "short", session + "A", strings.Repeat("!", 22), session[:21] + "="} {
		if _, err := ChannelOf(bad); err == nil {
			t.Errorf("%q passes", bad)
		}
	}
}

func TestFrames(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := Channel(rapid.Uint32Range(0, 1<<28-1).Draw(t, "channel"))
		packet := rapid.SliceOfN(rapid.Byte(), 1, 2000).Draw(t, "packet")
		frame := append(make([]byte, FrameHeader), packet...)
		PutHeader(frame, c)
		got, p, ok := ParseFrame(frame)
		if !ok || got != c || !bytes.Equal(p, packet) || nat.IsSTUN(frame) {
			t.Fatalf("%x of channel %x comes back as %x of %x", packet, c, p, got)
		}
	})
	for _, bad := range [][]byte{nil, {0x40}, {0x40, 0, 0, 0}, {0x50, 0, 0, 0, 1}, {1, 0, 0, 0, 1}, make([]byte, MaxFrame+1)} {
		if IsFrame(bad) {
			t.Errorf("%x passes for a frame", bad)
		}
	}
}

func TestTicket(t *testing.T) {
	gateway := key(t, 2)
	c, err := Verify(ticket(t, Gateway, gateway, nil), signers(), epoch)
	if err != nil {
		t.Fatal(err)
	}
	want := Claims{
		Session: key(t, 1).Public().SessionID(), Side: Gateway, Key: gateway.Public(),
		Issued: epoch, Expires: epoch.Add(time.Hour), Rate: 1 << 30,
	}
	if c != want {
		t.Fatalf("got %+v, want %+v", c, want)
	}
	other := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{8}, ed25519.SeedSize)).Public().(ed25519.PublicKey)
	tests := []struct {
		name string
		keys []ed25519.PublicKey
		now  time.Time
		ok   bool
	}{
		{"the last second", signers(), epoch.Add(time.Hour - time.Second), true},
		{"a clock that is behind", signers(), epoch.Add(-ClockSkew), true},
		{"one of several keys", append([]ed25519.PublicKey{other}, signers()...), epoch, true},
		{"expired", signers(), epoch.Add(time.Hour), false},
		{"not yet issued", signers(), epoch.Add(-ClockSkew - time.Second), false},
		{"another coordinator", []ed25519.PublicKey{other}, epoch, false},
		{"no coordinator", nil, epoch, false},
		{"a broken key", []ed25519.PublicKey{{1, 2, 3}}, epoch, false},
	}
	for _, tt := range tests {
		if _, err := Verify(ticket(t, Gateway, gateway, nil), tt.keys, tt.now); (err == nil) != tt.ok || err != nil && !errors.Is(err, ErrTicket) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// A ticket is worth nothing once a single bit of it has changed.
func TestTicketsBitsAllCount(t *testing.T) {
	good := ticket(t, Client, key(t, 1), nil)
	for i := range len(good) * 8 {
		bad := bytes.Clone(good)
		bad[i/8] ^= 1 << (i % 8)
		if _, err := Verify(bad, signers(), epoch); err == nil {
			t.Fatalf("bit %d can be changed", i)
		}
	}
	for _, n := range []int{0, 1, TicketSize - 1, TicketSize + 1} {
		if _, err := Verify(make(Ticket, n), signers(), epoch); err == nil {
			t.Fatalf("%d bytes pass", n)
		}
	}
}

// A signature over the same bytes that was made for another purpose is refused.
func TestTicketsDomain(t *testing.T) {
	good := ticket(t, Client, key(t, 1), nil)
	bad := append(bytes.Clone(good[:claimsSize]), ed25519.Sign(signer, good[:claimsSize])...)
	if _, err := Verify(bad, signers(), epoch); err == nil {
		t.Fatal("a signature without the domain passes")
	}
}

func TestSignRefuses(t *testing.T) {
	good := Claims{Session: key(t, 1).Public().SessionID(), Key: key(t, 1).Public(), Issued: epoch, Expires: epoch.Add(time.Hour)}
	edits := map[string]func(*Claims){
		"session": func(c *Claims) { c.Session = "x" },
		"side":    func(c *Claims) { c.Side = 2 },
		"key":     func(c *Claims) { c.Key = wire.Key{} },
		"end":     func(c *Claims) { c.Expires = c.Issued },
		"times":   func(c *Claims) { c.Issued = time.Time{} },
	}
	for name, edit := range edits {
		c := good
		edit(&c)
		if _, err := Sign(signer, c); err == nil {
			t.Errorf("a bad %s is signed", name)
		}
	}
	if _, err := Sign(nil, good); err == nil {
		t.Error("no key signs")
	}
	s, err := Sign(signer, good)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []wire.Secret{"", s + "A", s[:len(s)-1] + "!", wire.Secret(strings.Repeat("=", len(s)))} {
		if _, err := DecodeTicket(bad); err == nil || strings.Contains(err.Error(), s[:20].Reveal()) {
			t.Errorf("a broken ticket gives %v", err)
		}
	}
}

func TestBindKeyIsTheSameOnBothSides(t *testing.T) {
	side, relay := key(t, 1), key(t, 9)
	a, err := DeriveBindKey(side, relay.Public())
	if err != nil {
		t.Fatal(err)
	}
	b, err := DeriveBindKey(relay, side.Public())
	if err != nil || a != b || a == (BindKey{}) {
		t.Fatalf("%x and %x, %v", a, b, err)
	}
	if _, err := DeriveBindKey(side, wire.Key{}); err == nil {
		t.Fatal("a low-order point is taken")
	}
}

func testOffer(tb testing.TB) Offer {
	return Offer{Nonce: Nonce(bytes.Repeat([]byte{0xAB}, NonceSize)), Key: key(tb, 9).Public()}
}

func TestBindMessages(t *testing.T) {
	k := BindKey{1, 2, 3}
	for _, unbind := range []bool{false, true} {
		want := Bind{ID: nat.TxID{1, 2}, Unbind: unbind, Nonce: Nonce{3}, Ticket: ticket(t, Client, key(t, 1), nil)}
		msg := AppendBind(nil, want, &k)
		got, ok := ParseBind(msg)
		if !ok || got.ID != want.ID || got.Unbind != unbind || got.Nonce != want.Nonce || !bytes.Equal(got.Ticket, want.Ticket) {
			t.Fatalf("%+v comes back as %+v", want, got)
		}
		if !VerifyMessage(msg, &k) || VerifyMessage(msg, &BindKey{9}) {
			t.Fatal("the wrong key passes, or the right one does not")
		}
		for i := range len(msg) * 8 {
			bad := bytes.Clone(msg)
			bad[i/8] ^= 1 << (i % 8)
			if _, ok := ParseBind(bad); ok && VerifyMessage(bad, &k) {
				t.Fatalf("bit %d can be changed", i)
			}
		}
		if _, ok := ParseAnswer(msg); ok {
			t.Fatal("a request passes for an answer")
		}
	}
}

// What MESSAGE-INTEGRITY does not cover is not read.
func TestBindIsReadOnlyAsFarAsItIsCovered(t *testing.T) {
	k := BindKey{1}
	good := ticket(t, Client, key(t, 1), nil)
	msg := nat.AppendHeader(nil, typeBind, nat.TxID{})
	msg = nat.AppendIntegrity(nat.AppendAttr(msg, nat.AttrNonce, make([]byte, NonceSize)), 0, k[:])
	msg = nat.AppendAttr(msg, attrTicket, []byte(good))
	nat.SetLength(msg, len(msg))
	if !VerifyMessage(msg, &k) {
		t.Fatal("the message is not what it should be")
	}
	if _, ok := ParseBind(msg); ok {
		t.Fatal("a ticket after the integrity is read")
	}
}

func TestAnswers(t *testing.T) {
	k, mapped := BindKey{1}, netip.MustParseAddrPort("192.0.2.7:51820")
	bind := len(AppendBind(nil, Bind{Ticket: make(Ticket, TicketSize)}, &k))
	for _, want := range []Answer{
		{ID: nat.TxID{1}, Mapped: mapped},
		{ID: nat.TxID{2}, Mapped: netip.MustParseAddrPort("[2001:db8::7]:51820")},
		{ID: nat.TxID{3}, Unbind: true},
		{ID: nat.TxID{4}, Code: CodeTicket},
		{ID: nat.TxID{5}, Code: CodeTaken, Unbind: true},
		{ID: nat.TxID{6}, Code: CodeStaleNonce, Offer: testOffer(t)},
	} {
		msg := AppendAnswer(nil, want, &k)
		got, ok := ParseAnswer(msg)
		if !ok || got != want {
			t.Errorf("%+v comes back as %+v", want, got)
		}
		if VerifyMessage(msg, &k) != (want.Code == 0) {
			t.Errorf("%+v: integrity", want)
		}
		if len(msg) > bind {
			t.Errorf("%+v takes %d bytes, a bind %d", want, len(msg), bind)
		}
	}
	stale := AppendAnswer(nil, Answer{Code: CodeStaleNonce}, &k)
	if _, ok := ParseAnswer(stale); ok {
		t.Error("a stale nonce without a new one passes")
	}
}

func TestOffer(t *testing.T) {
	want := testOffer(t)
	offer := func() Offer { return want }
	for _, from := range []string{"192.0.2.7:51820", "[2001:db8::7]:51820"} {
		addr := netip.MustParseAddrPort(from)
		request := WantRequest(nat.TxID{1})
		response, ok := AppendBindingResponse(nil, request, addr, offer)
		if !ok || len(response) > len(request) {
			t.Fatalf("%s: %d bytes are answered with %d", from, len(request), len(response))
		}
		if got, ok := ParseOffer(response); !ok || got != want {
			t.Fatalf("%s: got %+v", from, got)
		}
		if id, mapped, err := nat.BindingResponse(response); err != nil || id != (nat.TxID{1}) || mapped != addr {
			t.Fatalf("%s: mapped to %s, %v", from, mapped, err)
		}
		// any STUN server answers it, and a plain request gets a plain answer
		if plain, ok := nat.AppendBindingResponse(nil, request, addr); !ok || len(plain) == len(response) {
			t.Fatal("a plain server does not answer")
		}
		plain, ok := AppendBindingResponse(nil, nat.BindingRequest(nat.TxID{2}), addr, offer)
		if _, has := ParseOffer(plain); !ok || has {
			t.Fatal("who does not ask gets an offer")
		}
	}
	if got, ok := ParseOffer(AppendHello(nil, nat.TxID{}, want)); !ok || got != want {
		t.Fatalf("hello gives %+v", got)
	}
}

// Nobody can make a relay send more than it receives.
func TestNoResponseIsLargerThanItsRequest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		request := nat.AppendHeader(nil, nat.TypeBindingRequest, nat.TxID{})
		if rapid.Bool().Draw(t, "want") {
			request = nat.AppendAttr(request, attrWant, "")
		}
		if n := rapid.IntRange(-1, 100).Draw(t, "filler"); n >= 0 {
			request = nat.AppendAttr(request, nat.AttrSoftware, make([]byte, n))
		}
		nat.SetLength(request, len(request))
		from := rapid.SampledFrom([]string{"192.0.2.7:51820", "[2001:db8::7]:51820"}).Draw(t, "from")
		response, ok := AppendBindingResponse(nil, request, netip.MustParseAddrPort(from), func() Offer { return Offer{} })
		if len(response) > len(request) || !ok && len(response) > 0 {
			t.Fatalf("%d bytes are answered with %d", len(request), len(response))
		}
	})
}

func TestBlocks(t *testing.T) {
	run := bytes.Repeat([]byte{0x40, 0, 0, 1, 'x', 'y'}, 3)
	msg := append(AppendBlockHeader(nil, 20, 0), make([]byte, 20)...)
	msg = append(AppendBlockHeader(msg, len(run)-1, 6), run[:len(run)-1]...)
	b := WalkBlocks(msg)
	if !b.Next() || b.Segment != 0 || len(b.Data) != 20 {
		t.Fatalf("got %+v", b)
	}
	if f := b.Frames(); f.Next() {
		t.Fatal("a STUN message has frames")
	}
	if !b.Next() || b.Segment != 6 {
		t.Fatalf("got %+v", b)
	}
	var got []string
	for f := b.Frames(); f.Next(); {
		got = append(got, string(f.Packet))
	}
	if strings.Join(got, " ") != "xy xy x" || b.Next() || b.Err != nil {
		t.Fatalf("got %q, %v", got, b.Err)
	}
	for name, bad := range map[string][]byte{
		"half a header":  make([]byte, 7),
		"empty":          AppendBlockHeader(nil, 0, 0),
		"too long":       AppendBlockHeader(nil, 1, 6),
		"reserved":       {0, 0, 0, 1, 0, 6, 0, 1, 0},
		"cut frame":      append(AppendBlockHeader(nil, 10, 6), make([]byte, 10)...),
		"no frame":       append(AppendBlockHeader(nil, 4, 4), make([]byte, 4)...),
		"large frame":    append(AppendBlockHeader(nil, MaxFrame+1, MaxFrame+1), make([]byte, MaxFrame+1)...),
		"long STUN":      append(AppendBlockHeader(nil, nat.MaxMessage+4, 0), make([]byte, nat.MaxMessage+4)...),
		"length overrun": AppendBlockHeader(nil, 1<<32-1, 6),
	} {
		b := WalkBlocks(bad)
		if b.Next() || !errors.Is(b.Err, ErrBlock) {
			t.Errorf("%s: %+v", name, b)
		}
	}
}

func TestHotPathsDoNotAllocate(t *testing.T) {
	k, from := BindKey{1}, netip.MustParseAddrPort("192.0.2.7:51820")
	bind := AppendBind(nil, Bind{Ticket: ticket(t, Client, key(t, 1), nil)}, &k)
	request, buf, o := WantRequest(nat.TxID{}), make([]byte, 0, nat.MaxMessage), testOffer(t)
	offer := func() Offer { return o }
	frame := []byte{0x40, 0, 0, 1, 2}
	if n := testing.AllocsPerRun(100, func() {
		ParseFrame(frame)
		if b, ok := ParseBind(bind); !ok || !VerifyMessage(bind, &k) {
			t.Fatal(b)
		}
		AppendAnswer(buf, Answer{Mapped: from}, &k)
		AppendBindingResponse(buf, request, from, offer)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
