package relay

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// link is the server's end of a WebSocket. It may be bound for many sessions, which share its outbox.
//
//	accepted ──► hello ──► unbound ⇄ bound ──► closed: bindings untied, writer waited for
//	                          └── 10 s, or after its standing ticket 10 s ──┘
type link struct {
	server *Server
	source netip.Addr
	nonce  Nonce // good for this connection
	out    *outbox
	port   *port    // whose socket it sends through towards UDP; nil where there is none
	holder wire.Key // of the standing ticket that it has shown; guarded by the server's lock

	patient atomic.Int64 // how long it may be left unread for the sake of one message: nanoseconds, 0 unless it is bound once
	tired   int64        // it is not left unread again before; the reader's, as [lane.now]

	mu          sync.Mutex
	bound       map[*binding]struct{}
	standsUntil time.Time // it may stay unbound until then
	counted     bool      // by the server, as one that is of no use to anybody
	socket      *socket
	lonely      *time.Timer // ends an unbound link
	closed      bool
}

// messages are buffers that hold one message. A link has one only while it handles one.
var messages = sync.Pool{New: func() any { return new([]byte) }}

func newLink(s *Server, source netip.Addr) *link {
	l := &link{server: s, source: source, counted: true, bound: map[*binding]struct{}{}, out: newOutbox(s.opts.FlowQueue, s.opts.Queue)}
	_, _ = rand.Read(l.nonce[:])
	if len(s.ports) > 0 {
		l.port = s.ports[int(l.nonce[0])%len(s.ports)]
	}
	return l
}

// serve runs the link until it ends.
func (l *link) serve(socket *socket) error {
	defer socket.close()
	if !l.open(socket) {
		return socket.bye(closeGoingAway, "the relay stops")
	}
	w := newWriter(l.out, socket, &l.server.counts.written)
	l.greet()
	err := l.read(socket)
	w.stop()
	_ = socket.close()
	w.running.Wait()
	return err
}

// greet sends the relay's first message. It is a function of its own, as is whatever else would be on the stack of a link at rest.
//
//go:noinline
func (l *link) greet() {
	var id nat.TxID
	_, _ = rand.Read(id[:])
	l.out.putControl(AppendHello(nil, id, l.server.offer(origin{link: l})))
}

// open makes a socket the link's own, unless the server has closed meanwhile.
func (l *link) open(s *socket) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	l.socket = s
	l.lonely = time.AfterFunc(BindTimeout, l.expel)
	return true
}

// expel ends the link unless it has been bound meanwhile, or may stay all the same.
func (l *link) expel() {
	l.mu.Lock()
	lonely := len(l.bound) == 0 && !l.stands()
	l.mu.Unlock()
	if lonely {
		l.end(closePolicy, "nothing was bound")
	}
}

// end tells the other side and closes the link, which ends serve.
func (l *link) end(code uint16, reason string) {
	l.mu.Lock()
	l.closed = true
	s := l.socket
	l.mu.Unlock()
	if s != nil {
		_ = s.bye(code, reason)
	}
}

// leave unties all that is bound to the link.
func (l *link) leave() {
	l.mu.Lock()
	bound := l.bound
	l.bound, l.closed = nil, true
	if l.lonely != nil {
		l.lonely.Stop()
	}
	counted := l.counted
	l.counted = false
	l.mu.Unlock()
	l.out.close()
	if counted {
		l.server.countUnbound(l.source, -1)
	}
	for b := range bound {
		l.server.table.untie(channelOf(b.session()), b.side(), func(_ *session, now *binding) bool { return now == b })
	}
}

// remember keeps a binding, to be untied when the link ends. It reports whether the link is still open.
func (l *link) remember(b *binding) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	l.bound[b] = struct{}{}
	l.patient.Store(int64(patienceOf(l.bound)))
	if len(l.bound) == 1 {
		l.lonely.Stop()
		l.recount()
	}
	return true
}

// forget drops a binding that has gone elsewhere or ended. The last one makes the link lonely.
func (l *link) forget(b *binding) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.bound[b]; !ok {
		return
	}
	delete(l.bound, b)
	l.patient.Store(int64(patienceOf(l.bound)))
	if len(l.bound) == 0 {
		l.lonely.Reset(max(time.Until(l.standsUntil), 0) + BindTimeout)
		l.recount()
	}
}

// recount tells the server whether the link is of use to anybody. l.mu is held.
func (l *link) recount() {
	idle := len(l.bound) == 0 && !l.stands()
	switch {
	case idle && !l.counted:
		l.server.countUnbound(l.source, +1)
	case !idle && l.counted:
		l.server.countUnbound(l.source, -1)
	}
	l.counted = idle
}

// read reads until the link ends.
func (l *link) read(socket *socket) error {
	for {
		h, err := socket.await()
		if err != nil {
			return ended(socket, err)
		}
		buf := messages.Get().(*[]byte)
		*buf, err = socket.body(*buf, h)
		if err == nil {
			err = l.message(*buf)
		}
		messages.Put(buf)
		if err != nil {
			return ended(socket, err)
		}
	}
}

// ended tells the other side what it did wrong. Its leaving is no error.
func ended(socket *socket, err error) error {
	switch {
	case errors.Is(err, errClosed):
		return nil
	case errors.Is(err, errSocket), errors.Is(err, ErrBlock):
		_ = socket.bye(closeProtocol, "")
	}
	return err
}

// message handles one message.
func (l *link) message(msg []byte) error {
	way := &lane{server: l.server}
	if l.port != nil {
		way = l.port.pool.Get().(*lane)
		defer l.port.pool.Put(way)
	}
	way.patience, way.counts, way.now = 0, &l.server.counts, time.Now().UnixNano()
	defer way.flush()
	if allowed := time.Duration(l.patient.Load()); allowed > 0 && way.now >= l.tired {
		way.patience = allowed
		defer func() {
			if way.patience <= 0 && allowed < patience {
				l.tired = way.now + int64(tiredFor)
			}
		}()
	}
	from := origin{link: l}
	blocks := WalkBlocks(msg)
	for blocks.Next() {
		if blocks.Segment == 0 {
			l.control(blocks.Data, way)
			continue
		}
		way.runs(blocks.Data, blocks.Segment, from)
	}
	if blocks.Err != nil {
		way.counts.junk.Add(1)
		return fmt.Errorf("handle a message: %w", blocks.Err)
	}
	return nil
}

// control answers one STUN message.
func (l *link) control(msg []byte, way *lane) {
	var buf [maxAnswer]byte
	if answer, ok := l.server.stand(buf[:0], msg, l, way.now); ok {
		if len(answer) > 0 {
			l.out.putControl(answer)
		}
		return
	}
	if answer := l.server.answer(buf[:0], msg, origin{link: l}, way.now, way.counts); len(answer) > 0 {
		l.out.putControl(answer)
		way.hand(msg, answer, origin{link: l})
	}
}
