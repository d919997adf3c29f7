package nat

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/pion/stun/v2"
	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/internal/wire"
)

// The samples of RFC 5769, sections 2.1 to 2.3.
const (
	rfc5769Key     = "VOkJxbRl1RmTxUk/WvJxBt"
	rfc5769Request = "\x00\x01\x00\x58\x21\x12\xa4\x42\xb7\xe7\xa7\x01\xbc\x34\xd6\x86\xfa\x87\xdf\xae" +
		"\x80\x22\x00\x10STUN test client\x00\x24\x00\x04\x6e\x00\x01\xff" +
		"\x80\x29\x00\x08\x93\x2f\xf9\xb1\x51\x26\x3b\x36\x00\x06\x00\x09evtj:h6vY\x20\x20\x20" +
		"\x00\x08\x00\x14\x9a\xea\xa7\x0c\xbf\xd8\xcb\x56\x78\x1e\xf2\xb5\xb2\xd3\xf2\x49\xc1\xb5\x71\xa2" +
		"\x80\x28\x00\x04\xe5\x7a\x3b\xcf"
	rfc5769Response4 = "\x01\x01\x00\x3c\x21\x12\xa4\x42\xb7\xe7\xa7\x01\xbc\x34\xd6\x86\xfa\x87\xdf\xae" +
		"\x80\x22\x00\x0btest vector\x20\x00\x20\x00\x08\x00\x01\xa1\x47\xe1\x12\xa6\x43" +
		"\x00\x08\x00\x14\x2b\x91\xf5\x99\xfd\x9e\x90\xc3\x8c\x74\x89\xf9\x2a\xf9\xba\x53\xf0\x6b\xe7\xd7" +
		"\x80\x28\x00\x04\xc0\x7d\x4c\x96"
	rfc5769Response6 = "\x01\x01\x00\x48\x21\x12\xa4\x42\xb7\xe7\xa7\x01\xbc\x34\xd6\x86\xfa\x87\xdf\xae" +
		"\x80\x22\x00\x0btest vector\x20\x00\x20\x00\x14\x00\x02\xa1\x47" +
		"\x01\x13\xa9\xfa\xa5\xd3\xf1\x79\xbc\x25\xf4\xb5\xbe\xd2\xb9\xd9" +
		"\x00\x08\x00\x14\xa3\x82\x95\x4e\x4b\xe6\x7b\xf1\x17\x84\xc9\x7c\x82\x92\xc2\x75\xbf\xe3\xed\x41" +
		"\x80\x28\x00\x04\xc8\xfb\x0b\x4c"
)

func TestRFC5769(t *testing.T) {
	key := []byte(rfc5769Key)
	name, id, ok := PeekUsername([]byte(rfc5769Request))
	if !ok || string(name) != "evtj:h6vY" || !strings.HasPrefix(string(id[:]), "\xb7\xe7\xa7\x01") {
		t.Errorf("PeekUsername = %q, %x, %v", name, id, ok)
	}
	for _, m := range []string{rfc5769Request, rfc5769Response4, rfc5769Response6} {
		if !VerifyCheck([]byte(m), key) {
			t.Errorf("VerifyCheck refuses %x", m)
		}
		if VerifyCheck([]byte(m), key[1:]) {
			t.Errorf("VerifyCheck takes another key for %x", m)
		}
	}
	for m, want := range map[string]string{
		rfc5769Response4: "192.0.2.1:32853",
		rfc5769Response6: "[2001:db8:1234:5678:11:2233:4455:6677]:32853",
	} {
		if _, got, ok := PeekResponse([]byte(m)); !ok || got.String() != want {
			t.Errorf("PeekResponse = %v, %v, want %s", got, ok, want)
		}
	}
}

func drawCheck(t *rapid.T) (Check, []byte, int) {
	return Check{
			ID:        drawID(t),
			Username:  rapid.StringMatching(`[A-Za-z0-9_-]{1,40}:[A-Za-z0-9_-]{1,10}`).Draw(t, "username"),
			Nominate:  rapid.Bool().Draw(t, "nominate"),
			Seq:       rapid.Uint64().Draw(t, "seq"),
			MTU:       rapid.Uint16().Draw(t, "mtu"),
			Call:      rapid.Bool().Draw(t, "call"),
			Behind:    drawBehind(t),
			Handshake: rapid.SliceOfN(rapid.Byte(), 0, MaxHandshake).Draw(t, "handshake"),
			Tally:     drawTally(t),
		}, rapid.SliceOfN(rapid.Byte(), 1, 100).Draw(t, "key"),
		rapid.IntRange(-1, MaxMessage).Draw(t, "size")
}

func drawTally(t *rapid.T) Tally {
	if !rapid.Bool().Draw(t, "tally") {
		return Tally{}
	}
	return Tally{Known: true, Sent: rapid.Uint32().Draw(t, "sent"), Came: rapid.Uint32().Draw(t, "came")}
}

func drawBehind(t *rapid.T) Behind {
	mappings := []wire.Mapping{wire.MappingUnknown, wire.MappingEasy, wire.MappingHard}
	b := Behind{Mapping: rapid.SampledFrom(mappings).Draw(t, "mapping")}
	if !b.Known() {
		return Behind{}
	}
	b.Ready, b.Round = rapid.Bool().Draw(t, "ready"), rapid.Uint8().Draw(t, "round")
	if rapid.Bool().Draw(t, "ports") {
		b.Low = rapid.Uint16Min(1).Draw(t, "low")
		b.High = rapid.Uint16Min(b.Low).Draw(t, "high")
	}
	return b
}

// What makes no sense says nothing.
func TestBehindIsHeldToSense(t *testing.T) {
	for name, v := range map[string][]byte{
		"empty": {}, "short": {behindEasy, 0, 0, 0, 0}, "long": {behindEasy, 0, 0, 0, 0, 0, 0},
		"no mapping": {behindReady, 1, 0, 0, 0, 0}, "both mappings": {behindEasy | behindHard, 1, 0, 0, 0, 0}, "other flags": {behindHard | 0x80, 1, 0, 1, 0, 2},
		"upside down": {behindHard, 1, 0, 2, 0, 1}, "no lowest port": {behindHard, 1, 0, 0, 0, 1},
	} {
		if got := readBehind(v); got != (Behind{}) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestCheckAgreesWithPion(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c, key, size := drawCheck(t)
		prefix := rapid.SliceOf(rapid.Byte()).Draw(t, "prefix")
		b, err := AppendCheck(bytes.Clone(prefix), c, key, size)
		if err != nil || !bytes.HasPrefix(b, prefix) {
			t.Fatalf("AppendCheck: %v", err)
		}
		b = b[len(prefix):]
		m := &stun.Message{Raw: bytes.Clone(b)}
		var username stun.Username
		if err := errors.Join(m.Decode(), stun.MessageIntegrity(key).Check(m), username.GetFrom(m)); err != nil {
			t.Fatal(err)
		}
		if m.Type != stun.BindingRequest || TxID(m.TransactionID) != c.ID || username.String() != c.Username {
			t.Fatalf("pion reads %v", m)
		}
		name, id, ok := PeekUsername(b)
		if !ok || string(name) != c.Username || id != c.ID || !VerifyCheck(b, key) {
			t.Fatalf("we read %q, %x, %v", name, id, ok)
		}
		if got := PeekHandshake(b); !bytes.Equal(got, c.Handshake) {
			t.Fatalf("the check carries %x, want %x", got, c.Handshake)
		}
		want := Asked{Nominate: c.Nominate, Seq: c.Seq, MTU: c.MTU, Call: c.Call, Behind: c.Behind, Tally: c.Tally}
		bare, _ := AppendCheck(nil, c, key, 0)
		if len(b) > len(bare) {
			want.Size = len(b)
		}
		if got := PeekAsked(b); got != want {
			t.Fatalf("the check asks for %+v, want %+v", got, want)
		}
	})
}

// What MESSAGE-INTEGRITY does not cover asks for nothing.
func TestAskedIsCovered(t *testing.T) {
	key := []byte("key")
	b, err := AppendCheck(nil, Check{Username: "session:sender", Seq: 7}, key, 0)
	if err != nil {
		t.Fatal(err)
	}
	want := PeekAsked(b)
	b = AppendAttr(b, attrUseCandidate, "")
	b = AppendAttr(b, attrPath, make([]byte, pathSize))
	b = AppendAttr(b, attrPadding, make([]byte, 100))
	SetLength(b, len(b))
	if got := PeekAsked(b); !VerifyCheck(b, key) || got != want || got.Seq != 7 {
		t.Errorf("the check asks for %+v, want %+v", got, want)
	}
}

func TestPionsCheckVerifies(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c, key, size := drawCheck(t)
		setters := []stun.Setter{stun.NewTransactionIDSetter(c.ID), stun.BindingRequest, stun.NewUsername(c.Username)}
		if size > 0 {
			setters = append(setters, stun.RawAttribute{Type: attrPadding, Value: make([]byte, size/4)})
		}
		setters = append(setters, stun.MessageIntegrity(key))
		if rapid.Bool().Draw(t, "fingerprint") {
			setters = append(setters, stun.Fingerprint)
		}
		b := stun.MustBuild(setters...).Raw
		name, id, ok := PeekUsername(b)
		if !ok || string(name) != c.Username || id != c.ID || !VerifyCheck(b, key) {
			t.Fatalf("we read %q, %x, %v", name, id, ok)
		}
	})
}

func TestCheckSize(t *testing.T) {
	c := Check{Username: "session:sender"}
	bare, err := AppendCheck(nil, c, []byte("key"), 0)
	if err != nil {
		t.Fatal(err)
	}
	for size := range MaxMessage + 1 {
		b, err := AppendCheck(nil, c, []byte("key"), size)
		if want := max(len(bare), size&^3); err != nil || len(b) != want {
			t.Fatalf("size %d gives %d bytes, want %d (%v)", size, len(b), want, err)
		}
		if !VerifyCheck(b, []byte("key")) {
			t.Fatalf("a check of %d bytes does not verify", size)
		}
	}
}

func TestAppendRefuses(t *testing.T) {
	addr := netip.MustParseAddrPort("192.0.2.1:1")
	for name, f := range map[string]func() ([]byte, error){
		"no key":      func() ([]byte, error) { return AppendCheck(nil, Check{Username: "a"}, nil, 0) },
		"no username": func() ([]byte, error) { return AppendCheck(nil, Check{}, []byte("k"), 0) },
		"long username": func() ([]byte, error) {
			return AppendCheck(nil, Check{Username: strings.Repeat("a", 509)}, []byte("k"), 0)
		},
		"too large": func() ([]byte, error) { return AppendCheck(nil, Check{Username: "a"}, []byte("k"), MaxMessage+1) },
		"response, no key": func() ([]byte, error) {
			return AppendCheckResponse(nil, TxID{}, addr, Tally{}, nil, 0)
		},
		"response, no address": func() ([]byte, error) {
			return AppendCheckResponse(nil, TxID{}, netip.AddrPort{}, Tally{}, []byte("k"), 0)
		},
		"response, too large": func() ([]byte, error) {
			return AppendCheckResponse(nil, TxID{}, addr, Tally{}, []byte("k"), MaxMessage+1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			if b, err := f(); err == nil || len(b) != 0 {
				t.Errorf("got %x, %v", b, err)
			}
		})
	}
}

func TestCheckResponseAgreesWithPion(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		id, addr, tally := drawID(t), drawAddr(t), drawTally(t)
		key := rapid.SliceOfN(rapid.Byte(), 1, 100).Draw(t, "key")
		size := rapid.IntRange(0, MaxMessage).Draw(t, "size")
		b, err := AppendCheckResponse(nil, id, addr, tally, key, size)
		if err != nil {
			t.Fatal(err)
		}
		if size >= 112 && len(b) != size&^3 {
			t.Fatalf("size %d gives %d bytes", size, len(b))
		}
		gotID, got, ok := PeekResponse(b)
		if !ok || gotID != id || got != addr || PeekTally(b) != tally || !VerifyCheck(b, key) {
			t.Fatalf("we read %x, %v, %v", gotID, got, ok)
		}
		m := &stun.Message{Raw: bytes.Clone(b)}
		var mapped stun.XORMappedAddress
		if err := errors.Join(m.Decode(), stun.MessageIntegrity(key).Check(m), mapped.GetFrom(m)); err != nil {
			t.Fatal(err)
		}
		ip, _ := netip.AddrFromSlice(mapped.IP)
		if netip.AddrPortFrom(ip.Unmap(), uint16(mapped.Port)) != addr {
			t.Fatalf("pion reads %v, want %v", mapped, addr)
		}
	})
}

func TestVerifyCheckRefusesAnyChange(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c, key, size := drawCheck(t)
		b, err := AppendCheck(nil, c, key, size)
		if err != nil {
			t.Fatal(err)
		}
		at := rapid.IntRange(0, len(b)*8-1).Draw(t, "bit")
		b[at/8] ^= 1 << (at % 8)
		if VerifyCheck(b, key) {
			t.Fatalf("verifies with bit %d of %x changed", at, b)
		}
	})
}

func TestVerifyCheckRefusesShapes(t *testing.T) {
	key := stun.NewShortTermIntegrity("key")
	user := stun.NewUsername("session:sender")
	build := func(s ...stun.Setter) []byte {
		return stun.MustBuild(append([]stun.Setter{stun.TransactionID}, s...)...).Raw
	}
	large := stun.RawAttribute{Type: attrPadding, Value: make([]byte, MaxMessage)}
	for name, b := range map[string][]byte{
		"no integrity":             build(stun.BindingRequest, user),
		"username behind":          build(stun.BindingRequest, key, user),
		"no username":              build(stun.BindingRequest, key),
		"indication":               build(stun.NewType(stun.MethodBinding, stun.ClassIndication), user, key),
		"another method":           build(stun.NewType(stun.MethodAllocate, stun.ClassRequest), user, key),
		"short integrity":          build(stun.BindingRequest, user, stun.RawAttribute{Type: AttrMessageIntegrity, Value: make([]byte, 4)}),
		"second integrity correct": build(stun.BindingRequest, user, stun.NewShortTermIntegrity("no"), key),
		"too large":                build(stun.BindingRequest, user, large, key),
	} {
		t.Run(name, func(t *testing.T) {
			if VerifyCheck(b, key) {
				t.Error("verifies")
			}
		})
	}
	good := build(stun.BindingRequest, user, key)
	if !VerifyCheck(good, key) || VerifyCheck(good, nil) {
		t.Error("the key does not decide")
	}
}

func TestPeekUsernameRefuses(t *testing.T) {
	build := func(s ...stun.Setter) []byte {
		return stun.MustBuild(append([]stun.Setter{stun.TransactionID}, s...)...).Raw
	}
	raw := func(n int) stun.Setter { return stun.RawAttribute{Type: attrUsername, Value: make([]byte, n)} }
	cut := build(stun.BindingRequest, raw(5))
	cut[headerSize+3] = 9 // its value would reach past the end
	for name, b := range map[string][]byte{
		"not stun":        []byte("hello"),
		"a response":      build(stun.BindingSuccess, raw(5)),
		"none":            build(stun.BindingRequest),
		"empty":           build(stun.BindingRequest, raw(0)),
		"too long":        build(stun.BindingRequest, raw(MaxUsername+1)),
		"cut":             cut,
		"behind the hmac": build(stun.BindingRequest, stun.NewShortTermIntegrity("key"), raw(5)),
	} {
		t.Run(name, func(t *testing.T) {
			if name, _, ok := PeekUsername(b); ok || name != nil {
				t.Errorf("gives %q", name)
			}
		})
	}
	two := build(stun.BindingRequest, stun.NewUsername("first"), stun.NewUsername("second"))
	if name, _, _ := PeekUsername(two); string(name) != "first" {
		t.Errorf("of two usernames gives %q", name)
	}
}
