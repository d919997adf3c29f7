package tunnel

import (
	"fmt"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// stands is what lets WebSockets to relays stay open before there is a session.
type stands struct {
	ticket relay.Standing
	until  time.Time // zero where there is none, or it has ended
}

// expire forgets what has ended.
func (s *stands) expire(now time.Time) {
	if !now.Before(s.until) {
		*s = stands{}
	}
}

// SetStanding lets the tunnel keep a WebSocket ready to every relay that [Tunnel.SetRelays] has named and whose UDP does not
// answer, for as long as the ticket lives; a later one replaces it. It is for a tunnel with [RelayOptions.Keep]. Whoever gives a ticket
// is there, and so may the relays be: those that were not are dialled at once.
func (t *Tunnel) SetStanding(ticket wire.Secret, life time.Duration) error {
	decoded, err := relay.DecodeStanding(ticket)
	if err != nil {
		return fmt.Errorf("keep relays ready: %w", err)
	}
	r := t.relays
	r.act(func(now time.Time) {
		r.stands = stands{decoded, now.Add(life)}
		for _, n := range r.nodes {
			n.redial, n.failed = time.Time{}, 0
			r.stand(n)
		}
	})
	return nil
}

// stand shows a relay our ticket over the WebSocket to it, if both are there. mu is held.
func (r *relays) stand(n *node) {
	if !r.opts.Keep || n.stream == nil || len(r.stands.ticket) == 0 {
		return
	}
	offer := n.stream.conn.Offer()
	key, err := r.t.bindKey(offer.Key)
	if err != nil {
		return // a relay whose key is no key
	}
	n.stands = randomID()
	n.stream.conn.SendSTUN(relay.AppendStand(nil, relay.Stand{ID: n.stands, Nonce: offer.Nonce, Ticket: r.stands.ticket}, &key))
}

// stood takes a relay's answer. Where it refuses, or does not know what is asked, it closes the WebSocket by itself after a
// while, and the next one is dialled later and later.
func (r *relays) stood(msg []byte, id nat.TxID, code int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range r.nodes {
		if n.stream == nil || n.stands != id {
			continue
		}
		key, err := r.t.bindKey(n.stream.conn.Offer().Key)
		switch {
		case code != 0:
			r.t.log.Info("a relay does not let a websocket stand", "relay", n.Name, "code", code)
		case err == nil && relay.VerifyMessage(msg, &key):
			n.stood, n.failed = true, 0
		}
	}
}
