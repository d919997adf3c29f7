package agenttest

import (
	"encoding/json"
	"io"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// Gateway is the other end of the tunnel. It grants nothing and checks nothing: what it serves is its own.
type Gateway struct {
	OnRenew func() (wire.Lease, error) // called with the lock held; default gives 10 min more
	Verdict wire.ReachResult           // what it says of every target
	Deaf    bool                       // admits nobody
	Names   *wire.Names                // that it grants; nil for none

	name   string
	key    wire.PrivateKey
	tunnel *tunnel.Tunnel
	stack  *netstack.Device

	mu       sync.Mutex
	peers    []*tunnel.Peer
	renewals []wire.Secret
	asked    []string
	taken    int
	quiet    <-chan struct{}
	cut      uint64
}

func newGateway(t *testing.T) *Gateway {
	t.Helper()
	key, err := wire.NewPrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	stack, err := netstack.New(netstack.Options{Addresses: []netip.Addr{Overlay, Service}})
	if err != nil {
		t.Fatal(err)
	}
	dial := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	relays := tunnel.RelayOptions{Keep: true, Dial: tunnel.DialRelay(dial, nil)}
	g := &Gateway{name: "gw", key: key, stack: stack, Verdict: wire.ReachResult{Verdict: wire.Reachable, Rule: "deploy"}}
	if g.tunnel, err = tunnel.New(tunnel.Options{Key: key, TUN: stack, Relays: relays}); err != nil {
		t.Fatal(err)
	}
	return g
}

// start serves what a client wants to see inside the tunnel.
func (g *Gateway) start(t *testing.T, relays []*Relay) {
	t.Helper()
	known := make([]tunnel.Relay, len(relays))
	for i, r := range relays {
		known[i] = r.known()
	}
	g.tunnel.SetRelays(known)
	var wait sync.WaitGroup
	t.Cleanup(func() {
		_ = g.tunnel.Close() // closes the stack and its listeners too
		wait.Wait()
	})
	g.echo(t, &wait)
	g.answerNames(t, &wait)
	inside := http.NewServeMux()
	inside.HandleFunc("POST "+wire.PathRenew, g.renew)
	inside.HandleFunc("POST "+wire.PathReach, g.reach)
	inside.HandleFunc("POST "+wire.PathTake, g.take)
	inside.HandleFunc("POST "+wire.PathLeave, g.leave)
	g.serve(t, &wait, netip.AddrPortFrom(Overlay, wire.InsidePort), inside)
	g.serve(t, &wait, netip.AddrPortFrom(Service, ServicePort), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "hello")
	}))
}

// Key is what a client pins.
func (g *Gateway) Key() wire.Key { return g.key.Public() }

// Renewals are the tokens that came through the tunnel.
func (g *Gateway) Renewals() []wire.Secret {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]wire.Secret(nil), g.renewals...)
}

// Asked are the targets that clients asked about.
func (g *Gateway) Asked() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]string(nil), g.asked...)
}

// Script changes what the gateway says while it serves.
func (g *Gateway) Script(change func(*Gateway)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	change(g)
}

// Forget is a restart: the gateway knows no session any more.
func (g *Gateway) Forget() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.peers {
		g.tunnel.RemovePeer(p)
	}
	g.peers = nil
}

func (g *Gateway) echo(t *testing.T, wait *sync.WaitGroup) {
	t.Helper()
	socket, err := g.stack.ListenUDP(netip.AddrPortFrom(Overlay, wire.EchoPort))
	if err != nil {
		t.Fatal(err)
	}
	wait.Go(func() {
		buf := make([]byte, wire.MaxEcho)
		for {
			n, from, err := socket.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = socket.WriteTo(buf[:n], from)
		}
	})
}

func (g *Gateway) serve(t *testing.T, wait *sync.WaitGroup, addr netip.AddrPort, handler http.Handler) {
	t.Helper()
	listener, err := g.stack.ListenTCP(addr)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
	t.Cleanup(func() { _ = server.Close() })
	wait.Go(func() { _ = server.Serve(listener) })
}

func (g *Gateway) renew(w http.ResponseWriter, r *http.Request) {
	var in wire.InsideRenew
	_ = json.NewDecoder(r.Body).Decode(&in)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.renewals = append(g.renewals, in.Token)
	lease := wire.Lease{Expires: time.Now().Add(10 * time.Minute), Ends: time.Now().Add(24 * time.Hour)}
	if g.OnRenew != nil {
		var err error
		if lease, err = g.OnRenew(); err != nil {
			problem.Write(w, err)
			return
		}
	}
	reply(w, lease)
}

func (g *Gateway) reach(w http.ResponseWriter, r *http.Request) {
	var in wire.ReachRequest
	_ = json.NewDecoder(r.Body).Decode(&in)
	g.mu.Lock()
	g.asked = append(g.asked, in.Target)
	result := g.Verdict
	g.mu.Unlock()
	result.Target = in.Target
	reply(w, result)
}

func (g *Gateway) describe() wire.Gateway {
	candidates, _ := nat.HostCandidates(g.tunnel.Port(), func(string) bool { return false })
	loopback := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), g.tunnel.Port())
	return wire.Gateway{
		Name:       g.name,
		Key:        g.Key(),
		Addresses:  []netip.Addr{Overlay},
		Candidates: append(candidates, wire.Candidate{Kind: wire.Host, Addr: loopback}),
		Routes:     []netip.Prefix{Granted},
		Names:      g.Names,
	}
}

func (g *Gateway) admit(t *testing.T, j wire.JoinRequest, s wire.Session, relays []tunnel.Grant) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.Deaf {
		return
	}
	allowed := make([]netip.Prefix, 0, len(s.Addresses))
	for _, addr := range s.Addresses {
		allowed = append(allowed, netip.PrefixFrom(addr, addr.BitLen()))
	}
	peer, err := g.tunnel.AddPeer(tunnel.PeerOptions{
		Key: j.Key, Session: s.ID, AllowedIPs: allowed, Candidates: j.Candidates, Relays: relays,
	})
	if err != nil {
		t.Errorf("the gateway cannot admit: %v", err)
		return
	}
	g.peers = append(g.peers, peer)
}
