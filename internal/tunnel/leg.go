package tunnel

import (
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// Timing of binding to relays.
const (
	bindRetry  = 100 * time.Millisecond // doubled with every try …
	bindTries  = 5                      // … so often: 3.1 s
	bindRest   = 10 * time.Second       // then this long
	bindTaken  = 5 * time.Second        // after the relay said that it has no room, or another session on the channel
	bindStale  = 3                      // stale nonces in a row that are answered at once
	rebindLost = 10 * time.Second       // how often the leading side binds again while its path does not work
)

// leg is one peer's binding at one relay. It is bound over UDP or over a WebSocket, one at a time: a BIND over the other moves it.
// Its peer's lock guards it, but for the first group, which never changes.
type leg struct {
	peer    *Peer
	node    *node
	ticket  relay.Ticket
	expires time.Time
	header  uint32
	carries atomic.Int32 // 1 while the peer's chosen path leads through here

	mode   Transport // over which it is bound or being bound; "" for none
	at     view      // what that rests on
	seen   uint64    // the node's version that was looked at last
	lonely bool      // as last told to the node
	bound  bool
	broken bool // the ticket was refused: nothing helps
	tries  int  // BINDs since the last answer
	stale  int  // stale nonces in a row
	next   time.Time
	id     nat.TxID // of the BIND in flight
	path   *path
	old    *path // the path over the other transport, until this one works
	worked bool  // path has been validated since it was bound
	key    relay.BindKey
	keyFor wire.Key // the relay's key that key belongs to
}

// AddRelays lets the session use relays: it is bound to each, and they are checked as paths at once. Grants for relays that it is
// bound to already are ignored, and so are tickets that do not decode.
func (p *Peer) AddRelays(grants []Grant) {
	p.act(func(now time.Time) {
		for _, g := range grants {
			if err := p.addLeg(g, now); err != nil {
				p.tunnel.log.Warn("a relay cannot be used", "session", p.opts.Session, "relay", g.Relay.Name, "err", err)
			}
		}
	})
}

// maxLegs bounds the relays of one peer.
const maxLegs = 4

// addLeg makes a leg. p.mu is held.
func (p *Peer) addLeg(g Grant, now time.Time) error {
	for _, l := range p.legs {
		if l.node.Name == g.Relay.Name {
			return nil
		}
	}
	c, err := relay.ChannelOf(p.opts.Session)
	if err != nil {
		return err
	}
	ticket, err := relay.DecodeTicket(g.Ticket)
	if err != nil {
		return err
	}
	if len(p.legs) >= maxLegs {
		return fmt.Errorf("a session uses at most %d relays", maxLegs)
	}
	l := &leg{peer: p, ticket: ticket, expires: g.Expires, header: header(c)}
	p.legs = append(p.legs, l)
	l.node = p.tunnel.relays.join(g.Relay, l, now)
	return nil
}

// join gives the node that a leg belongs to, and has the relay asked if it has not answered yet.
func (r *relays) join(one Relay, l *leg, now time.Time) *node {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.node(one)
	n.legs[l] = struct{}{}
	if soon := n.lost.Add(redialFirst); soon.Before(n.redial) {
		n.redial = soon // somebody waits now
	}
	r.early = time.Time{}
	if n.state != udpUp {
		n.ask(now)
	}
	n.rearm(now, r.opts.Keep)
	r.kick(now)
	return n
}

// kick has the timer fire at once, for who cannot wait for act. mu is held.
func (r *relays) kick(now time.Time) {
	r.disarm()
	if r.closed {
		return
	}
	r.tasks.Add(1)
	r.timer = time.AfterFunc(0, func() {
		defer r.tasks.Done()
		r.act(func(time.Time) {})
	})
}

// leave ends a leg's membership.
func (r *relays) leave(l *leg) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(l.node.legs, l)
	delete(l.node.lonely, l)
	delete(r.binds, l.id)
	if l.carries.Swap(0) == 1 {
		l.node.traffic--
	}
	r.forget()
}

// look gives what a leg has to know of its relay.
func (r *relays) look(l *leg) view {
	r.mu.Lock()
	defer r.mu.Unlock()
	return l.node.view()
}

// doubt has a relay asked, because something that went through it was not answered.
func (r *relays) doubt(l *leg, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l.node.tries == 0 {
		l.node.ask(now)
		r.kick(now)
	}
}

// feel tells how a leg's peer is doing: whether it has no path over UDP, and whether its traffic flows through this leg.
func (r *relays) feel(l *leg, lonely, carries bool, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(l.node.lonely, l)
	if lonely {
		l.node.lonely[l] = struct{}{}
	}
	switch {
	case carries && l.carries.Swap(1) == 0:
		l.node.traffic++
		l.node.rearm(now, r.opts.Keep)
	case !carries && l.carries.Swap(0) == 1:
		l.node.traffic--
	}
	r.kick(now)
}

// offered keeps a nonce that came with an error, for other legs. A new key means that the relay has started anew: all have to
// bind again.
func (r *relays) offered(l *leg, at netip.AddrPort, o relay.Offer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := l.node
	i := slices.IndexFunc(n.reaches, func(x reach) bool { return x.addr == at })
	if i < 0 || r.closed {
		return
	}
	renewed := n.reaches[i].offer.Key != o.Key
	n.reaches[i].offer = o
	n.version.Add(1)
	if renewed {
		r.tasks.Go(func() { r.stir(n) })
	}
}

// book notes the BIND that a leg has in flight.
func (r *relays) book(l *leg, id nat.TxID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.binds, l.id)
	r.binds[id] = l
}

// plan decides over what the leg is to be bound. p.mu is held, as in all that follows.
func (l *leg) plan(now time.Time) {
	if version := l.node.version.Load(); version != l.seen {
		l.seen = version
		l.rest(l.peer.tunnel.relays.look(l), now)
	}
	l.watch(now)
}

// rest makes the leg rest on what is there now.
func (l *leg) rest(v view, now time.Time) {
	if l.mode == WebSocket && !l.at.stream.isOpen() {
		l.mode, l.bound, l.next = "", false, time.Time{}
		l.dropPath(now)
	}
	switch {
	case l.broken || now.After(l.expires):
		l.mode, l.next = "", time.Time{}
	case v.up:
		if l.mode != UDP || l.at.addr != v.addr || l.at.mapped != v.mapped || l.bound && l.at.offer.Key != v.offer.Key {
			l.begin(UDP, v, spot{remote: v.addr, header: l.header}, now)
		}
		l.at.offer = v.offer
	case v.stream != nil && v.stream.isOpen():
		if l.mode != WebSocket || l.at.stream != v.stream {
			v.offer = v.stream.conn.Offer()
			l.begin(WebSocket, v, spot{via: v.stream, header: l.header}, now)
		}
	}
}

// begin binds anew.
func (l *leg) begin(mode Transport, v view, s spot, now time.Time) {
	l.mode, l.at, l.bound, l.worked = mode, v, false, false
	l.tries, l.stale, l.next = 0, 0, now
	if l.path != nil && l.path.spot == s {
		l.path.tries, l.path.next = 0, now
		return
	}
	if l.old != nil {
		l.peer.engine.drop(l.old, now)
	}
	l.old = l.path
	l.path = l.peer.engine.add(&path{peer: l.peer, spot: s, kind: wire.Relayed, relay: l.node.Name}, now)
}

// dropPath forgets the leg's path: nothing can come through it any more.
func (l *leg) dropPath(now time.Time) {
	if l.path != nil {
		l.peer.engine.drop(l.path, now)
		l.path = nil
	}
}

// watch sees to what the path tells: it works, and the one over the other transport may go; or it does not any more.
func (l *leg) watch(now time.Time) {
	p := l.path
	switch {
	case p == nil || l.mode == "":
	case p.valid:
		l.worked = true
		if l.bound {
			l.next = time.Time{}
		}
		if l.old != nil {
			l.peer.engine.drop(l.old, now)
			l.old = nil
		}
	case l.worked && l.peer.opts.Initiate:
		l.worked = false
		l.bound, l.tries, l.next = false, 0, now
		if l.mode == UDP {
			l.peer.tunnel.relays.doubt(l, now)
		}
	}
}

// due gives the BIND that is to be sent now, nil if none is.
func (l *leg) due(now time.Time) *outgoing {
	if l.mode == "" || l.next.IsZero() || l.next.After(now) {
		return nil
	}
	r := l.peer.tunnel.relays
	if l.bound { // and yet the path does not work: the leading side tries again
		l.bound, l.tries = false, 0
	}
	if l.tries++; l.tries > bindTries {
		l.tries = 0
		l.next = now.Add(bindRest)
		if l.mode == UDP {
			r.doubt(l, now)
		}
	} else {
		l.next = now.Add(l.patience())
	}
	if l.keyFor != l.at.offer.Key {
		key, err := l.peer.tunnel.bindKey(l.at.offer.Key)
		if err != nil {
			l.mode, l.next = "", time.Time{} // a relay whose key is no key
			return nil
		}
		l.key, l.keyFor = key, l.at.offer.Key
	}
	id := randomID()
	r.book(l, id)
	l.id = id
	pkt := relay.AppendBind(nil, relay.Bind{ID: id, Nonce: l.at.offer.Nonce, Ticket: l.ticket}, &l.key)
	return &outgoing{pkt: pkt, to: &route{spot: l.relay()}}
}

// patience is how long the answer to a BIND may take. On a WebSocket nothing gets lost, and a second one would only be in the way.
func (l *leg) patience() time.Duration {
	wait := bindRetry << (l.tries - 1)
	if l.mode == WebSocket {
		wait = max(wait, streamRetry)
	}
	return wait
}

// relay is where the relay itself is spoken to.
func (l *leg) relay() spot {
	if l.mode == WebSocket {
		return spot{via: l.at.stream}
	}
	return spot{remote: l.at.addr}
}

// answered takes the relay's answer to a BIND.
func (l *leg) answered(msg []byte, a relay.Answer, now time.Time) {
	if a.ID != l.id || a.Unbind || l.mode == "" || l.bound {
		return
	}
	log := l.peer.tunnel.log.With("session", l.peer.opts.Session, "relay", l.node.Name)
	switch a.Code {
	case 0:
		if !relay.VerifyMessage(msg, &l.key) {
			return
		}
		heard := l.mode == WebSocket && l.tries == 1 // and the check behind the BIND as well: nothing gets lost on the way
		l.bound, l.tries, l.stale, l.next = true, 0, 0, time.Time{}
		if l.old != nil && l.old.valid && l.path != nil && !l.path.valid {
			l.peer.engine.moved(l.old, l.path, now)
			l.peer.tunnel.bind.table.put(l.path)
			l.old = nil
		}
		if l.path != nil && !l.path.valid {
			if !heard {
				l.path.tries, l.path.next = min(l.path.tries, 2), now
			}
			if l.peer.opts.Initiate {
				l.next = now.Add(rebindLost)
			}
		}
	case relay.CodeStaleNonce:
		l.at.offer = a.Offer
		l.tries, l.next = 0, now
		if l.stale++; l.stale > bindStale {
			l.next = now.Add(bindRest)
		}
		if l.mode == UDP {
			l.peer.tunnel.relays.offered(l, l.at.addr, a.Offer)
		}
	case relay.CodeTaken, relay.CodeFull:
		log.Info("a relay has no room for the session", "code", a.Code)
		l.tries, l.next = 0, now.Add(bindTaken)
	default:
		log.Warn("a relay refuses the session's ticket", "code", a.Code)
		l.broken, l.mode, l.next = true, "", time.Time{}
		l.dropPath(now)
	}
}

// close unbinds, as far as that can be done with one message.
func (l *leg) close() *outgoing {
	l.peer.tunnel.relays.leave(l)
	if !l.bound || l.mode == "" {
		return nil
	}
	bind := relay.Bind{ID: randomID(), Unbind: true, Nonce: l.at.offer.Nonce, Ticket: l.ticket}
	return &outgoing{pkt: relay.AppendBind(nil, bind, &l.key), to: &route{spot: l.relay()}}
}
