package agent

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/culvertnet/culvert/gateway/forward"
	"github.com/culvertnet/culvert/gateway/names"
	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// plane is the data plane: the tunnel into a network stack, the forwarder out of it and, once the coordinator has said which
// overlay addresses are the gateway's, the services on them.
type plane struct {
	device  *netstack.Device
	tunnel  *tunnel.Tunnel
	limits  forward.Limits
	log     *slog.Logger
	handler http.Handler // the services' HTTP
	resolve *names.Resolver
	trace   func(wire.FlowRecord)

	mu     sync.Mutex
	local  []netip.Addr // nil before the first welcome
	ranges names.Ranges
	fwd    *forward.Forwarder
	front  *services

	narrow   narrow
	removals sync.WaitGroup // of peers that have just been reset
}

// resetGrace is how long resets have to get through the device to the peer.
const resetGrace = 20 * time.Millisecond

// newPlane opens the UDP socket. Nothing is admitted before the overlay addresses are set.
func newPlane(key wire.PrivateKey, port uint16, o *Options, client *http.Client, trace func(wire.FlowRecord)) (*plane, error) {
	log := o.Logger
	device, err := netstack.New(netstack.Options{Forward: true, Logger: log})
	if err != nil {
		return nil, fmt.Errorf("make the network stack: %w", err)
	}
	t, err := tunnel.New(tunnel.Options{Key: key, TUN: device, Port: port, Turns: true, Logger: log, Relays: relaying(o, client)})
	if err != nil {
		return nil, errors.Join(problem.Wrap(err, problem.BadConfig, fmt.Sprintf("the tunnel cannot listen on UDP port %d: %v", port, problem.Reason(err)),
			"free the port, or give another with --listen"), device.Close())
	}
	resolver, err := names.NewResolver(names.ResolverOptions{Servers: o.Resolvers, Logger: log})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make the resolver: %w", err), t.Close())
	}
	p := &plane{device: device, tunnel: t, limits: o.Limits.Forward, resolve: resolver, trace: trace, log: log}
	device.SetPathMTU(p.narrow.at)
	return p, nil
}

// addresses are the gateway's own in the overlay; empty before the first welcome.
func (p *plane) addresses() []netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.local
}

// served counts questions to the DNS inside the tunnel, and bytes of buffers that flows have been lent; zero before the first welcome.
func (p *plane) served() (questions names.ServerCounts, lent int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fwd == nil {
		return questions, 0
	}
	return p.front.dns.Counts(), p.fwd.Load().Lent
}

// services are where granted names have their addresses.
func (p *plane) services() names.Ranges {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ranges
}

// setNetwork takes the overlay addresses and the service addresses of a welcome: it starts the forwarder and the services
// there. No session may be held unless they are what they were.
func (p *plane) setNetwork(addrs []netip.Addr, ranges names.Ranges) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.is(addrs, ranges) {
		return nil
	}
	if err := p.stopServing(); err != nil {
		return err
	}
	if err := p.device.SetAddresses(addrs); err != nil {
		return fmt.Errorf("set the overlay addresses: %w", err)
	}
	fwd, err := forward.New(forward.Options{
		Device: p.device, Local: addrs, Ranges: ranges, Resolver: p.resolve, Trace: p.trace, Limits: p.limits, Logger: p.log,
	})
	if err != nil {
		return fmt.Errorf("start the forwarder: %w", err)
	}
	front, err := p.serve(addrs, ranges, fwd)
	if err != nil {
		return errors.Join(fmt.Errorf("start the services inside the tunnel: %w", err), fwd.Close())
	}
	p.local, p.ranges, p.fwd, p.front = addrs, ranges, fwd, front
	return nil
}

// is tells whether the plane serves this network already. p.mu is held.
func (p *plane) is(addrs []netip.Addr, ranges names.Ranges) bool {
	return slices.Equal(p.local, addrs) && p.ranges == ranges
}

// keeps tells whether a welcome changes nothing that sessions rely on.
func (p *plane) keeps(addrs []netip.Addr, ranges names.Ranges) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.is(addrs, ranges)
}

// serve starts what the gateway serves inside the tunnel.
func (p *plane) serve(addrs []netip.Addr, ranges names.Ranges, fwd *forward.Forwarder) (*services, error) {
	dns, err := names.NewServer(names.ServerOptions{Resolver: p.resolve, Ranges: ranges, Logger: p.log, Session: func(a netip.Addr) names.Session {
		if s := fwd.Find(a); s != nil {
			return s
		}
		return nil
	}})
	if err != nil {
		return nil, err
	}
	return serve(p.device, addrs, p.handler, fwd, dns, p.log)
}

// stopServing ends services and forwarder. p.mu is held.
func (p *plane) stopServing() error {
	if p.fwd == nil {
		return nil
	}
	err := errors.Join(p.fwd.Close(), p.front.close()) // tries of targets end with the forwarder
	p.local, p.ranges, p.fwd, p.front = nil, names.Ranges{}, nil, nil
	return err
}

// open gives a session its place. The forwarder knows it before its first packet can arrive.
func (p *plane) open(id string, key wire.Key, addrs []netip.Addr, r reach, scope *policy.Scope) (carrier, error) {
	p.mu.Lock()
	fwd := p.fwd
	p.mu.Unlock()
	if fwd == nil {
		return nil, errors.New("no overlay addresses yet")
	}
	flows, err := fwd.Add(id, addrs, scope)
	if err != nil {
		return nil, fmt.Errorf("add the session to the forwarder: %w", err)
	}
	lane := p.device.OpenLane(addrs)
	flows.SetLane(lane)
	way := &passage{addrs: addrs}
	p.narrow.set(way, tunnel.StartMTU) // until the client has found out what fits
	peer, err := p.tunnel.AddPeer(tunnel.PeerOptions{
		Key: key, Session: cmp.Or(r.way, id), AllowedIPs: hostPrefixes(addrs), Candidates: r.candidates, Relays: r.relays,
		OnMTU: func(mtu int) { p.narrow.set(way, mtu) }, Sent: lane.Sent,
	})
	if err != nil {
		lane.Close()
		fwd.Remove(flows)
		p.narrow.forget(way)
		return nil, fmt.Errorf("add the peer: %w", err)
	}
	lane.SetLive(peer.Live, peer.Ready)
	return &place{Peer: peer, Session: flows, plane: p, way: way, fwd: fwd, lane: lane}, nil
}

// close ends everything and waits.
func (p *plane) close() error {
	p.removals.Wait()
	p.mu.Lock()
	err := p.stopServing()
	p.mu.Unlock()
	p.resolve.Close()
	return errors.Join(err, p.tunnel.Close())
}

// place is one session's place in the data plane.
type place struct {
	*tunnel.Peer
	*forward.Session
	plane *plane
	way   *passage
	fwd   *forward.Forwarder
	lane  *netstack.Lane
	once  sync.Once
}

// Close resets the session's flows; from then on nothing of it is accepted. Where there were flows, the peer itself stays for a
// moment longer, so that the job hears of the resets.
func (p *place) Close() {
	p.once.Do(func() {
		open := p.Counts().Open
		p.fwd.Remove(p.Session)
		p.plane.narrow.forget(p.way)
		if open == 0 {
			p.plane.tunnel.RemovePeer(p.Peer)
			p.lane.Close()
			return
		}
		p.plane.removals.Go(func() {
			time.Sleep(resetGrace)
			p.plane.tunnel.RemovePeer(p.Peer)
			p.lane.Close()
		})
	})
}
