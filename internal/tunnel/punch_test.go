package tunnel

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// openFiles counts this process's file descriptors.
func openFiles(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip("file descriptors cannot be counted: ", err)
	}
	return len(list)
}

// blackHole is a port on loopback that takes everything and says nothing: what a NAT's port is to strangers.
func blackHole(t *testing.T) netip.AddrPort {
	t.Helper()
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(loopback(0)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return unmap(conn.LocalAddr().(*net.UDPAddr).AddrPort())
}

// behind tells a tunnel what it is behind. Ports far apart save it the question which ports that maps to.
func behind(e *end, mapping wire.Mapping) {
	e.public = func(a netip.Addr) bool { return a.IsLoopback() }
	see := func(server, mapped uint16) nat.Observation {
		return nat.Observation{Server: loopback(server), Mapped: loopback(mapped)}
	}
	e.SetNAT(mapping, []nat.Observation{see(1, 2000), see(2, 60000)})
}

// strangers are a client and a gateway that know of each other only ports that let nothing in, and share a relay.
func strangers(t *testing.T, client, gateway wire.Mapping) (ce, ge *end, c, g *Peer) {
	t.Helper()
	r := newFakeRelay(t, "r")
	ce, ge = newRelayedEnd(t, false, r), newRelayedEnd(t, true, r)
	behind(ce, client)
	behind(ge, gateway)
	c, g = joinRelayed(t, ce, ge, []wire.Candidate{{Kind: wire.Reflexive, Addr: blackHole(t)}}, r)
	g.AddCandidates([]wire.Candidate{{Kind: wire.Reflexive, Addr: blackHole(t)}})
	ping(t, ce, ge)
	return ce, ge, c, g
}

// turns gives the sockets of a peer's round.
func (p *Peer) openTurns() []*spare {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.punch.turns
}

// lucky has the easy side guess right, after a few misses.
func lucky(easy, hard *Peer) {
	easy.mu.Lock()
	defer easy.mu.Unlock()
	easy.punch.shuffle = func(ports) []uint16 {
		order := make([]uint16, 20, 21) // port 0 takes nothing
		for _, s := range hard.openTurns() {
			return append(order, s.conn.LocalAddr().Port())
		}
		return order
	}
}

// One of the sockets becomes the path, packets flow through it, and the others are closed.
func TestGuessedPortBecomesThePath(t *testing.T) {
	for name, hardLeads := range map[string]bool{"client hard": true, "gateway hard": false} {
		t.Run(name, func(t *testing.T) {
			mappings := [2]wire.Mapping{wire.MappingEasy, wire.MappingHard}
			if hardLeads {
				mappings = [2]wire.Mapping{wire.MappingHard, wire.MappingEasy}
			}
			ce, ge, c, g := strangers(t, mappings[0], mappings[1])
			hard, easy := g, c
			if hardLeads {
				hard, easy = c, g
			}
			before := openFiles(t)
			lucky(easy, hard)
			on(t, "directly", c, g, isDirect)
			through := func(p *Peer) bool {
				r := p.current.Load()
				if r == nil {
					return false
				}
				_, ok := r.via.(*spare)
				return ok
			}
			if !through(hard) || through(easy) {
				t.Error("the path does not lead through a socket of its own on the hard side alone")
			}
			ping(t, ce, ge)
			within(t, patient, "the other sockets are closed", func() bool { return openFiles(t) <= before+1 })
			ping(t, ce, ge)

			ce.RemovePeer(c)
			ge.RemovePeer(g)
			within(t, patient, "all are closed", func() bool { return openFiles(t) <= before })
			for _, e := range []*end{ce, ge} {
				if e.crowd.rounds != 0 || e.crowd.sockets != 0 {
					t.Errorf("%d rounds and %d sockets are still booked", e.crowd.rounds, e.crowd.sockets)
				}
			}
		})
	}
}

// Whatever ends a try closes its sockets: a session that ends in the middle, or nobody who guesses right.
func TestSocketsOfATryAreClosed(t *testing.T) {
	_, _, c, g := strangers(t, wire.MappingHard, wire.MappingEasy)
	g.mu.Lock()
	g.punch.shuffle = func(ports) []uint16 { return make([]uint16, 100) }
	g.mu.Unlock()
	before := openFiles(t)
	within(t, patient, "sockets are open", func() bool { return len(c.openTurns()) == birthdaySockets })
	if n := openFiles(t); n < before+birthdaySockets {
		t.Fatalf("%d files open, %d before", n, before)
	}
	c.act(func(now time.Time) {
		c.punch.end(now)
		c.settleSpares(now)
	})
	within(t, patient, "they are closed", func() bool { return openFiles(t) <= before })
	within(t, patient, "sockets are open again", func() bool { return len(c.openTurns()) == birthdaySockets })
	c.tunnel.RemovePeer(c)
	within(t, patient, "they are closed with the session", func() bool { return openFiles(t) <= before })
	if c.tunnel.crowd.sockets != 0 || c.tunnel.crowd.rounds != 0 {
		t.Errorf("%d sockets and %d rounds are still booked", c.tunnel.crowd.sockets, c.tunnel.crowd.rounds)
	}
}

// Nobody can make a side probe where the peer has not been seen: not by candidates in ranges where no NAT's outer side is, not
// by ones that were not seen from outside, not by checks from elsewhere.
func TestOnlyWhereThePeerWasSeen(t *testing.T) {
	client, gateway := newEnd(t), newEnd(t)
	c, g := join(t, client, gateway, gateway.Port())
	ping(t, client, gateway) // the gateway has an observed path
	hostile := []string{
		"10.0.0.1:53", "172.16.0.9:1", "192.168.1.1:80", "100.64.0.1:4000", "127.0.0.1:22", "0.0.0.0:9", "169.254.169.254:80",
		"224.0.0.1:5353", "255.255.255.255:67", "240.0.0.1:9", "198.18.0.1:80", "168.63.129.16:80", "203.0.113.5:0",
		"[::1]:22", "[::ffff:10.0.0.1]:53", "[::ffff:127.0.0.1]:53", "[fe80::1]:9", "[ff02::1]:9", "[2001:db8::1]:9",
	}
	var list []wire.Candidate
	for _, text := range hostile {
		list = append(list, wire.Candidate{Kind: wire.Reflexive, Addr: netip.MustParseAddrPort(text)})
	}
	for i, kind := range []wire.CandidateKind{wire.Host, wire.Public, wire.Mapped, wire.Observed, wire.Relayed} {
		list = append(list, wire.Candidate{Kind: kind, Addr: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.7"), uint16(4000+i))})
	}
	for _, p := range []*Peer{c, g} {
		p.AddCandidates(list)
		p.mu.Lock()
		if s := p.situation(); s.target.IsValid() {
			t.Errorf("ports of %v would be tried", s.target)
		}
		p.mu.Unlock()
		seen := netip.MustParseAddrPort("203.0.113.8:4000")
		p.AddCandidates([]wire.Candidate{{Kind: wire.Reflexive, Addr: seen}})
		p.mu.Lock()
		if s := p.situation(); s.target != seen {
			t.Errorf("ports of %v would be tried, and not of %v", s.target, seen)
		}
		if s := p.situation(); s.relayed {
			t.Error("ports would be tried beside a direct path")
		}
		p.mu.Unlock()
	}
}

// Probes go to the seen address alone, whatever port is guessed.
func TestProbesKeepToTheSeenAddress(t *testing.T) {
	e := newEnd(t)
	key := newEnd(t).PublicKey()
	e.SetNAT(wire.MappingEasy, nil)
	p, err := e.AddPeer(PeerOptions{Key: key, Session: key.SessionID()})
	if err != nil {
		t.Fatal(err)
	}
	seen := netip.MustParseAddrPort("203.0.113.8:4000")
	p.mu.Lock()
	defer p.mu.Unlock()
	relayed := &path{peer: p, spot: spot{header: 4 << 28, remote: loopback(9)}, kind: wire.Relayed, valid: true}
	p.engine.paths = append(p.engine.paths, relayed, &path{peer: p, spot: spot{remote: seen}, kind: wire.Reflexive})
	p.engine.chosen = relayed
	sent := map[uint16]bool{}
	now := time.Now()
	p.heed(nat.Behind{Mapping: wire.MappingHard, Ready: true, Round: 1}, now)
	for range 400 {
		now = now.Add(birthdayTick)
		_, out := p.punching(now)
		for _, o := range out {
			sent[o.to.remote.Port()] = true
			if o.to.remote.Addr() != seen.Addr() || o.to.header != 0 || o.to.via != nil {
				t.Fatalf("a probe goes to %+v", o.to)
			}
		}
	}
	if len(sent) != birthdayTry {
		t.Errorf("%d ports were tried, want %d", len(sent), birthdayTry)
	}
}
