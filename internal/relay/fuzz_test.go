package relay

import (
	"bufio"
	"bytes"
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
)

func seedMessages(f *testing.F) {
	k := BindKey{1}
	o := Offer{Nonce: Nonce{1}, Key: key(f, 9).Public()}
	bind := AppendBind(nil, Bind{Ticket: ticket(f, Client, key(f, 1), nil)}, &k)
	for _, msg := range [][]byte{
		nil, bind, bind[:len(bind)-4], AppendBind(nil, Bind{Unbind: true, Ticket: ticket(f, Gateway, key(f, 2), nil)}, &k),
		AppendHello(nil, nat.TxID{}, o), WantRequest(nat.TxID{}), nat.BindingRequest(nat.TxID{}),
		AppendAnswer(nil, Answer{Code: CodeStaleNonce, Offer: o}, &k), AppendAnswer(nil, Answer{Code: CodeTaken}, &k),
		AppendAnswer(nil, Answer{Unbind: true}, &k),
	} {
		f.Add(msg)
	}
}

func FuzzBind(f *testing.F) {
	seedMessages(f)
	f.Fuzz(func(t *testing.T, msg []byte) {
		before := bytes.Clone(msg)
		b, ok := ParseBind(msg)
		if !bytes.Equal(msg, before) {
			t.Fatal("wrote to its input")
		}
		if !ok {
			return
		}
		if len(b.Ticket) != TicketSize {
			t.Fatalf("a ticket of %d bytes", len(b.Ticket))
		}
		if c, err := Verify(b.Ticket, signers(), epoch); err == nil && c.Session != key(t, 1).Public().SessionID() {
			t.Fatalf("forged: %+v", c)
		}
		again, ok := ParseBind(AppendBind(nil, b, &BindKey{1}))
		if !ok || again.ID != b.ID || again.Nonce != b.Nonce || !bytes.Equal(again.Ticket, b.Ticket) || again.Unbind != b.Unbind {
			t.Fatalf("%+v comes back as %+v", b, again)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	seedMessages(f)
	f.Fuzz(func(t *testing.T, msg []byte) {
		before := bytes.Clone(msg)
		a, ok := ParseAnswer(msg)
		o, offered := ParseOffer(msg)
		if !bytes.Equal(msg, before) {
			t.Fatal("wrote to its input")
		}
		if offered && o.Key.IsZero() {
			t.Fatal("an offer without a key")
		}
		if !ok {
			return
		}
		if again, ok := ParseAnswer(AppendAnswer(nil, a, &BindKey{1})); !ok || again != a {
			t.Fatalf("%+v comes back as %+v", a, again)
		}
	})
}

func FuzzBlocks(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(append(AppendBlockHeader(nil, 6, 6), 0x40, 0, 0, 1, 2, 3))
	f.Add(append(AppendBlockHeader(nil, 20, 0), make([]byte, 20)...))
	f.Add(append(AppendBlockHeader(nil, 11, 6), 0x40, 0, 0, 1, 2, 3, 0x4F, 0xFF, 0xFF, 0xFF, 9))
	f.Fuzz(func(t *testing.T, msg []byte) {
		total := 0
		b := WalkBlocks(msg)
		for b.Next() {
			total += BlockHeader + len(b.Data)
			if b.Segment == 0 && len(b.Data) > nat.MaxMessage {
				t.Fatal("a STUN message over the limit")
			}
			for fr := b.Frames(); fr.Next(); {
				if len(fr.Packet) == 0 || len(fr.Packet) > MaxFrame-FrameHeader {
					t.Fatalf("a packet of %d bytes", len(fr.Packet))
				}
			}
		}
		if (b.Err == nil) != (total == len(msg)) {
			t.Fatalf("%d of %d bytes, %v", total, len(msg), b.Err)
		}
	})
}

// FuzzStranger gives a relay with a session whatever a stranger may send, as datagrams or runs of them: no answer is larger
// than what it answers, and nothing changes.
func FuzzStranger(f *testing.F) {
	seedMessages(f)
	s, err := New(f.Context(), Options{Keys: signers()})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = s.Close() })
	owner, stranger := origin{addr: netip.MustParseAddrPort("192.0.2.1:1")}, origin{addr: netip.MustParseAddrPort("192.0.2.2:2")}
	now := time.Now().UnixNano()
	bound := newTalk(f)
	own, _ := bindMessage(f, bound, Client, s.offer(owner), nil)
	var count counts
	if a, _ := ParseAnswer(s.answer(nil, own, owner, now, &count)); a.Code != 0 {
		f.Fatalf("refused with %d", a.Code)
	}
	held := s.table.get(bound.channel).sides[Client].binding.Load()
	f.Add(own)
	fresh, _ := bindMessage(f, newTalk(f), Client, s.offer(stranger), func(b *Bind) { b.Ticket = make(Ticket, TicketSize) })
	f.Add(fresh)
	f.Fuzz(func(t *testing.T, msg []byte) {
		before := bytes.Clone(msg)
		if answer := s.answer(nil, msg, stranger, now, &count); len(answer) > len(msg) {
			t.Fatalf("%d bytes are answered with %d", len(msg), len(answer))
		}
		way := &lane{server: s, counts: &count, now: now, shares: &shares{}}
		web := origin{link: &link{}}
		for _, segment := range []int{1, FrameHeader + 1, 100, len(msg) + 1} {
			way.runs(msg, segment, web)
		}
		if !bytes.Equal(msg, before) {
			t.Fatal("wrote to its input")
		}
		if s.table.count.Load() != 1 || s.table.get(bound.channel).sides[Client].binding.Load() != held || way.packets+count.packets.Load() != 0 {
			t.Fatal("a stranger changed something")
		}
	})
}

// quiet is a connection of which only the reading side says something.
type quiet struct{ io.Reader }

func (quiet) Write(b []byte) (int, error) { return len(b), nil }
func (quiet) Close() error                { return nil }

func FuzzSocket(f *testing.F) {
	for _, masked := range []bool{false, true} {
		var out bytes.Buffer
		s := newSocket(struct {
			io.Reader
			io.Writer
			io.Closer
		}{nil, &out, io.NopCloser(nil)}, nil, masked)
		_ = s.writeMessage(make([]byte, headroom+10))
		_ = s.ping()
		_ = s.writeMessage(make([]byte, headroom+300))
		_ = s.frame(opClose, nil)
		s.dead.Stop()
		f.Add(out.Bytes(), masked)
	}
	f.Add([]byte{0x02, 1, 'a', 0x89, 0, 0x80, 1, 'b'}, false) // fragments with a ping between them
	f.Add([]byte{0x82, 127, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF}, false)
	f.Fuzz(func(t *testing.T, in []byte, server bool) {
		s := newSocket(quiet{bytes.NewReader(in)}, nil, !server)
		s.in = bufio.NewReader(s.conn)
		defer s.close()
		var buf []byte
		for range len(in) + 1 {
			var err error
			if buf, err = s.readMessage(buf); len(buf) > MaxMessage || cap(buf) > 2*MaxMessage {
				t.Fatalf("a message of %d bytes", len(buf))
			}
			if err != nil {
				return
			}
		}
		t.Fatal("more messages than bytes")
	})
}
