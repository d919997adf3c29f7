package tunnel

import (
	"bytes"
	"context"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// The first handshake needs no message of its own towards the gateway: the first checks carry it.
func TestChecksCarryTheFirstHandshake(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	m := newMiddle(t, gateway.Port(), func(_ bool, pkt []byte) bool {
		return isWireGuard(pkt) && messageType(pkt) == device.MessageInitiationType
	})
	c, _ := join(t, client, gateway, m.port())
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := c.WaitHandshake(ctx); err != nil {
		t.Fatalf("no handshake without a message of its own: %v", err)
	}
	ping(t, client, gateway)
}

// Where no answer comes, because the other side reads nothing there, the message goes by itself. Later handshakes do anyway.
func TestCarriedHandshakeGoesByItselfLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := handshake{done: make(chan struct{})}
		if h.carried(time.Now()) != nil {
			t.Error("there is something to carry before there is an initiation")
		}
		initiation := initiationFrom(1)
		h.sending(initiation)
		time.Sleep(time.Second)
		if got := h.carried(time.Now()); !bytes.Equal(got, initiation) {
			t.Errorf("a check carries %x", got)
		}
		if h.again(time.Now(), true) != nil {
			t.Error("sent twice at once")
		}
		time.Sleep(resendFirst)
		if got := h.again(time.Now(), false); !bytes.Equal(got, initiation) {
			t.Errorf("by itself goes %x", got)
		}
		h.sending(transportTo(1))
		h.sending(initiationFrom(2))
		if h.carried(time.Now()) != nil {
			t.Error("a check carries a later handshake")
		}
	})
}

// Of what a check carries the device sees an initiation and nothing else, and only a gateway's. Nothing else goes out before a path is
// validated.
func TestOnlyAnInitiationComesWithACheck(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	session := client.PublicKey().SessionID()
	g, err := gateway.AddPeer(PeerOptions{Key: client.PublicKey(), Session: session})
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.AddPeer(PeerOptions{Key: gateway.PublicKey(), Session: session, Initiate: true})
	if err != nil {
		t.Fatal(err)
	}
	g.wake()
	from := &route{spot: spot{remote: loopback(9)}}
	for name, pkt := range map[string][]byte{
		"nothing": nil, "a word": []byte("word"),
		"a response":            message(device.MessageResponseType, device.MessageResponseSize),
		"a cookie":              message(device.MessageCookieReplyType, device.MessageCookieReplySize),
		"data":                  message(device.MessageTransportType, 100),
		"a short initiation":    message(device.MessageInitiationType, device.MessageInitiationSize-1),
		"a long initiation":     message(device.MessageInitiationType, device.MessageInitiationSize+1),
		"an initiation, nearly": append(message(device.MessageInitiationType, 4), bytes.Repeat([]byte{1}, 10)...),
	} {
		if p, shown := g.introduced(from, pkt); p != nil || shown != nil || g.hint.Load() != nil {
			t.Errorf("the device is shown %s", name)
		}
	}
	initiation := initiationFrom(1)
	if p, shown := c.introduced(from, initiation); p != nil || shown != nil || c.hint.Load() != nil {
		t.Error("a client's device is shown an initiation")
	}
	if p, shown := g.introduced(from, initiation); p != g || !bytes.Equal(shown, initiation) || g.hint.Load() != from {
		t.Error("a gateway's device is not shown the initiation")
	}
	if p, shown := g.introduced(from, initiation); p != nil || shown != nil {
		t.Error("the device is shown it twice at once")
	}
	for kind, want := range map[uint32]bool{
		device.MessageInitiationType: false, device.MessageResponseType: true, device.MessageCookieReplyType: false,
		device.MessageTransportType: false,
	} {
		if g.greets(kind) != want {
			t.Errorf("a gateway sends messages of type %d before there is a path: %t", kind, !want)
		}
	}
}

// A check that is not authentic, or that comes again, shows the device nothing.
func TestForgedCheckCarriesNothing(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	session := client.PublicKey().SessionID()
	g, err := gateway.AddPeer(PeerOptions{Key: client.PublicKey(), Session: session})
	if err != nil {
		t.Fatal(err)
	}
	g.wake()
	check := func(seq uint64, key []byte) []byte {
		pkt, err := nat.AppendCheck(nil, nat.Check{
			ID: randomID(), Username: checkName(session, client.PublicKey()), Seq: seq, Handshake: initiationFrom(uint32(seq)),
		}, key, 0)
		if err != nil {
			t.Fatal(err)
		}
		return pkt
	}
	from := &route{spot: spot{remote: loopback(9)}}
	forged, authentic := check(1, bytes.Repeat([]byte{1}, 32)), check(2, g.key)
	if p, shown := gateway.handleSTUN(forged, from); p != nil || shown != nil || g.hint.Load() != nil {
		t.Error("a forged check shows the device something")
	}
	if p, shown := gateway.handleSTUN(authentic, from); p != g || shown == nil {
		t.Error("an authentic check shows the device nothing")
	}
	elsewhere := &route{spot: spot{remote: loopback(10)}}
	if p, shown := gateway.handleSTUN(authentic, elsewhere); p != nil || shown != nil || g.hint.Load() != from {
		t.Error("a repeated check shows the device something")
	}
}

// A path has come up and the response got lost there. The checks of candidates that never answer do not keep the initiation from being
// sent again.
func TestDeadCandidatesPutNothingOff(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	c, err := client.AddPeer(PeerOptions{Key: gateway.PublicKey(), Session: client.PublicKey().SessionID(), Initiate: true})
	if err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	for _, via := range []*route{nil, {spot: spot{remote: loopback(9)}}} {
		c.current.Store(via)
		before := c.handshake.wake()
		dead := spot{remote: loopback(uint16(10 + len(c.engine.paths)))}
		if c.engine.add(&path{peer: c, spot: dead, kind: wire.Host}, now) == nil {
			t.Fatal("no path is added")
		}
		carried := false
		for _, o := range c.messages(now) {
			carried = carried || nat.PeekHandshake(o.pkt) != nil
		}
		if later := c.handshake.wake().After(before); carried != (via == nil) || via != nil && later {
			t.Errorf("with a path: %t, carried: %t, put off: %t", via != nil, carried, later)
		}
	}
}
