package tunnel

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	clientIP  = netip.MustParseAddr("198.18.0.2")
	gatewayIP = netip.MustParseAddr("198.18.0.1")
)

// end is one tunnel over a TUN made of channels.
type end struct {
	*Tunnel
	key wire.PrivateKey
	tun *tuntest.ChannelTUN
}

func newEnd(t *testing.T) *end {
	t.Helper()
	return newEndWith(t, Options{})
}

func newEndWith(t *testing.T, opts Options) *end {
	t.Helper()
	key, err := wire.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	ct := tuntest.NewChannelTUN()
	opts.Key, opts.TUN = key, ct.TUN()
	tunnel, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tunnel.Close() })
	return &end{Tunnel: tunnel, key: key, tun: ct}
}

func loopback(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
}

func hostCandidate(port uint16) []wire.Candidate {
	return []wire.Candidate{{Kind: wire.Host, Addr: loopback(port)}}
}

// join makes client and gateway peers of each other; the client sees the gateway at gatewayPort.
func join(t *testing.T, client, gateway *end, gatewayPort uint16) (*Peer, *Peer) {
	t.Helper()
	session := client.PublicKey().SessionID()
	g, err := gateway.AddPeer(PeerOptions{
		Key: client.PublicKey(), Session: session, AllowedIPs: []netip.Prefix{netip.PrefixFrom(clientIP, 32)},
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.AddPeer(PeerOptions{
		Key: gateway.PublicKey(), Session: session, AllowedIPs: []netip.Prefix{netip.PrefixFrom(gatewayIP, 32)},
		Candidates: hostCandidate(gatewayPort), Initiate: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	return c, g
}

// ping sends an inner packet from the client and waits for it at the gateway, then back.
func ping(t *testing.T, client, gateway *end) {
	t.Helper()
	exchange := func(from, to *end, packet []byte) {
		// A datagram may be lost, above all while a relay's binding moves, so it is sent again.
		for range 20 {
			from.tun.Outbound <- packet
			select {
			case got := <-to.tun.Inbound:
				if !bytes.Equal(got, packet) {
					t.Fatalf("the packet came out changed")
				}
				return
			case <-time.After(2 * time.Second):
			}
		}
		t.Fatalf("no packet came through")
	}
	exchange(client, gateway, tuntest.Ping(gatewayIP, clientIP))
	exchange(gateway, client, tuntest.Ping(clientIP, gatewayIP))
}

func within(t *testing.T, d time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(d); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", d, what)
		}
	}
}

func TestPacketsFlowOverTheValidatedPath(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	c, g := join(t, client, gateway, gateway.Port())
	ping(t, client, gateway)

	if s := c.Status(); s.Path.Kind != wire.Host || s.Path.Remote != loopback(gateway.Port()) || s.Handshake.IsZero() || s.RxBytes == 0 || s.TxBytes == 0 {
		t.Errorf("the client's status is %+v", s)
	}
	within(t, 30*time.Second, "the gateway follows to the observed address", func() bool {
		s := g.Status()
		return s.Path.Kind == wire.Observed && s.Path.Remote == loopback(client.Port())
	})
}

func TestRemovedPeerIsDead(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	_, g := join(t, client, gateway, gateway.Port())
	ping(t, client, gateway)
	gateway.RemovePeer(g)
	gateway.RemovePeer(g)
	before := gateway.bind.counts.stranger.Load()
	client.tun.Outbound <- tuntest.Ping(gatewayIP, clientIP)
	within(t, 30*time.Second, "the packet is a stranger's", func() bool { return gateway.bind.counts.stranger.Load() > before })
	select {
	case <-gateway.tun.Inbound:
		t.Fatal("a packet of a removed peer came through")
	default:
	}
}

// A stranger hears nothing, whatever it sends.
func TestPortIsDeadToStrangers(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	session := client.PublicKey().SessionID()
	if _, err := gateway.AddPeer(PeerOptions{Key: client.PublicKey(), Session: session}); err != nil {
		t.Fatal(err)
	}
	stranger, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()

	wrong, _ := wire.NewPrivateKey()
	wrongKey, err := checkKey(wrong, gateway.PublicKey(), session)
	if err != nil {
		t.Fatal(err)
	}
	rightKey, err := checkKey(client.key, gateway.PublicKey(), session)
	if err != nil {
		t.Fatal(err)
	}
	check := func(name string, key []byte) []byte {
		pkt, err := nat.AppendCheck(nil, nat.Check{ID: randomID(), Username: name, Seq: 1}, key, 0)
		if err != nil {
			t.Fatal(err)
		}
		return pkt
	}
	initiation := make([]byte, device.MessageInitiationSize)
	initiation[0] = device.MessageInitiationType
	transport := make([]byte, 100)
	transport[0] = device.MessageTransportType
	own := checkName(session, client.PublicKey())
	for name, pkt := range map[string][]byte{
		"plain binding request":   nat.BindingRequest(randomID()),
		"check under another key": check(own, wrongKey),
		"check of no session":     check("nobody:12345678", rightKey),
		"check with our own name": check(checkName(session, gateway.PublicKey()), rightKey),
		"handshake":               initiation,
		"transport data":          transport,
		"junk":                    []byte("hello"),
		"empty":                   {},
	} {
		if _, err := stranger.WriteTo(pkt, net.UDPAddrFromAddrPort(loopback(gateway.Port()))); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	// The answer to an authentic check comes after whatever the others would have been answered with.
	if _, err := stranger.WriteTo(check(own, rightKey), net.UDPAddrFromAddrPort(loopback(gateway.Port()))); err != nil {
		t.Fatal(err)
	}
	_ = stranger.SetReadDeadline(time.Now().Add(40 * time.Second))
	buf := make([]byte, 2048)
	n, _, err := stranger.ReadFrom(buf)
	if err != nil {
		t.Fatalf("the authentic check is not answered: %v", err)
	}
	if !nat.VerifyCheck(buf[:n], rightKey) {
		t.Fatalf("a stranger was answered with %x", buf[:n])
	}
}

// middle passes datagrams on between one client and a gateway, and may swallow or change them.
type middle struct {
	conn    *net.UDPConn
	gateway netip.AddrPort
	client  atomic.Pointer[netip.AddrPort]
	swallow func(up bool, pkt []byte) bool
	done    chan struct{}
}

func newMiddle(t *testing.T, gateway uint16, swallow func(up bool, pkt []byte) bool) *middle {
	t.Helper()
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(loopback(0)))
	if err != nil {
		t.Fatal(err)
	}
	m := &middle{conn: conn, gateway: loopback(gateway), swallow: swallow, done: make(chan struct{})}
	go m.run()
	t.Cleanup(func() { conn.Close(); <-m.done })
	return m
}

func (m *middle) port() uint16 { return m.conn.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

func (m *middle) run() {
	defer close(m.done)
	buf := make([]byte, 65536)
	for {
		n, from, err := m.conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		from = unmap(from)
		up, to := from != m.gateway, m.gateway
		if up {
			m.client.Store(&from)
		} else if c := m.client.Load(); c != nil {
			to = *c
		}
		if !m.swallow(up, buf[:n]) {
			_, _ = m.conn.WriteToUDPAddrPort(buf[:n], to)
		}
	}
}

// One lost handshake datagram, either way, costs well under the five seconds after which WireGuard itself tries again. A busy
// machine may take that long for anything, so one of three tries has to show it.
func TestLostHandshakeIsRepaired(t *testing.T) {
	for name, lost := range map[string]func([]byte) bool{
		"initiation": func(pkt []byte) bool { return nat.PeekHandshake(pkt) != nil },
		"response":   func(pkt []byte) bool { return isWireGuard(pkt) && messageType(pkt) == device.MessageResponseType },
	} {
		t.Run(name, func(t *testing.T) {
			var err error
			for range 3 {
				if err = repaired(t, lost); err == nil {
					return
				}
			}
			t.Error(err)
		})
	}
}

// repaired loses the first message of a type and tells whether the handshake is there within four seconds all the same.
func repaired(t *testing.T, lost func([]byte) bool) error {
	client, gateway := newEnd(t), newEnd(t)
	var once atomic.Bool
	m := newMiddle(t, gateway.Port(), func(_ bool, pkt []byte) bool {
		return lost(pkt) && once.CompareAndSwap(false, true)
	})
	start := time.Now()
	c, _ := join(t, client, gateway, m.port())
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
	defer cancel()
	if err := c.WaitHandshake(ctx); err != nil {
		return fmt.Errorf("no handshake %v after losing one: %w", time.Since(start), err)
	}
	if !once.Load() {
		t.Fatal("nothing was lost")
	}
	ping(t, client, gateway)
	return nil
}

// captureCheck joins two ends over a middle and gives a check that the client sent, which the gateway has seen or not.
func captureCheck(t *testing.T, delivered bool) (client, gateway *end, g *Peer, check []byte) {
	t.Helper()
	client, gateway = newEnd(t), newEnd(t)
	captured := make(chan []byte, 1)
	m := newMiddle(t, gateway.Port(), func(up bool, pkt []byte) bool {
		if up && nat.IsSTUN(pkt) {
			select {
			case captured <- bytes.Clone(pkt):
				return !delivered
			default:
			}
		}
		return false
	})
	_, g = join(t, client, gateway, m.port())
	check = <-captured
	ping(t, client, gateway)
	return client, gateway, g, check
}

// attack sends a packet to the gateway from an address of its own and gives that address and what comes back within a moment
// after the gateway has handled it, which fence proves.
func attack(t *testing.T, gateway *end, pkt []byte) (from netip.AddrPort, answers int) {
	t.Helper()
	attacker, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(loopback(0)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { attacker.Close() })
	to := loopback(gateway.Port())
	before := gateway.bind.counts.junk.Load()
	for _, b := range [][]byte{pkt, []byte("junk that is counted")} {
		if _, err := attacker.WriteToUDPAddrPort(b, to); err != nil {
			t.Fatal(err)
		}
	}
	within(t, 30*time.Second, "the packet is handled", func() bool { return gateway.bind.counts.junk.Load() > before })
	_ = attacker.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	for buf := make([]byte, 2048); ; answers++ {
		if _, err := attacker.Read(buf); err != nil {
			return unmap(attacker.LocalAddr().(*net.UDPAddr).AddrPort()), answers
		}
	}
}

// A check that was listened to and is sent again from elsewhere draws nothing, and makes no path.
func TestReplayedCheckDrawsNothing(t *testing.T) {
	_, gateway, g, check := captureCheck(t, true)
	from, answers := attack(t, gateway, check)
	if answers > 0 {
		t.Errorf("a replayed check drew %d packets", answers)
	}
	if gateway.bind.table.lookup(spot{remote: from}) != nil {
		t.Error("a replayed check made a path")
	}
	if g.Status().Path.Remote == from {
		t.Error("traffic moved to the attacker")
	}
}

// A check that was caught on its way and comes from elsewhere opens no path: the answer to our own check never comes.
func TestCaughtCheckOpensNoPath(t *testing.T) {
	_, gateway, g, check := captureCheck(t, false)
	from, _ := attack(t, gateway, check)
	if p := gateway.bind.table.lookup(spot{remote: from}); p != nil && p.open.Load() {
		t.Fatal("the attacker's path is open")
	}
	transport := make([]byte, 100)
	transport[0] = device.MessageTransportType
	before := gateway.bind.counts.stranger.Load()
	if _, answers := attack(t, gateway, transport); answers > 0 {
		t.Error("an answer to a stranger")
	}
	within(t, 30*time.Second, "the attacker's packet is dropped", func() bool { return gateway.bind.counts.stranger.Load() > before })
	if got := g.Status().Path.Remote; got == from {
		t.Fatal("traffic moved to the attacker")
	}
}

func TestPathIsReplacedWhenItGoesSilent(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	var cut atomic.Bool
	m := newMiddle(t, gateway.Port(), func(bool, []byte) bool { return cut.Load() })
	c, _ := join(t, client, gateway, m.port())
	ping(t, client, gateway)
	if got := c.Status().Path.Remote.Port(); got != m.port() {
		t.Fatalf("traffic goes to port %d", got)
	}
	second := newMiddle(t, gateway.Port(), func(bool, []byte) bool { return false })
	c.AddCandidates(hostCandidate(second.port()))
	cut.Store(true)
	stop := time.Now().Add(40 * time.Second)
	for c.Status().Path.Remote.Port() != second.port() {
		if time.Now().After(stop) {
			t.Fatalf("still on the dead path: %+v", c.Status())
		}
		client.tun.Outbound <- tuntest.Ping(gatewayIP, clientIP)
		time.Sleep(50 * time.Millisecond)
	}
}

func TestOnPathTellsOfLoss(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	session := client.PublicKey().SessionID()
	g, err := gateway.AddPeer(PeerOptions{Key: client.PublicKey(), Session: session})
	if err != nil {
		t.Fatal(err)
	}
	paths := make(chan Path, 16)
	if _, err := client.AddPeer(PeerOptions{
		Key: gateway.PublicKey(), Session: session, Candidates: hostCandidate(gateway.Port()), Initiate: true,
		AllowedIPs: []netip.Prefix{netip.PrefixFrom(gatewayIP, 32)},
		OnPath:     func(p Path) { paths <- p },
	}); err != nil {
		t.Fatal(err)
	}
	if p := <-paths; !p.Remote.IsValid() {
		t.Fatal("the first word is that there is no path")
	}
	gateway.RemovePeer(g)
	stop := time.After(40 * time.Second)
	for {
		select {
		case p := <-paths:
			if !p.Remote.IsValid() {
				return
			}
		case client.tun.Outbound <- tuntest.Ping(gatewayIP, clientIP): // unanswered traffic makes the path suspect
			time.Sleep(20 * time.Millisecond)
		case <-stop:
			t.Fatal("the loss of the only path is not told")
		}
	}
}

func TestReflexive(t *testing.T) {
	server, err := nat.Listen(t.Context(), nat.ServerOptions{Addr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	e := newEnd(t)
	got, err := e.Reflexive(t.Context(), unmap(server.Addr().(*net.UDPAddr).AddrPort()))
	if err != nil {
		t.Fatal(err)
	}
	if got != loopback(e.Port()) {
		t.Errorf("reflexive address %v, want %v", got, loopback(e.Port()))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := e.Reflexive(ctx, loopback(9)); err == nil {
		t.Error("a server that does not answer gave an address")
	}
}

func TestSetKeyNeedsNoPeers(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	c, _ := join(t, client, gateway, gateway.Port())
	next, _ := wire.NewPrivateKey()
	if err := client.SetKey(next); err == nil {
		t.Error("the key changed under a peer")
	}
	client.RemovePeer(c)
	if err := client.SetKey(next); err != nil {
		t.Fatal(err)
	}
	client.key = next
	join(t, client, gateway, gateway.Port())
	ping(t, client, gateway)
}

func TestAddPeerRefusals(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	join(t, client, gateway, gateway.Port())
	for name, opts := range map[string]PeerOptions{
		"no key":        {Session: "x"},
		"no session":    {Key: client.PublicKey()},
		"long session":  {Key: client.PublicKey(), Session: string(make([]byte, 65))},
		"same session":  {Key: wire.Key{9}, Session: client.PublicKey().SessionID()},
		"same key":      {Key: client.PublicKey(), Session: "another"},
		"low-order key": {Key: wire.Key{1}, Session: "low"},
	} {
		if _, err := gateway.AddPeer(opts); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	_ = gateway.Close()
	if _, err := gateway.AddPeer(PeerOptions{Key: wire.Key{9}, Session: "late"}); err == nil {
		t.Error("a closed tunnel took a peer")
	}
}

// TestHearsayIsBounded: whoever lists candidates for a session, again and again, has us check so many addresses and no more.
func TestHearsayIsBounded(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	g, err := gateway.AddPeer(PeerOptions{Key: client.PublicKey(), Session: client.PublicKey().SessionID()})
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []wire.CandidateKind{wire.Observed, wire.Host, wire.Observed} {
		for port := range uint16(100) {
			g.AddCandidates([]wire.Candidate{{Kind: kind, Addr: loopback(20000 + port)}})
		}
		g.mu.Lock()
		for _, p := range g.engine.paths {
			if p.kind == wire.Observed || p.spot.remote.Port() >= 20000+maxPaths {
				t.Errorf("%s candidate %s is checked", p.kind, p.spot.remote)
			}
		}
		g.mu.Unlock()
	}
}

func TestOnlyWholeHandshakeMessagesCount(t *testing.T) {
	for typ, size := range map[byte]int{
		device.MessageInitiationType: device.MessageInitiationSize, device.MessageResponseType: device.MessageResponseSize,
		device.MessageCookieReplyType: device.MessageCookieReplySize,
	} {
		for _, n := range []int{size - 1, size, size + 1, 60000} {
			if pkt := append([]byte{typ}, make([]byte, n-1)...); isWireGuard(pkt) != (n == size) {
				t.Errorf("a message of type %d with %d bytes: %v", typ, n, n != size)
			}
		}
	}
}

// natCheck is a check as a peer would send it.
func natCheck(p *Peer, seq uint64) ([]byte, error) {
	return nat.AppendCheck(nil, nat.Check{ID: randomID(), Username: p.name, Seq: seq}, p.key, 0)
}
