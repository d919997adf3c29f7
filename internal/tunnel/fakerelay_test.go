package tunnel

import (
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// fakeRelay is a relay on loopback, over UDP and over streams in memory, that can be blocked, restarted and counted. It keeps to
// the protocol of package relay.
type fakeRelay struct {
	name   string
	conn   *net.UDPConn
	signer ed25519.PrivateKey
	done   chan struct{}

	noUDP   atomic.Bool // swallow every datagram
	noDial  atomic.Bool // refuse WebSockets
	full    atomic.Bool // takes no binding
	largest atomic.Int64
	binds   atomic.Int64 // that were taken
	asked   atomic.Int64 // Binding requests
	frames  atomic.Int64 // that were forwarded

	mu       sync.Mutex
	key      wire.PrivateKey
	nonce    relay.Nonce
	sides    map[relay.Channel]*[2]fakeEnd
	streams  map[*fakeStream]bool
	sessions map[relay.Channel]string
}

// fakeEnd is where one side of a session is bound: an address or a stream.
type fakeEnd struct {
	addr   netip.AddrPort
	stream *fakeStream
}

func newFakeRelay(t *testing.T, name string) *fakeRelay {
	t.Helper()
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(loopback(0)))
	if err != nil {
		t.Fatal(err)
	}
	_, signer, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	r := &fakeRelay{name: name, conn: conn, signer: signer, done: make(chan struct{}), streams: map[*fakeStream]bool{}}
	r.largest.Store(1 << 16)
	r.restart()
	go r.run()
	t.Cleanup(func() { conn.Close(); <-r.done })
	return r
}

// restart forgets everything and takes a new key.
func (r *fakeRelay) restart() {
	key, _ := wire.NewPrivateKey()
	r.mu.Lock()
	r.key, r.sides, r.sessions = key, map[relay.Channel]*[2]fakeEnd{}, map[relay.Channel]string{}
	r.nonce[0]++
	streams := r.streams
	r.streams = map[*fakeStream]bool{}
	r.mu.Unlock()
	for s := range streams {
		_ = s.Close()
	}
}

func (r *fakeRelay) relay() Relay {
	return Relay{Name: r.name, UDP: []netip.AddrPort{unmap(r.conn.LocalAddr().(*net.UDPAddr).AddrPort())}, URL: "ws://" + r.name}
}

// grant is a ticket for one side.
func (r *fakeRelay) grant(t *testing.T, session string, side relay.Side, key wire.Key) Grant {
	t.Helper()
	ends := time.Now().Add(time.Hour)
	ticket, err := relay.Sign(r.signer, relay.Claims{Session: session, Side: side, Key: key, Issued: time.Now(), Expires: ends})
	if err != nil {
		t.Fatal(err)
	}
	return Grant{Relay: r.relay(), Ticket: ticket, Expires: ends}
}

func (r *fakeRelay) run() {
	defer close(r.done)
	buf := make([]byte, 65536)
	for {
		n, from, err := r.conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		if !r.noUDP.Load() && n <= int(r.largest.Load()) {
			r.take(buf[:n], fakeEnd{addr: unmap(from)})
		}
	}
}

// take handles one datagram or message of a block.
func (r *fakeRelay) take(pkt []byte, from fakeEnd) {
	if c, packet, ok := relay.ParseFrame(pkt); ok {
		r.forward(c, packet, from)
		return
	}
	r.mu.Lock()
	offer := relay.Offer{Nonce: r.nonce, Key: r.key.Public()}
	r.mu.Unlock()
	if b, ok := relay.ParseBind(pkt); ok {
		r.send(r.bind(pkt, b, offer, from), from)
		return
	}
	if from.stream == nil {
		if answer, ok := relay.AppendBindingResponse(nil, pkt, from.addr, func() relay.Offer { return offer }); ok {
			r.asked.Add(1)
			r.send(answer, from)
		}
	}
}

// bind judges a bind and gives the answer.
func (r *fakeRelay) bind(pkt []byte, b relay.Bind, offer relay.Offer, from fakeEnd) []byte {
	fail := func(code int) []byte {
		return relay.AppendAnswer(nil, relay.Answer{ID: b.ID, Unbind: b.Unbind, Code: code, Offer: offer}, nil)
	}
	if b.Nonce != offer.Nonce {
		return fail(relay.CodeStaleNonce)
	}
	claims, err := relay.Verify(b.Ticket, []ed25519.PublicKey{r.signer.Public().(ed25519.PublicKey)}, time.Now())
	if err != nil {
		return fail(relay.CodeTicket)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	key, err := relay.DeriveBindKey(r.key, claims.Key)
	if err != nil || !relay.VerifyMessage(pkt, &key) {
		return fail(relay.CodeTicket)
	}
	if r.full.Load() && !b.Unbind {
		return fail(relay.CodeFull)
	}
	c, _ := relay.ChannelOf(claims.Session)
	if other := r.sessions[c]; other != "" && other != claims.Session {
		return fail(relay.CodeTaken)
	}
	ends := r.sides[c]
	if ends == nil {
		ends = &[2]fakeEnd{}
		r.sides[c], r.sessions[c] = ends, claims.Session
	}
	ends[claims.Side] = from
	if b.Unbind {
		ends[claims.Side] = fakeEnd{}
	} else {
		r.binds.Add(1)
	}
	return relay.AppendAnswer(nil, relay.Answer{ID: b.ID, Unbind: b.Unbind, Mapped: from.addr}, &key)
}

// forward passes a packet on to the other side.
func (r *fakeRelay) forward(c relay.Channel, packet []byte, from fakeEnd) {
	r.mu.Lock()
	ends := r.sides[c]
	var to fakeEnd
	if ends != nil && ends[0] == from {
		to = ends[1]
	} else if ends != nil && ends[1] == from {
		to = ends[0]
	}
	r.mu.Unlock()
	if to == (fakeEnd{}) {
		return
	}
	r.frames.Add(1)
	framed := append(binary.BigEndian.AppendUint32(nil, header(c)), packet...)
	if to.stream != nil {
		to.stream.put(append(relay.AppendBlockHeader(nil, len(framed), len(framed)), framed...))
		return
	}
	if !r.noUDP.Load() {
		_, _ = r.conn.WriteToUDPAddrPort(framed, to.addr)
	}
}

// send answers a STUN message.
func (r *fakeRelay) send(msg []byte, to fakeEnd) {
	switch {
	case to.stream != nil:
		to.stream.put(append(relay.AppendBlockHeader(nil, len(msg), 0), msg...))
	case !r.noUDP.Load():
		_, _ = r.conn.WriteToUDPAddrPort(msg, to.addr)
	}
}

// dial is a RelayOptions.Dial for several relays.
func dialFakes(relays ...*fakeRelay) func(context.Context, string) (RelayStream, error) {
	return func(_ context.Context, url string) (RelayStream, error) {
		for _, r := range relays {
			if url != "ws://"+r.name {
				continue
			}
			if r.noDial.Load() {
				return nil, errors.New("refused")
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			s := &fakeStream{relay: r, offer: relay.Offer{Nonce: r.nonce, Key: r.key.Public()}, in: make(chan []byte, 4096), quit: make(chan struct{})}
			r.streams[s] = true
			return s, nil
		}
		return nil, errors.New("no such relay")
	}
}

// fakeStream is a WebSocket in memory.
type fakeStream struct {
	relay *fakeRelay
	offer relay.Offer
	in    chan []byte // messages for the side
	quit  chan struct{}
	once  sync.Once
}

func (s *fakeStream) Offer() relay.Offer { return s.offer }

func (s *fakeStream) Send(c relay.Channel, packets [][]byte) int {
	for _, p := range packets {
		s.relay.forward(c, append([]byte(nil), p...), fakeEnd{stream: s})
	}
	return len(packets)
}

func (*fakeStream) Wait(relay.Channel, time.Duration) {}

func (s *fakeStream) SendSTUN(msg []byte) bool {
	s.relay.take(append([]byte(nil), msg...), fakeEnd{stream: s})
	return true
}

func (s *fakeStream) Receive() ([]byte, error) {
	select {
	case msg := <-s.in:
		return msg, nil
	case <-s.quit:
		return nil, net.ErrClosed
	}
}

func (s *fakeStream) put(msg []byte) {
	select {
	case s.in <- msg:
	default:
	}
}

func (s *fakeStream) Close() error {
	s.once.Do(func() { close(s.quit) })
	s.relay.mu.Lock()
	defer s.relay.mu.Unlock()
	delete(s.relay.streams, s)
	return nil
}
