package tunnel

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/relay"
)

// stream is an open WebSocket to a relay, shared by all sessions that use it there.
type stream struct {
	node *node
	conn RelayStream
	lone bool          // it serves one peer: see wait
	quit chan struct{} // closed when it is to be used no more
	once sync.Once

	opened time.Time
}

var _ door = (*stream)(nil)

// send queues packets, or without a header messages for the relay itself; what there is no room for is dropped.
func (s *stream) send(packets [][]byte, r *route) error {
	if r.header == 0 {
		for _, msg := range packets {
			s.conn.SendSTUN(msg)
		}
		return nil
	}
	s.conn.Send(channel(r.header), packets)
	return nil
}

// streamWait is how long packets wait for a WebSocket that does not keep up, before they are dropped.
const streamWait = 250 * time.Millisecond

// wait returns when there is room for another batch, or after streamWait. A client waits: its TUN is not read meanwhile, and senders
// notice. A gateway does not, because the packets of one session would fill its memory; there its own stack is the sender.
func (s *stream) wait(r *route) {
	if s.lone {
		s.conn.Wait(channel(r.header), streamWait)
	}
}

// close ends the stream, and with it its reader.
func (s *stream) close() {
	s.once.Do(func() { close(s.quit) })
	_ = s.conn.Close()
}

// isOpen reports whether the stream may still be of use.
func (s *stream) isOpen() bool {
	select {
	case <-s.quit:
		return false
	default:
		return true
	}
}

// messages are the arrivals of a stream: the frames of one WebSocket message. What the relay itself says is handled on the way.
type messages struct {
	relays *relays
	blocks relay.Blocks
	frames relay.Frames
	from   route
}

func (m *messages) next() ([]byte, *route, bool) {
	for !m.frames.Next() {
		if !m.blocks.Next() {
			return nil, nil, false
		}
		if m.frames = m.blocks.Frames(); m.blocks.Segment == 0 {
			m.relays.take(m.blocks.Data, netip.AddrPort{})
		}
	}
	m.from.header = header(m.frames.Channel)
	return m.frames.Packet, &m.from, true
}

// read hands what comes in to the device until the stream ends.
func (s *stream) read(r *relays) error {
	m := &messages{relays: r, from: route{spot: spot{via: s}}}
	p := newParcel(m)
	for {
		msg, err := s.conn.Receive()
		if err != nil {
			return err
		}
		m.blocks, m.frames = relay.WalkBlocks(msg), relay.Frames{}
		if !r.t.bind.side.hand(p, s.quit) {
			return errClosed
		}
		if m.blocks.Err != nil {
			return m.blocks.Err
		}
	}
}

var errClosed = errors.New("closed")

// streams dials the WebSockets that are needed and gives those that have not been for a while. mu is held.
func (r *relays) streams(now time.Time) (idle []*stream) {
	if r.opts.Dial == nil {
		return nil
	}
	early, stands := now.Before(r.early), now.Before(r.stands.until)
	for _, n := range r.nodes {
		switch needed := n.needs(r.opts.Keep, early, stands); {
		case needed && n.stream == nil && !n.dialing && !now.Before(n.redial):
			n.dialing, n.redial, n.needed = true, time.Time{}, time.Time{}
			r.tasks.Go(func() { r.run(n) })
		case needed:
			n.needed = time.Time{}
		case n.stream == nil:
			n.redial, n.failed = time.Time{}, 0
		case n.needed.IsZero():
			n.needed = now
		case now.Sub(n.needed) >= unusedFor:
			idle = append(idle, n.stream)
			n.needed = now
		}
	}
	return idle
}

// run dials a relay's WebSocket and serves it until it ends.
func (r *relays) run(n *node) {
	ctx, cancel := context.WithTimeout(r.ctx, dialLimit)
	start := time.Now()
	conn, err := r.opts.Dial(ctx, n.URL)
	cancel()
	if err != nil {
		r.t.log.Info("no websocket to a relay", "relay", n.Name, "err", err)
		r.ended(n, err)
		return
	}
	s := &stream{node: n, conn: conn, lone: !r.opts.Keep, quit: make(chan struct{}), opened: time.Now()}
	defer s.close()
	r.act(func(now time.Time) {
		n.stream, n.dialing, n.dialed, n.err, n.stood = s, false, now.Sub(start), nil, false
		r.open[s] = struct{}{}
		n.version.Add(1)
		r.stand(n)
	})
	if r.ctx.Err() != nil {
		s.close() // close may not have seen it
	}
	r.t.log.Debug("websocket to a relay", "relay", n.Name, "rtt", time.Since(start))
	r.stir(n)
	err = s.read(r)
	r.mu.Lock()
	delete(r.open, s)
	r.mu.Unlock()
	s.once.Do(func() { close(s.quit) })
	if !errors.Is(err, errClosed) && r.ctx.Err() == nil {
		r.t.log.Debug("the websocket to a relay ended", "relay", n.Name, "err", err)
	}
	r.ended(n, err)
	r.stir(n)
}

// ended notes that a relay's WebSocket is gone, or could not be had.
func (r *relays) ended(n *node, err error) {
	r.act(func(now time.Time) {
		if n.stream != nil && now.Sub(n.stream.opened) >= usefulFor {
			n.failed = 0
		}
		n.dialing, n.stream, n.err, n.lost = false, nil, err, now
		n.version.Add(1)
		wait := min(redialFirst<<min(n.failed, 10), redialMost)
		n.failed++
		n.redial = now.Add(wait + time.Duration(rand.Int64N(int64(wait/4))))
		r.answers(n, false)
	})
}
