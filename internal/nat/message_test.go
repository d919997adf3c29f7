package nat

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/pion/stun/v2"
	"pgregory.net/rapid"
)

// drawAddr draws an IPv4 or IPv6 address with port; never an IPv4-mapped one, which no side sends.
func drawAddr(t *rapid.T) netip.AddrPort {
	port := rapid.Uint16().Draw(t, "port")
	if rapid.Bool().Draw(t, "ipv4") {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "ip"))), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "ip"))).Unmap(), port)
}

func drawID(t *rapid.T) TxID { return TxID(rapid.SliceOfN(rapid.Byte(), 12, 12).Draw(t, "id")) }

func TestIsSTUN(t *testing.T) {
	good := BindingRequest(TxID{1, 2, 3})
	change := func(at int, v byte) []byte {
		b := bytes.Clone(good)
		b[at] = v
		return b
	}
	wireguard := make([]byte, 148) // a handshake initiation whose sender index is the magic cookie
	wireguard[0] = 1
	binary.BigEndian.PutUint32(wireguard[4:], magicCookie)
	for name, c := range map[string]struct {
		b    []byte
		want bool
	}{
		"plain request":     {good, true},
		"bare header":       {[]byte("\x00\x01\x00\x00\x21\x12\xa4\x42abcdefghijkl"), true},
		"empty":             {nil, false},
		"short":             {good[:19], false},
		"cut":               {good[:len(good)-4], false},
		"trailing bytes":    {append(bytes.Clone(good), 0, 0, 0, 0), false},
		"first bits set":    {change(0, 0x80), false},
		"relay frame":       {change(0, 0x40), false},
		"no cookie":         {change(4, 0x20), false},
		"odd length":        {append(change(3, 25), 0), false},
		"wireguard message": {wireguard, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := IsSTUN(c.b); got != c.want {
				t.Errorf("IsSTUN = %v, want %v", got, c.want)
			}
		})
	}
}

func TestBindingRequestReadsInPion(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		id := drawID(t)
		m := &stun.Message{Raw: BindingRequest(id)}
		if err := m.Decode(); err != nil {
			t.Fatal(err)
		}
		if m.Type != stun.BindingRequest || TxID(m.TransactionID) != id {
			t.Fatalf("pion reads %v", m)
		}
		for _, a := range m.Attributes {
			if a.Type.Required() {
				t.Fatalf("%v would make a server refuse", a.Type)
			}
		}
		if _, ok := AppendBindingResponse(nil, m.Raw, netip.MustParseAddrPort("192.0.2.1:1")); !ok {
			t.Fatal("our own server would drop it")
		}
	})
}

func TestBindingResponseAgreesWithPion(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		id, addr := drawID(t), drawAddr(t)
		setters := []stun.Setter{stun.NewTransactionIDSetter(id), stun.BindingSuccess}
		if rapid.Bool().Draw(t, "software") {
			setters = append(setters, stun.NewSoftware("pion"))
		}
		setters = append(setters, &stun.XORMappedAddress{IP: net.IP(addr.Addr().AsSlice()), Port: int(addr.Port())})
		if rapid.Bool().Draw(t, "integrity") {
			setters = append(setters, stun.NewShortTermIntegrity("key"))
		}
		if rapid.Bool().Draw(t, "fingerprint") {
			setters = append(setters, stun.Fingerprint)
		}
		m, err := stun.Build(setters...)
		if err != nil {
			t.Fatal(err)
		}
		gotID, got, err := BindingResponse(m.Raw)
		if err != nil || gotID != id || got != addr {
			t.Fatalf("BindingResponse = %x, %v, %v; want %x, %v", gotID, got, err, id, addr)
		}
		gotID, got, ok := PeekResponse(m.Raw)
		if !ok || gotID != id || got != addr {
			t.Fatalf("PeekResponse = %x, %v, %v; want %x, %v", gotID, got, ok, id, addr)
		}
	})
}

func TestOurResponseReadsInPion(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		id, addr := drawID(t), drawAddr(t)
		raw, ok := AppendBindingResponse(nil, BindingRequest(id), addr)
		if !ok {
			t.Fatal("not answered")
		}
		m := &stun.Message{Raw: raw}
		var mapped stun.XORMappedAddress
		if err := errors.Join(m.Decode(), mapped.GetFrom(m)); err != nil {
			t.Fatal(err)
		}
		ip, _ := netip.AddrFromSlice(mapped.IP)
		if got := netip.AddrPortFrom(ip.Unmap(), uint16(mapped.Port)); got != addr || TxID(m.TransactionID) != id {
			t.Fatalf("pion reads %v, want %v", got, addr)
		}
	})
}

func TestBindingResponseRefuses(t *testing.T) {
	id := stun.NewTransactionIDSetter([12]byte{9})
	build := func(s ...stun.Setter) []byte { return stun.MustBuild(append([]stun.Setter{id}, s...)...).Raw }
	for name, c := range map[string]struct {
		b       []byte
		message bool // whether it is ErrMessage
	}{
		"no message":      {[]byte("hello"), true},
		"a request":       {BindingRequest(TxID{}), true},
		"an indication":   {build(stun.NewType(stun.MethodBinding, stun.ClassIndication)), true},
		"another method":  {build(stun.NewType(stun.MethodAllocate, stun.ClassSuccessResponse)), true},
		"no address":      {build(stun.BindingSuccess), true},
		"odd family":      {build(stun.BindingSuccess, stun.RawAttribute{Type: attrXORMappedAddress, Value: []byte{0, 3, 0, 0, 1, 2, 3, 4}}), true},
		"short address":   {build(stun.BindingSuccess, stun.RawAttribute{Type: attrXORMappedAddress, Value: []byte{0, 1, 0}}), true},
		"refused":         {build(stun.BindingError, stun.CodeUnknownAttribute), false},
		"refused, silent": {build(stun.BindingError), false},
	} {
		t.Run(name, func(t *testing.T) {
			_, addr, err := BindingResponse(c.b)
			if err == nil || addr.IsValid() || errors.Is(err, ErrMessage) != c.message {
				t.Errorf("BindingResponse = %v, %v", addr, err)
			}
		})
	}
	_, _, err := BindingResponse(build(stun.BindingError, stun.CodeUnknownAttribute))
	if err == nil || err.Error() != "the stun server refused with code 420" {
		t.Errorf("got %v", err)
	}
}

func TestLegacyMappedAddress(t *testing.T) {
	legacy := &stun.MappedAddress{IP: net.IPv4(192, 0, 2, 7).To4(), Port: 7}
	xored := &stun.XORMappedAddress{IP: net.IPv4(192, 0, 2, 8).To4(), Port: 8}
	for name, c := range map[string]struct {
		setters []stun.Setter
		want    string
	}{
		"alone":     {[]stun.Setter{legacy}, "192.0.2.7:7"},
		"xor after": {[]stun.Setter{legacy, xored}, "192.0.2.8:8"},
		"xor first": {[]stun.Setter{xored, legacy}, "192.0.2.8:8"},
	} {
		t.Run(name, func(t *testing.T) {
			m := stun.MustBuild(append([]stun.Setter{stun.TransactionID, stun.BindingSuccess}, c.setters...)...)
			if _, got, err := BindingResponse(m.Raw); err != nil || got.String() != c.want {
				t.Errorf("got %v, %v, want %s", got, err, c.want)
			}
		})
	}
	m := stun.MustBuild(stun.TransactionID, stun.BindingSuccess, legacy)
	if _, _, ok := PeekResponse(m.Raw); ok {
		t.Error("PeekResponse takes an address that is not XORed")
	}
}

func TestPeekResponseReadsOnlyWhatIsCovered(t *testing.T) {
	b := stun.MustBuild(stun.TransactionID, stun.BindingSuccess, stun.NewShortTermIntegrity("key"),
		&stun.XORMappedAddress{IP: net.IPv4(192, 0, 2, 8).To4(), Port: 8}).Raw
	if _, addr, ok := PeekResponse(b); ok {
		t.Errorf("took %v from behind the integrity", addr)
	}
}
