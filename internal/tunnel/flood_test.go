package tunnel

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/nat"
)

// An admitted job floods the gateway with authentic checks that carry ever new initiations of no worth. Another job's tunnel comes up
// all the same, and little is remembered of the flood.
func TestFloodOfCarriedInitiations(t *testing.T) {
	hostile, client, gateway := newEnd(t), newEnd(t), newEnd(t)
	session := hostile.PublicKey().SessionID()
	g, err := gateway.AddPeer(PeerOptions{Key: hostile.PublicKey(), Session: session})
	if err != nil {
		t.Fatal(err)
	}
	const flood = 1000
	done := make(chan struct{})
	go func() {
		defer close(done)
		to := &route{spot: spot{remote: loopback(gateway.Port())}}
		initiation := message(device.MessageInitiationType, device.MessageInitiationSize)
		for seq := range uint64(flood) {
			_, _ = rand.Read(initiation[4:])
			binary.LittleEndian.PutUint32(initiation[4:], uint32(seq+1)) // no two are of one sender
			pkt, err := nat.AppendCheck(nil, nat.Check{
				ID: randomID(), Username: checkName(session, hostile.PublicKey()), Seq: seq + 1, Handshake: initiation,
			}, g.key, 0)
			if err != nil {
				t.Error(err)
				return
			}
			_ = hostile.bind.sendTo(pkt, to)
		}
	}()
	c, _ := join(t, client, gateway, gateway.Port())
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := c.WaitHandshake(ctx); err != nil {
		t.Errorf("another job's handshake: %v", err)
	}
	<-done
	ping(t, client, gateway)
	g.handshake.mu.Lock()
	defer g.handshake.mu.Unlock()
	if n := len(g.handshake.pending); n > maxPending || g.handshake.response != nil {
		t.Errorf("%d initiations are remembered, answered: %t", n, g.handshake.response != nil)
	}
}
