package tunnel

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
)

// handleSTUN takes a STUN message and gives what the device shall see on account of it, or nil. What is not authentic is dropped
// without a word.
func (t *Tunnel) handleSTUN(pkt []byte, from *route) (*Peer, []byte) {
	if name, id, ok := nat.PeekUsername(pkt); ok {
		t.mu.RLock()
		p := t.checkers[string(name)]
		t.mu.RUnlock()
		if p != nil && nat.VerifyCheck(pkt, p.key) {
			if p.requested(from, id, nat.PeekAsked(pkt)) {
				return p.introduced(from, nat.PeekHandshake(pkt))
			}
		}
		return nil, nil
	}
	id, mapped, ok := nat.PeekResponse(pkt)
	if ok {
		t.mu.RLock()
		waiting := t.reflexive[id]
		p := t.indexes[binary.BigEndian.Uint32(id[:4])]
		t.mu.RUnlock()
		if waiting != nil {
			select {
			case waiting <- mapped:
			default: // a repeated answer
			}
			return nil, nil
		}
		if p != nil && nat.VerifyCheck(pkt, p.key) {
			if path := p.answered(from, id, nat.PeekTally(pkt)); path != nil {
				return p.unpark(path)
			}
			return nil, nil
		}
	}
	if from.header == 0 && from.via == nil {
		t.relays.take(pkt, from.remote)
	}
	return nil, nil
}

// Reflexive asks a STUN server through the tunnel's own socket where it sees us, repeating until ctx ends.
func (t *Tunnel) Reflexive(ctx context.Context, server netip.AddrPort) (netip.AddrPort, error) {
	id, answer := t.await()
	defer func() {
		t.mu.Lock()
		delete(t.reflexive, id)
		t.mu.Unlock()
	}()
	to := &route{spot: spot{remote: unmap(server)}}
	request := nat.BindingRequest(id)
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		if err := t.bind.sendTo(append([]byte(nil), request...), to); err != nil {
			return netip.AddrPort{}, fmt.Errorf("ask stun server %s: %w", server, err)
		}
		timer := time.NewTimer(wait)
		select {
		case mapped := <-answer:
			timer.Stop()
			return unmap(mapped), nil
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return netip.AddrPort{}, fmt.Errorf("ask stun server %s: %w", server, context.Cause(ctx))
		}
	}
}

// await registers a fresh id whose answer is waited for.
func (t *Tunnel) await() (nat.TxID, <-chan netip.AddrPort) {
	answer := make(chan netip.AddrPort, 1)
	t.mu.Lock()
	defer t.mu.Unlock()
	id := randomID()
	t.reflexive[id] = answer
	return id, answer
}
