package tunnel

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"golang.zx2c4.com/wireguard/device"
	"pgregory.net/rapid"
)

// TestFlightProperty: a packet that comes out takes along all before it, one that is not there nothing, and the oldest go where there are
// too many.
func TestFlightProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var f flight
		var model []uint64
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			if rapid.Bool().Draw(t, "push") {
				for range rapid.IntRange(1, 200).Draw(t, "packets") {
					key := rapid.Uint64Range(0, 300).Draw(t, "key") // some are there twice
					if model = append(model, key); len(model) > flightMost {
						model = model[1:]
					}
					f.push(key)
				}
			} else {
				key := rapid.Uint64Range(0, 310).Draw(t, "out")
				if i := slices.Index(model, key); i >= 0 {
					model = model[i+1:]
				}
				f.pop(key)
			}
			if f.n != len(model) {
				t.Fatalf("%d packets, want %d", f.n, len(model))
			}
		}
		for i, key := range model {
			if got := f.keys[(f.head+i)%flightMost]; got != key {
				t.Fatalf("packet %d is %d, want %d", i, got, key)
			}
		}
	})
}

// TestPacketsThatComeTwiceWaitForNothing: a path brings each packet twice, and the device drops the second ones without a word. No time
// passes, so nothing is written off: all go to the device as they come.
func TestPacketsThatComeTwiceWaitForNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrossing(2)
		for seq := range uint64(20 * insideLimit) {
			for copies := range 2 {
				if n := len(c.arrive(0, seq, 1, 100)); n != 1 {
					t.Fatalf("of packet %d, copy %d waits; %d are thought to be in the device", seq, copies, c.turns.inside)
				}
			}
			key := flightKey(sealed(seq, 100))
			c.turns.left(netip.AddrFrom4([4]byte{0, 0, 0, 0}), key)
			c.turns.left(netip.AddrFrom4([4]byte{0, 0, 0, 1}), key) // of somebody else
		}
		if c.turns.inside > 1 || c.peers[0].turn.lost {
			t.Errorf("%d packets are thought to be in the device", c.turns.inside)
		}
	})
}

// TestTheDeviceSaysWhatHasComeOut holds the accounts against wireguard-go itself, over a path that brings each packet twice.
func TestTheDeviceSaysWhatHasComeOut(t *testing.T) {
	client, gateway := newEndWith(t, Options{Window: 128}), newEndWith(t, Options{Turns: true})
	var between atomic.Pointer[middle]
	m := newMiddle(t, gateway.Port(), func(up bool, pkt []byte) bool {
		if m := between.Load(); m != nil && isWireGuard(pkt) && messageType(pkt) == device.MessageTransportType {
			to := m.client.Load()
			if up {
				to = &m.gateway
			}
			_, _ = m.conn.WriteToUDPAddrPort(pkt, *to)
		}
		return false
	})
	between.Store(m)
	_, g := join(t, client, gateway, m.port())
	for range 3 * flightMost / 2 {
		ping(t, client, gateway)
		ts, w := gateway.bind.turns, client.bind.in
		ts.mu.Lock()
		inside, lost := ts.inside, g.turn.lost
		ts.mu.Unlock()
		if inside > 4 || lost || w.used.Load() > 4 {
			t.Fatalf("the gateway takes %d packets to be in its device (given up: %t), the client %d", inside, lost, w.used.Load())
		}
	}
}
