package tunnel

import (
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/repair"
)

const (
	// holdFor is how long packets wait for what is missing before them: longer than its parity takes, and much shorter than a TCP
	// sender waits before it takes a packet for lost.
	holdFor = 15 * time.Millisecond
	// mendFor is how long a peer's packets are kept after its last parity.
	mendFor = 30 * time.Second
	// maxMenders bounds the peers whose packets are kept, 50 KB each.
	maxMenders = 256
)

// mender rebuilds what is lost of one peer's packets. It is there only while the peer sends parities.
type mender struct {
	peer *Peer
	quit chan struct{} // closed with it

	mu      sync.Mutex
	decoder *repair.Decoder
	timer   *time.Timer // set while armed
	gap     uint64      // that it was set for
	used    time.Time   // when the last parity came
	closed  bool
}

// packet takes a transport message: see [repair.Decoder.Packet].
func (m *mender) packet(pkt []byte) (now, more bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now, more = m.decoder.Packet(pkt)
	m.arm()
	return now, more
}

// parity takes a parity packet. more says that there are packets for the device.
func (m *mender) parity(pkt []byte) (more bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used = time.Now()
	before := m.decoder.Rebuilt
	more = m.decoder.Parity(pkt)
	if n := m.decoder.Rebuilt - before; n > 0 {
		m.peer.rebuilt.Add(n)
		m.peer.tunnel.bind.counts.rebuilt.Add(n)
	}
	m.arm()
	return more
}

// pop copies the next packet for the device into buf: see [repair.Decoder.Pop].
func (m *mender) pop(buf []byte) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.decoder.Pop(buf)
	m.arm()
	return n
}

// arm sets the timer for the gap that packets wait for. mu is held.
func (m *mender) arm() {
	gap, waiting := m.decoder.Waiting()
	if !waiting || m.closed || m.timer != nil {
		return
	}
	m.gap = gap
	m.peer.timers.Add(1)
	m.timer = time.AfterFunc(holdFor, func() {
		defer m.peer.timers.Done()
		m.expire()
	})
}

// expire ends the wait, unless that is for another gap than it was when the timer was set.
func (m *mender) expire() {
	more := false
	m.mu.Lock()
	m.timer = nil
	if gap, waiting := m.decoder.Waiting(); waiting && gap == m.gap {
		more = m.decoder.GiveUp()
	}
	m.arm()
	m.mu.Unlock()
	if more {
		parcel := newParcel(nothing{})
		parcel.release = m
		m.peer.tunnel.bind.side.hand(parcel, m.quit)
	}
}

// close ends the timer. What still waits is lost.
func (m *mender) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	m.closed = true
	close(m.quit)
	if m.timer != nil && m.timer.Stop() {
		m.peer.timers.Done()
	}
	m.timer = nil
	m.peer.tunnel.bind.menders.Add(-1)
}

// nothing has arrived.
type nothing struct{}

func (nothing) next() ([]byte, *route, bool) { return nil, nil, false }

// mend gives what rebuilds the peer's packets, which the first parity brings into being; nil where there is no room.
func (p *Peer) mend() *mender {
	if m := p.mender.Load(); m != nil {
		return m
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if m := p.mender.Load(); m != nil || p.closed {
		return m
	}
	if b := p.tunnel.bind; b.menders.Add(1) > maxMenders {
		b.menders.Add(-1)
		return nil
	}
	m := &mender{peer: p, quit: make(chan struct{}), decoder: repair.NewDecoder(), used: time.Now()}
	p.mender.Store(m)
	return m
}

// unmend lets go of what rebuilds packets when no parity has come for a while, or at once. p.mu is held.
func (p *Peer) unmend(now time.Time, atOnce bool) {
	m := p.mender.Load()
	if m == nil {
		return
	}
	m.mu.Lock()
	idle := atOnce || now.Sub(m.used) > mendFor
	m.mu.Unlock()
	if idle {
		p.mender.Store(nil)
		m.close()
	}
}

// tally counts what comes from one peer.
type tally struct {
	mu sync.Mutex
	repair.Tally
}

// note counts a run of packets.
func (t *tally) note(r repair.Run) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.Note(r.Index, r.Low, r.High, r.N)
}

// tell gives what the other side is told.
func (t *tally) tell() nat.Tally {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.Count()
	return nat.Tally{Known: true, Sent: c.Sent, Came: c.Came}
}
