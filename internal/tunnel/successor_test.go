package tunnel

import (
	"net/netip"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun/tuntest"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// lostIn is how long a sole, busy path that falls silent is kept.
func lostIn(t *testing.T, d *drive, in uint64) time.Duration {
	t.Helper()
	p := d.candidate(wire.Host, 1)
	d.run(time.Millisecond)
	d.answer(p, 5*time.Millisecond)
	for range 3 { // traffic, and answers
		d.traffic(uint64(d.ids)*in, uint64(d.ids)*1000+1, d.now)
		d.run(time.Second)
		d.answer(p, 5*time.Millisecond)
	}
	silent := d.now
	var rx, tx uint64 = 1 << 30, 1 << 30
	for d.chosen != nil && d.now.Sub(silent) < 10*time.Second {
		rx, tx = rx+in, tx+1000
		d.traffic(rx, tx, d.now)
		d.run(samplePeriod)
	}
	return d.now.Sub(silent)
}

// TestSuccessorShortensTheWait: a sole path that falls silent is given up sooner where the successor answers meanwhile, and only then.
func TestSuccessorShortensTheWait(t *testing.T) {
	alone := lostIn(t, newDrive(true), 0)
	d := newDrive(true)
	asked := 0
	d.succeeded = func(time.Time) bool { asked++; return false }
	dead := lostIn(t, d, 0)
	if dead != alone || asked == 0 {
		t.Errorf("with a successor that is silent too: lost after %v, without one after %v; asked %d times", dead, alone, asked)
	}
	d = newDrive(true)
	var since time.Time
	d.succeeded = func(at time.Time) bool { since = at; return true }
	quick := lostIn(t, d, 0)
	if quick > keepBusy+successorLimit+2*samplePeriod+staleRetry || quick < successorLimit || alone < quick+500*time.Millisecond {
		t.Errorf("with a successor that answers: lost after %v, without one after %v", quick, alone)
	}
	if since.IsZero() || since.After(d.now.Add(-successorLimit)) {
		t.Errorf("it was asked for answers since %v, at %v", since, d.now)
	}
	d = newDrive(true)
	d.succeeded = func(time.Time) bool { return true }
	if busy := lostIn(t, d, 1<<20); busy < livelyLimit {
		t.Errorf("lost after %v though much comes in", busy)
	}
}

// TestLeaveIsSaidUntilHeard: on the path in use, a few times, and never on its own afterwards.
func TestLeaveIsSaidUntilHeard(t *testing.T) {
	d := newDrive(false)
	p, other := d.candidate(wire.Host, 1), d.candidate(wire.Reflexive, 2)
	d.run(time.Millisecond)
	d.answer(p, time.Millisecond)
	d.answer(other, time.Millisecond)
	d.request(p, true)
	d.run(time.Second)
	d.leave(d.now)
	checks := d.run(10 * time.Second)
	if checks[p] != leaveTries || checks[other] != 0 {
		t.Errorf("%d checks on the path in use, %d on the other", checks[p], checks[other])
	}
	d.leave(d.now)
	d.step()
	d.answer(p, time.Millisecond)
	if n := d.run(10 * time.Second)[p]; n != 0 {
		t.Errorf("%d checks after the answer", n)
	}
}

// TestLeaveIsHeardOnce: the leading side is told once, whatever the other side says after that.
func TestLeaveIsHeardOnce(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	session := client.PublicKey().SessionID()
	g, err := gateway.AddPeer(PeerOptions{Key: client.PublicKey(), Session: session, AllowedIPs: []netip.Prefix{netip.PrefixFrom(clientIP, 32)}})
	if err != nil {
		t.Fatal(err)
	}
	heard := make(chan struct{}, 8)
	_, err = client.AddPeer(PeerOptions{
		Key: gateway.PublicKey(), Session: session, AllowedIPs: []netip.Prefix{netip.PrefixFrom(gatewayIP, 32)},
		Candidates: hostCandidate(gateway.Port()), Initiate: true, OnLeave: func() { heard <- struct{}{} },
	})
	if err != nil {
		t.Fatal(err)
	}
	ping(t, client, gateway)
	for range 3 {
		g.Leave()
	}
	select {
	case <-heard:
	case <-time.After(30 * time.Second):
		t.Fatal("not heard")
	}
	ping(t, client, gateway) // it still carries traffic
	if len(heard) != 0 {
		t.Error("heard more than once")
	}
	g.mu.Lock()
	done := g.engine.chosen.tries == 0
	g.mu.Unlock()
	if !done {
		within(t, 30*time.Second, "the gateway knows that it was heard", func() bool {
			g.mu.Lock()
			defer g.mu.Unlock()
			return g.engine.chosen.tries == 0
		})
	}
}

// TestPeerMovesToItsSuccessor: a second peer of the same session's client, without allowed IPs, is validated and takes the other's place in
// one step; then the first is heard no more.
func TestPeerMovesToItsSuccessor(t *testing.T) {
	client, first, second := newEnd(t), newEnd(t), newEnd(t)
	c, g := join(t, client, first, first.Port())
	ping(t, client, first)
	way := wire.StandbyID(client.PublicKey(), second.PublicKey())
	if _, err := second.AddPeer(PeerOptions{Key: client.PublicKey(), Session: way, AllowedIPs: []netip.Prefix{netip.PrefixFrom(clientIP, 32)}}); err != nil {
		t.Fatal(err)
	}
	up := make(chan Path, 8)
	spare, err := client.AddPeer(PeerOptions{
		Key: second.PublicKey(), Session: way, Candidates: hostCandidate(second.Port()), Initiate: true, OnPath: func(p Path) { up <- p },
	})
	if err != nil {
		t.Fatal(err)
	}
	c.SetSuccessor(spare)
	select {
	case <-up:
	case <-time.After(30 * time.Second):
		t.Fatal("no path to the spare")
	}
	second.tun.Outbound <- tuntest.Ping(clientIP, gatewayIP)
	ping(t, client, first) // nothing comes in from the spare
	first.RemovePeer(g)    // it dies
	began := time.Now()
	within(t, 30*time.Second, "the path is given up", func() bool {
		select {
		case client.tun.Outbound <- tuntest.Ping(gatewayIP, clientIP):
		case <-time.After(10 * time.Millisecond):
		}
		return c.Status().Path == Path{}
	})
	t.Logf("lost after %v", time.Since(began).Round(time.Millisecond))
	if err := spare.SetAllowedIPs([]netip.Prefix{netip.PrefixFrom(gatewayIP, 32)}); err != nil {
		t.Fatal(err)
	}
	client.RemovePeer(c)
	ping(t, client, second)
}

// TestLeaveFlag: it crosses the wire, beside the others.
func TestLeaveFlag(t *testing.T) {
	for _, c := range []nat.Check{{}, {Call: true}, {Leave: true}, {Stream: true}, {Call: true, Leave: true, Stream: true}} {
		c.Username, c.Seq = "session:key", 7
		pkt, err := nat.AppendCheck(nil, c, []byte("key"), 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := nat.PeekAsked(pkt); got.Call != c.Call || got.Leave != c.Leave || got.Stream != c.Stream || got.Seq != 7 {
			t.Errorf("%+v became %+v", c, got)
		}
	}
}
