package tunnel

import (
	"bytes"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
)

// A peer that waits for the other side to begin costs the device 38 KB: queues and two goroutines. So it is given to the device when
// the other side's initiation comes, or when something is to be sent to it, and taken back once its keys have run out: an idle
// session, which makes no new ones, costs the device nothing. Paths and checks go on as ever.
//
// The device forgets the time stamp of the last initiation with the peer. Whoever has recorded one and sends it again, from the
// address of a validated path, wakes the peer once more and learns nothing.

const (
	// dozeAfter is for how long a peer has had no new keys when the device need not know it. Both sides have thrown them away by then.
	dozeAfter = device.RejectAfterTime + 15*time.Second
	dozeEvery = 30 * time.Second
)

// letter is a handshake message for a peer that the device did not know when it came.
type letter struct {
	peer *Peer
	pkt  []byte
}

// next gives nothing: a letter has been judged already, see [letter.fill].
func (*letter) next() ([]byte, *route, bool) { return nil, nil, false }

func (l *letter) fill(bufs [][]byte, sizes []int, eps []conn.Endpoint) int {
	sizes[0], eps[0] = copy(bufs[0], l.pkt), l.peer
	return 1
}

// Ready tells whether the device knows the peer. Where not, it is about to, and PeerOptions.Sent is called when it does. It does not wait.
func (p *Peer) Ready() bool {
	if !p.asleep.Load() {
		return true
	}
	p.rouse(nil)
	return false
}

// rouse has the device learn of a peer, and then see a message.
func (p *Peer) rouse(pkt []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if pkt != nil {
		p.letter = bytes.Clone(pkt)
	}
	if p.closed || p.waking {
		return
	}
	p.waking = true
	p.tunnel.tasks.Go(p.wake)
}

func (p *Peer) wake() {
	p.dozing.Lock()
	err := p.wakeOnce()
	p.dozing.Unlock()
	p.mu.Lock()
	pkt := p.letter
	p.waking, p.letter = false, nil
	p.mu.Unlock()
	if err != nil {
		p.tunnel.log.Warn("the device does not take a peer", "session", p.opts.Session, "err", err)
		return
	}
	if pkt != nil {
		p.tunnel.bind.side.hand(newParcel(&letter{p, pkt}), p.tunnel.quit)
	}
	if p.opts.Sent != nil {
		p.opts.Sent(0)
	}
}

// wakeOnce gives the peer to the device, unless it is there or is being removed. dozing is held.
func (p *Peer) wakeOnce() error {
	p.mu.Lock()
	closed := p.closed
	p.mu.Unlock()
	if closed || !p.asleep.Load() {
		return nil
	}
	if err := p.tunnel.device.addPeer(p); err != nil {
		return err
	}
	p.woken.Store(time.Now().UnixNano())
	p.asleep.Store(false)
	return nil
}

// owned are a peer's allowed IPs but for those that another has been given since.
func (t *Tunnel) owned(p *Peer) (own []netip.Prefix) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, prefix := range p.opts.AllowedIPs {
		if t.owners[prefix] == p {
			own = append(own, prefix)
		}
	}
	return own
}

// doze takes the peer from the device.
func (p *Peer) doze() {
	p.dozing.Lock()
	defer p.dozing.Unlock()
	if !p.asleep.Swap(true) {
		p.tunnel.device.removePeer(p)
	}
}

// watchDozing takes peers without keys from the device until the tunnel is closed.
func (t *Tunnel) watchDozing() {
	tick := time.NewTicker(dozeEvery)
	defer tick.Stop()
	for {
		select {
		case <-t.quit:
			return
		case now := <-tick.C:
			for _, p := range t.drowsy(now) {
				p.doze()
			}
		}
	}
}

// drowsy lists the peers that the device need not know.
func (t *Tunnel) drowsy(now time.Time) (out []*Peer) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, p := range t.sessions {
		last := time.Unix(0, max(p.handshake.completed.Load(), p.woken.Load()))
		if !p.opts.Initiate && !p.asleep.Load() && now.Sub(last) > dozeAfter {
			out = append(out, p)
		}
	}
	return out
}
