package relay

import (
	"bytes"
	"crypto/rand"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/cork"
	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// stage is a relay with both ways in, on loopback.
type stage struct {
	*Server
	http *httptest.Server
}

func newStage(tb testing.TB, edit func(*Options)) *stage {
	tb.Helper()
	opts := Options{UDP: "127.0.0.1:0", Keys: signers()}
	if edit != nil {
		edit(&opts)
	}
	s, err := New(tb.Context(), opts)
	if err != nil {
		tb.Fatal(err)
	}
	st := &stage{Server: s, http: httptest.NewUnstartedServer(s)}
	st.http.Listener = cork.Listener(st.http.Listener)
	st.http.StartTLS()
	dials := st.http.Client().Transport.(*http.Transport)
	dials.DialContext = cork.Dialer(dials.DialContext)
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
		st.http.Close()
	})
	return st
}

// talk is one session's two keys.
type talk struct {
	client, gateway wire.PrivateKey
	id              string
	channel         Channel
}

func newTalk(tb testing.TB) *talk {
	tb.Helper()
	var t talk
	var err error
	if t.client, err = wire.NewPrivateKey(); err != nil {
		tb.Fatal(err)
	}
	if t.gateway, err = wire.NewPrivateKey(); err != nil {
		tb.Fatal(err)
	}
	t.id = t.client.Public().SessionID()
	if t.channel, err = ChannelOf(t.id); err != nil {
		tb.Fatal(err)
	}
	return &t
}

func (t *talk) key(side Side) wire.PrivateKey { return []wire.PrivateKey{t.client, t.gateway}[side] }

// ticket is one that is valid for an hour from now, unless edited.
func (t *talk) ticket(tb testing.TB, side Side, edit func(*Claims)) Ticket {
	return ticket(tb, side, t.key(side), func(c *Claims) {
		c.Session, c.Issued, c.Expires, c.Rate = t.id, time.Now(), time.Now().Add(time.Hour), 0
		if edit != nil {
			edit(c)
		}
	})
}

// end is one side's way to a relay, over UDP or over a WebSocket.
type end interface {
	stun(msg []byte)                  // sends
	frames(c Channel, pkts ...[]byte) // sends
	next() (stun []byte, c Channel, pkt []byte)
	offer() Offer
}

// udpEnd is an end over UDP.
type udpEnd struct {
	tb   testing.TB
	conn *net.UDPConn
	buf  [1 << 16]byte
}

func newUDP(tb testing.TB, to netip.AddrPort) *udpEnd {
	tb.Helper()
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = conn.Close() })
	return &udpEnd{tb: tb, conn: conn}
}

func (e *udpEnd) addr() netip.AddrPort { return e.conn.LocalAddr().(*net.UDPAddr).AddrPort() }

func (e *udpEnd) stun(msg []byte) {
	if _, err := e.conn.Write(msg); err != nil {
		e.tb.Fatal(err)
	}
}

func (e *udpEnd) frames(c Channel, pkts ...[]byte) {
	for _, p := range pkts {
		b := append(make([]byte, FrameHeader), p...)
		PutHeader(b, c)
		e.stun(b)
	}
}

func (e *udpEnd) read(wait time.Duration) []byte {
	_ = e.conn.SetReadDeadline(time.Now().Add(wait))
	n, err := e.conn.Read(e.buf[:])
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err != nil {
		e.tb.Fatal(err)
	}
	return bytes.Clone(e.buf[:n])
}

func (e *udpEnd) next() ([]byte, Channel, []byte) {
	e.tb.Helper()
	b := e.read(time.Minute)
	if b == nil {
		e.tb.Fatal("nothing came")
	}
	if c, p, ok := ParseFrame(b); ok {
		return nil, c, p
	}
	return b, 0, nil
}

func (e *udpEnd) offer() Offer {
	e.tb.Helper()
	e.stun(WantRequest(txid()))
	msg, _, _ := e.next()
	o, ok := ParseOffer(msg)
	if !ok {
		e.tb.Fatal("the relay offers nothing")
	}
	return o
}

func txid() (id nat.TxID) {
	_, _ = rand.Read(id[:])
	return id
}

// streamEnd is an end over a WebSocket.
type streamEnd struct {
	tb testing.TB
	*Stream
	blocks Blocks
	run    Frames
}

func newStream(tb testing.TB, st *stage) *streamEnd {
	tb.Helper()
	s, err := Dial(tb.Context(), DialOptions{URL: st.http.URL, HTTP: st.http.Client()})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() })
	return &streamEnd{tb: tb, Stream: s}
}

func (e *streamEnd) offer() Offer { return e.Offer() }

func (e *streamEnd) stun(msg []byte) {
	if !e.SendSTUN(msg) {
		e.tb.Fatal("no room for a STUN message")
	}
}

func (e *streamEnd) frames(c Channel, pkts ...[]byte) {
	if n := e.Send(c, pkts); n != len(pkts) {
		e.tb.Fatalf("%d of %d packets were taken", n, len(pkts))
	}
}

func (e *streamEnd) next() ([]byte, Channel, []byte) {
	e.tb.Helper()
	for {
		if e.run.Next() {
			return nil, e.run.Channel, e.run.Packet
		}
		if e.blocks.Next() {
			if e.blocks.Segment == 0 {
				return e.blocks.Data, 0, nil
			}
			e.run = e.blocks.Frames()
			continue
		}
		msg, err := e.Receive()
		if err != nil {
			e.tb.Fatal(err)
		}
		e.blocks = WalkBlocks(msg)
	}
}

// bindMessage makes a BIND for one side of a session, and its key.
func bindMessage(tb testing.TB, t *talk, side Side, o Offer, edit func(*Bind)) ([]byte, BindKey) {
	tb.Helper()
	k, err := DeriveBindKey(t.key(side), o.Key)
	if err != nil {
		tb.Fatal(err)
	}
	b := Bind{ID: txid(), Nonce: o.Nonce, Ticket: t.ticket(tb, side, nil)}
	if edit != nil {
		edit(&b)
	}
	return AppendBind(nil, b, &k), k
}

// bind binds an end to one side of a session and gives the relay's answer.
func bind(tb testing.TB, e end, t *talk, side Side, edit func(*Bind)) Answer {
	tb.Helper()
	msg, k := bindMessage(tb, t, side, e.offer(), edit)
	e.stun(msg)
	return answer(tb, e, &k)
}

// answer waits for the answer to a bind.
func answer(tb testing.TB, e end, k *BindKey) Answer {
	tb.Helper()
	for {
		msg, _, _ := e.next()
		if msg == nil {
			continue
		}
		a, ok := ParseAnswer(msg)
		if !ok || a.Code == 0 && !VerifyMessage(msg, k) {
			tb.Fatalf("no answer to a bind: %x", msg)
		}
		return a
	}
}

// mustBind binds and wants success.
func mustBind(tb testing.TB, e end, t *talk, side Side) {
	tb.Helper()
	if a := bind(tb, e, t, side, nil); a.Code != 0 {
		tb.Fatalf("%s is refused with %d", side, a.Code)
	}
}

// silent sends a packet through a session that works after what should have given nothing, and wants it to be the next
// thing that comes.
func silent(tb testing.TB, from, to end, t *talk) {
	tb.Helper()
	mark := make([]byte, 16)
	_, _ = rand.Read(mark)
	from.frames(t.channel, mark)
	if stun, c, pkt := to.next(); c != t.channel || !bytes.Equal(pkt, mark) {
		tb.Fatalf("something came that should not have: %x, %x on %x", stun, pkt, c)
	}
}

// eventually waits for a condition.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatal("never: " + what)
		}
	}
}
