package tunnel

import (
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/repair"
)

// flushAfter is how long packets wait for others that one parity covers with them: so long at least, and twice at most.
const flushAfter = 3 * time.Millisecond

// parities adds parities to what is sent to one peer. It is there only while the peer tells of loss.
type parities struct {
	peer *Peer

	mu      sync.Mutex
	encoder *repair.Encoder
	timer   *time.Timer // set while armed
	group   uint64      // that the timer was set for
	closed  bool
}

// mixture is a batch of packets with the parities among them.
type mixture struct {
	list  [][]byte
	rooms [conn.IdealBatchSize/repair.GroupSize + 1][repair.MaxPacket + 4]byte // a relay's header goes before a parity, too
}

var mixtures = sync.Pool{New: func() any { return &mixture{} }}

// send sends packets, and parities for those that make up a group, each behind the last of its packets: they are of one size, so the
// kernel segments them in one run.
func (s *parities) send(bufs [][]byte, r *route) error {
	m := mixtures.Get().(*mixture)
	defer mixtures.Put(m)
	m.list = m.list[:0]
	added := 0
	s.mu.Lock()
	for _, buf := range bufs {
		m.list = append(m.list, buf)
		if added == len(m.rooms) {
			continue // more than a batch: what is left has none
		}
		if parity := s.encoder.Add(m.rooms[added][:0], buf); len(parity) > 0 {
			m.list = append(m.list, parity)
			added++
		}
	}
	s.arm()
	s.mu.Unlock()
	err := s.peer.tunnel.bind.transmit(m.list, r)
	clear(m.list)
	return err
}

// arm sets the timer for the group that is open. mu is held.
func (s *parities) arm() {
	group, open := s.encoder.Open()
	if !open || s.closed || s.timer != nil {
		return
	}
	s.group = group
	s.peer.timers.Add(1)
	s.timer = time.AfterFunc(flushAfter, func() {
		defer s.peer.timers.Done()
		s.flush()
	})
}

// flush sends the parity of the group that the timer was set for, unless it has become full.
func (s *parities) flush() {
	var room [repair.MaxPacket + 4]byte
	var parity []byte
	s.mu.Lock()
	s.timer = nil
	if group, open := s.encoder.Open(); open && !s.closed && group == s.group {
		parity = s.encoder.Flush(room[:0])
	}
	s.arm()
	s.mu.Unlock()
	if r := s.peer.current.Load(); r != nil && len(parity) > 0 && !r.stream() {
		_ = s.peer.tunnel.bind.sendTo(parity, r)
	}
}

// close ends the timer.
func (s *parities) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.timer != nil && s.timer.Stop() {
		s.peer.timers.Done()
	}
	s.timer = nil
}

// covers gives what adds parities to these packets, nil where nothing does. On a stream nothing is lost but by full queues.
func (p *Peer) covers(bufs [][]byte, r *route) *parities {
	s := p.parities.Load()
	if s == nil || r.stream() || messageType(bufs[0]) != device.MessageTransportType {
		return nil
	}
	return s
}

// heedTally takes the other side's word on what it has got of our packets. p.mu is held.
func (p *Peer) heedTally(t nat.Tally, now time.Time) {
	c := p.engine.chosen
	if !t.Known || c == nil || c.rank() == rankStream {
		return
	}
	on := p.governor.Report(repair.Count{Sent: t.Sent, Came: t.Came}, p.tx.Load(), now)
	if on != (p.parities.Load() != nil) {
		p.tunnel.log.Info("packets get lost", "session", p.opts.Session, "share", p.governor.Loss(), "parities", on)
		p.cover(on)
	}
}

// cover begins or ends the sending of parities. p.mu is held.
func (p *Peer) cover(on bool) {
	if on {
		p.parities.Store(&parities{peer: p, encoder: repair.NewEncoder()})
	} else if s := p.parities.Swap(nil); s != nil {
		s.close()
	}
}

// uncover begins anew where another path has another loss. p.mu is held.
func (p *Peer) uncover() {
	p.governor.Reset()
	p.cover(false)
}
