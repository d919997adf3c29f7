package portmap

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var (
	testNonce   = pcpNonce{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
	testRequest = request{self: selfAddr, port: 51820, lifetime: 20 * time.Minute}
)

// respond makes the answer to a request to map, as RFC 6887 shows it in figures 3 and 10.
func respond(asked []byte, result byte, lifetime uint32, external netip.AddrPort) []byte {
	b := bytes.Clone(asked)
	b[1] |= pcpResponse
	b[2], b[3] = 0, result
	b[4], b[5], b[6], b[7] = byte(lifetime>>24), byte(lifetime>>16), byte(lifetime>>8), byte(lifetime)
	copy(b[8:24], make([]byte, 16))
	addr := external.Addr().As16()
	b[42], b[43] = byte(external.Port()>>8), byte(external.Port())
	copy(b[44:], addr[:])
	return b
}

func TestEncodeMap(t *testing.T) {
	got := encodeMap(testRequest, testNonce)
	want := []byte{
		2, 1, 0, 0, 0, 0, 0x04, 0xB0, // version, MAP, 1200 s
		0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 192, 168, 1, 10,
		1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
		17, 0, 0, 0, 0xCA, 0x6C, 0xCA, 0x6C,
		0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0, 0, 0, 0,
	}
	if !bytes.Equal(got, want) {
		t.Errorf("got  %x\nwant %x", got, want)
	}
	if got := encodeAnnounce(selfAddr); len(got) != pcpHeader || got[1] != 0 {
		t.Errorf("announce %x", got)
	}
}

func TestReadMap(t *testing.T) {
	asked := encodeMap(testRequest, testNonce)
	given := netip.MustParseAddrPort("203.0.113.7:4000")
	good := respond(asked, 0, 600, given)
	change := func(at int, to byte) []byte {
		b := bytes.Clone(good)
		b[at] = to
		return b
	}
	got, err := readMap(good, testRequest, testNonce)
	if err != nil || got.external != given || got.lifetime != 10*time.Minute {
		t.Errorf("got %v, %v", got, err)
	}
	for name, c := range map[string]struct {
		b    []byte
		want error
	}{
		"nothing":              {nil, errPCP},
		"cut":                  {good[:len(good)-4], errPCP},
		"odd":                  {good[:len(good)-1], errPCP},
		"too long":             {append(bytes.Clone(good), make([]byte, pcpMax)...), errPCP},
		"the request":          {asked, errPCP},
		"another version":      {change(0, 3), errPCP},
		"another opcode":       {change(1, pcpResponse|2), errPCP},
		"another nonce":        {change(24, 99), errPCP},
		"another protocol":     {change(36, 6), errPCP},
		"another port":         {change(41, 1), errPCP},
		"refused":              {respond(asked, 2, 30, given), pcpResult(2)},
		"refused, cut short":   {respond(asked, 8, 30, given)[:pcpHeader], pcpResult(8)},
		"an unknown refusal":   {respond(asked, 200, 30, given), pcpResult(200)},
		"from nat-pmp":         {[]byte{0, 0x81, 0, 1, 0, 0, 0, 9}, pcpResult(1)},
		"refused to others":    {change(3, 2), pcpResult(2)},
		"refused, other nonce": {respond(encodeMap(testRequest, pcpNonce{}), 2, 30, given), errPCP},
	} {
		if got, err := readMap(c.b, testRequest, testNonce); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, %v, want %v", name, got, err, c.want)
		}
	}
	if pcpResult(2).Error() != "pcp: not authorized" || pcpResult(200).Error() != "pcp: result 200" {
		t.Error("results are not named")
	}
}

func TestMapRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		port := rapid.Uint16Range(1, 65535)
		r := request{self: selfAddr, port: port.Draw(t, "port"), lifetime: time.Duration(rapid.Uint32().Draw(t, "life")) * time.Second}
		given := netip.AddrPortFrom(netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "addr"))), port.Draw(t, "given"))
		life := rapid.Uint32().Draw(t, "given life")
		got, err := readMap(respond(encodeMap(r, testNonce), 0, life, given), r, testNonce)
		if err != nil || got.external != given || got.lifetime != time.Duration(life)*time.Second {
			t.Fatalf("got %v, %v", got, err)
		}
	})
}

func FuzzReadMap(f *testing.F) {
	asked := encodeMap(testRequest, testNonce)
	good := respond(asked, 0, 600, netip.MustParseAddrPort("203.0.113.7:4000"))
	for _, b := range [][]byte{
		nil, good, asked, good[:pcpHeader], respond(asked, 8, 30, netip.AddrPort{})[:pcpHeader], {0, 0x81, 0, 1}, append(bytes.Clone(good), 1, 0, 0, 0),
		encodeAnnounce(selfAddr),
	} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		m, err := readMap(b, testRequest, testNonce)
		if !bytes.Equal(b, before) {
			t.Fatal("wrote to its input")
		}
		if err == nil && (!bytes.Contains(b, testNonce[:]) || len(b) > pcpMax || m.lifetime < 0) {
			t.Fatalf("took %x as %v", b, m)
		}
		if _, _, err := readPCP(b, pcpAnnounce); err == nil && len(b) < pcpHeader {
			t.Fatalf("took %x for an announcement", b)
		}
	})
}

// fakePCP answers each datagram with the next of a script, then with the last again.
func fakePCP(t *testing.T, script ...func(asked []byte) [][]byte) *pcp {
	t.Helper()
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 2048)
		for i := 0; ; i++ {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			for _, answer := range script[min(i, len(script)-1)](buf[:n]) {
				_, _ = conn.WriteTo(answer, from)
			}
		}
	}()
	t.Cleanup(func() { _ = conn.Close(); <-done })
	return &pcp{router: conn.LocalAddr().(*net.UDPAddr).AddrPort(), nonce: testNonce}
}

var loopback = netip.MustParseAddr("127.0.0.1")

func TestPCPPassesOverWhatIsNoAnswer(t *testing.T) {
	given := netip.MustParseAddrPort("203.0.113.7:4000")
	p := fakePCP(t,
		func([]byte) [][]byte { return nil }, // lost
		func(asked []byte) [][]byte {
			good := respond(asked, 0, 600, given)
			forged := respond(asked, 0, 600, netip.MustParseAddrPort("198.51.100.66:666"))
			forged[24]++ // who does not see the request does not know its nonce
			return [][]byte{{}, []byte("junk"), forged, make([]byte, 2000), good[:40], good}
		})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	m, err := p.add(ctx, request{self: loopback, port: 51820, lifetime: time.Minute})
	if err != nil || m.external != given {
		t.Errorf("got %v, %v", m, err)
	}
}

func TestPCPEndsWithItsContext(t *testing.T) {
	p := fakePCP(t, func([]byte) [][]byte { return [][]byte{[]byte("junk")} })
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if m, err := p.add(ctx, request{self: loopback, port: 51820}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, %v", m, err)
	}
}

func TestPCPHearsRefusals(t *testing.T) {
	p := fakePCP(t, func(asked []byte) [][]byte { return [][]byte{respond(asked, 2, 30, netip.AddrPortFrom(selfAddr, 1))} })
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := p.add(ctx, request{self: loopback, port: 51820}); !errors.Is(err, pcpResult(2)) {
		t.Errorf("got %v", err)
	}
	if err := p.remove(ctx, request{self: loopback, port: 51820}, mapping{}); !errors.Is(err, pcpResult(2)) {
		t.Errorf("removing gives %v", err)
	}
}

// Nobody listens there: on Linux that is known at once.
func TestPCPWithoutARouter(t *testing.T) {
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &pcp{router: conn.LocalAddr().(*net.UDPAddr).AddrPort()}
	_ = conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if m, err := p.add(ctx, request{self: loopback, port: 51820}); err == nil {
		t.Errorf("got %v", m)
	}
}
