package tunnel

import (
	"net/netip"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun/tuntest"

	"github.com/culvertnet/culvert/internal/wire"
)

// TestDoze: the device knows a peer from its first initiation on, until its keys have run out, and again when it, or the other side, has
// something to say.
func TestDoze(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	session := client.PublicKey().SessionID()
	woken := make(chan struct{}, 64)
	g, err := gateway.AddPeer(PeerOptions{
		Key: client.PublicKey(), Session: session, AllowedIPs: []netip.Prefix{netip.PrefixFrom(clientIP, 32)},
		Sent: func(n int) {
			select {
			case woken <- struct{}{}:
			default:
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	known := func() bool { return gateway.device.knows(client.PublicKey()) }
	if known() {
		t.Error("the device knows a peer that has said nothing")
	}
	c, err := client.AddPeer(PeerOptions{
		Key: gateway.PublicKey(), Session: session, AllowedIPs: []netip.Prefix{netip.PrefixFrom(gatewayIP, 32)},
		Candidates: hostCandidate(gateway.Port()), Initiate: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	ping(t, client, gateway)
	if !known() || !g.Ready() || !g.Live() {
		t.Error("the device does not know a peer that it speaks to")
	}
	now := time.Now()
	if n := len(gateway.drowsy(now)); n != 0 {
		t.Errorf("%d peers with keys are to be forgotten", n)
	}
	if n := len(client.drowsy(now.Add(time.Hour))); n != 0 {
		t.Error("the side that initiates would forget its peer")
	}
	for _, rouse := range []func(){
		func() { // the client's keys have run out as well
			within(t, time.Minute, "the client begins anew", func() bool {
				c.initiate()
				time.Sleep(50 * time.Millisecond)
				return known()
			})
		},
		func() {
			for len(woken) > 0 {
				<-woken
			}
			if g.Ready() {
				t.Error("a peer is ready that the device does not know")
			}
			<-woken
		},
	} {
		for _, p := range gateway.drowsy(now.Add(dozeAfter + time.Minute)) {
			p.doze()
		}
		if known() {
			t.Error("the device knows a peer without keys")
		}
		rouse()
		within(t, time.Minute, "packets flow again", func() bool {
			select {
			case client.tun.Outbound <- tuntest.Ping(gatewayIP, clientIP):
			case <-time.After(time.Second):
			}
			c.initiate()
			select {
			case <-gateway.tun.Inbound:
				return true
			case <-time.After(100 * time.Millisecond):
				return false
			}
		})
		for len(gateway.tun.Inbound) > 0 {
			<-gateway.tun.Inbound
		}
	}
}

// TestRemoveWhileWaking: a peer that is removed while the device learns of it is not there afterwards.
func TestRemoveWhileWaking(t *testing.T) {
	gateway := newEnd(t)
	for range 50 {
		key, err := wire.NewPrivateKey()
		if err != nil {
			t.Fatal(err)
		}
		p, err := gateway.AddPeer(PeerOptions{Key: key.Public(), Session: key.Public().SessionID(), AllowedIPs: []netip.Prefix{netip.PrefixFrom(clientIP, 32)}})
		if err != nil {
			t.Fatal(err)
		}
		p.Ready()
		gateway.RemovePeer(p)
		within(t, time.Minute, "the device is done", func() bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			return !p.waking
		})
		if gateway.device.knows(key.Public()) {
			t.Fatal("the device knows a peer that was removed")
		}
	}
}
