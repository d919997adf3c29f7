package tunnel

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"time"

	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// outgoing is one datagram that is to be sent.
type outgoing struct {
	pkt []byte
	to  *route
}

// act is how anything happens to a peer's paths: do changes the engine, then what has become due is sent, outside the
// lock, and the timer is set for what comes next.
func (p *Peer) act(do func(now time.Time)) {
	now := time.Now()
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	do(now)
	p.unmend(now, false)
	out := p.messages(now)
	fresh := p.fresh
	p.fresh = false
	p.settle(now)
	p.rearm(now)
	p.mu.Unlock()

	for _, o := range out {
		_ = p.tunnel.bind.sendTo(o.pkt, o.to) // a path that cannot be sent to stays unanswered
	}
	to := p.current.Load()
	if to == nil {
		to = p.hint.Load()
	}
	if to == nil {
		return
	}
	if pkt := p.handshake.again(now, fresh); pkt != nil {
		_ = p.tunnel.bind.sendTo(pkt, to)
	}
}

// messages encodes what is due: first what binds to relays, then the checks, which may go through them.
func (p *Peer) messages(now time.Time) []outgoing {
	var out []outgoing
	for _, l := range p.legs {
		l.plan(now)
		if o := l.due(now); o != nil {
			out = append(out, *o)
		}
	}
	say, probes := p.punching(now)
	out = append(out, probes...)
	orders := p.engine.due(now)
	if c := p.engine.chosen; say != nil && c != nil {
		orders = append(orders, order{path: c, behind: *say})
	}
	for _, o := range orders {
		p.seq++
		c := nat.Check{
			ID: p.newID(), Username: p.name, Nominate: p.opts.Initiate && o.path == p.engine.chosen,
			Seq: p.seq, Call: o.call, Leave: p.engine.leaving, Stream: o.spot.stream(), Behind: o.behind,
			Tally: p.tally.tell(),
		}
		// Where there is a path it goes by itself: checks of candidates that never answer would put its repetition off.
		if p.opts.Initiate && !o.valid && o.mtu == 0 && p.current.Load() == nil {
			c.Handshake = p.handshake.carried(now)
		}
		if p.opts.Initiate {
			c.MTU = uint16(p.engine.told())
		}
		size := 0
		if o.mtu > 0 {
			size = o.mtu + overhead
		}
		pkt, err := nat.AppendCheck(nil, c, p.key, size)
		if err != nil {
			continue // only a name that is too long; AddPeer has refused it
		}
		o.booked(c.ID, o.mtu, now)
		out = append(out, outgoing{pkt, &route{spot: o.spot}})
	}
	return out
}

// settle tells whoever has to know what has changed: relays, OnPath, OnMTU.
func (p *Peer) settle(now time.Time) {
	c := p.engine.chosen
	lonely := p.opts.Initiate && (c == nil || c.rank() == rankStream)
	for _, l := range p.legs {
		carries := c != nil && c == l.path
		if lonely != l.lonely || carries != (l.carries.Load() == 1) {
			l.lonely = lonely
			p.tunnel.relays.feel(l, lonely, carries, now)
		}
	}
	if mtu := p.engine.fit(); mtu > 0 && mtu != p.MTU() {
		p.mtu.Store(int32(mtu))
		p.latestMTU = mtu
	}
	p.tell()
}

func (p *Peer) newID() nat.TxID {
	id := randomID()
	binary.BigEndian.PutUint32(id[:4], p.index)
	return id
}

// randomID makes an unpredictable transaction id (RFC 8489, section 5).
func randomID() nat.TxID {
	var id nat.TxID
	_, _ = rand.Read(id[:]) // never fails, see crypto/rand
	return id
}

// rearm sets the timer for the next thing to do.
func (p *Peer) rearm(now time.Time) {
	wake := sooner(p.engine.wake(now), p.punch.wake())
	if p.current.Load() != nil || p.hint.Load() != nil {
		wake = sooner(wake, p.handshake.wake())
	}
	for _, l := range p.legs {
		wake = sooner(wake, l.next)
	}
	p.disarm()
	if wake.IsZero() {
		return
	}
	p.timers.Add(1)
	p.timer = time.AfterFunc(wake.Sub(now), func() {
		defer p.timers.Done()
		p.act(func(now time.Time) {
			p.engine.expire(now)
			p.engine.traffic(p.rx.Load(), p.tx.Load(), now)
		})
	})
}

func (p *Peer) disarm() {
	if p.timer != nil && p.timer.Stop() {
		p.timers.Done()
	}
	p.timer = nil
}

// changed is the engine's onChange: traffic moves to a path, or none is left.
func (p *Peer) changed(to *path) {
	if to == nil {
		p.current.Store(nil)
		p.latest = &Path{}
		return
	}
	p.current.Store(to.route)
	p.fresh = true
	p.uncover()
	p.start()
	latest := to.public()
	p.latest = &latest
}

// dropped is the engine's onDrop.
func (p *Peer) dropped(gone *path) {
	gone.open.Store(false)
	p.tunnel.bind.table.drop(gone)
}

// start has the device begin the first handshake, again where it has given up. It does nothing while one is under way.
func (p *Peer) start() {
	if p.opts.Initiate && p.handshake.completed.Load() == 0 {
		p.tunnel.tasks.Go(p.initiate)
	}
}

// initiate has the device make an initiation, at most every five seconds. The first is made before there is a path: checks carry it
// ahead.
func (p *Peer) initiate() { p.tunnel.device.shake(p) }

// requested handles an authentic check from the peer. Our own check goes out before the answer, so that the path is validated
// on both sides before the first packet that follows the answer. A repeated one is not answered, whoever repeats it; false is given
// then.
func (p *Peer) requested(from *route, id nat.TxID, asked nat.Asked) (answer bool) {
	p.act(func(now time.Time) {
		if !p.seen.fresh(asked.Seq) {
			return
		}
		known := p.engine.find(from.spot)
		if known == nil && from.header == 0 && (from.via == nil || p.punch.owns(from.via)) { // through a relay only where we are bound
			known = p.engine.add(&path{peer: p, spot: from.spot, kind: wire.Observed}, now)
		}
		if known == nil {
			return
		}
		if s, ok := from.via.(*spare); ok {
			s.hit.Store(true)
		}
		answer = known.owes(asked, now)
		if asked.Leave && p.opts.Initiate && !p.left {
			p.left, p.leaving = true, true
		}
		p.tunnel.bind.table.put(known)
		p.engine.requested(known, asked, now)
		p.heed(asked.Behind, now)
		p.heedTally(asked.Tally, now)
		if p.opts.Initiate && p.current.Load() == nil && p.hint.Load() == nil {
			p.hint.Store(from)
			p.start()
		}
	})
	if !answer {
		return false
	}
	if pkt, err := nat.AppendCheckResponse(nil, id, from.mapped(), p.tally.tell(), p.key, asked.Size); err == nil {
		_ = p.tunnel.bind.sendTo(pkt, from)
	}
	return true
}

// answered handles an authentic answer and gives the path that it validated, or nil.
func (p *Peer) answered(from *route, id nat.TxID, tally nat.Tally) (validated *path) {
	p.act(func(now time.Time) {
		path := p.engine.find(from.spot)
		if path == nil {
			return
		}
		if !p.engine.answered(path, id, from, now) {
			return
		}
		p.tunnel.bind.table.put(path)
		p.alive.Store(now.UnixNano())
		p.heedTally(tally, now)
		validated = path
		if path == p.engine.chosen {
			p.current.Store(path.route)
		}
	})
	return validated
}

// accept judges a WireGuard packet from path: what the device shall see of it.
func (p *Peer) accept(from *path, pkt []byte) (*Peer, []byte) {
	if !from.open.Load() {
		p.park(from, pkt)
		return nil, nil
	}
	p.rx.Add(uint64(len(pkt)))
	if messageType(pkt) == device.MessageTransportType {
		return p, pkt
	}
	return p.greeted(pkt)
}

// greeted takes a handshake message: a repeated one gets the response that the device has given before.
func (p *Peer) greeted(pkt []byte) (*Peer, []byte) {
	repeated, response := p.handshake.receiving(pkt)
	if !repeated && p.asleep.Load() {
		p.rouse(pkt)
		return nil, nil
	}
	if !repeated {
		return p, pkt
	}
	to := p.current.Load()
	if to == nil {
		to = p.hint.Load()
	}
	if to != nil && response != nil {
		_ = p.tunnel.bind.sendTo(bytes.Clone(response), to)
	}
	return nil, nil
}

// introduced takes the initiation that an authentic check carried, which had no answer yet: the other side made it, and for this
// session. The response goes where the check came from, as its answer does, while no path is validated. Nothing but a response
// goes there, and no packet is taken from there.
func (p *Peer) introduced(from *route, pkt []byte) (*Peer, []byte) {
	if p.opts.Initiate || !isWireGuard(pkt) || messageType(pkt) != device.MessageInitiationType {
		return nil, nil
	}
	if p.current.Load() == nil {
		p.hint.Store(from)
	}
	p.rx.Add(uint64(len(pkt)))
	return p.greeted(pkt)
}

// greets reports whether a message of this type may go where the other side has been heard, before a path is validated.
func (p *Peer) greets(message uint32) bool {
	if p.opts.Initiate {
		return message != device.MessageTransportType
	}
	return message == device.MessageResponseType
}

// park keeps one handshake message that came from a spot whose checks are authentic but whose path is not validated
// yet. It is the usual case: the first handshake follows the first check by microseconds.
func (p *Peer) park(from *path, pkt []byte) {
	if messageType(pkt) > device.MessageResponseType || len(pkt) > device.MessageInitiationSize {
		p.tunnel.bind.counts.stranger.Add(1)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	from.parked = append(from.parked[:0], pkt...)
}

// unpark gives the message that was parked for a path, now validated, if the device shall see it.
func (p *Peer) unpark(from *path) (*Peer, []byte) {
	p.mu.Lock()
	parked := from.parked
	from.parked = nil
	p.mu.Unlock()
	if len(parked) == 0 {
		return nil, nil
	}
	return p.accept(from, parked)
}
