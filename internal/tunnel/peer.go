package tunnel

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/repair"
	"github.com/culvertnet/culvert/internal/wire"
)

// PeerOptions describe a peer: the other side of one session.
type PeerOptions struct {
	Key        wire.Key
	Session    string         // names the session in path checks; the same on both sides
	AllowedIPs []netip.Prefix // WireGuard's cryptokey routing
	Candidates []wire.Candidate
	Relays     []Grant // relays that the session may use; the session's id has to be the client key's then
	// Initiate makes this the leading side, the client: it keeps the paths alive, chooses, and starts the handshake, which its first
	// checks carry. The other side follows.
	Initiate bool
	// OnPath is called, never concurrently for one peer and never from a packet path, when the chosen path changes. A
	// zero Path says that none is left.
	OnPath func(Path)
	// OnMTU is called like OnPath when the largest packet that fits inside the tunnel is found to be another than it was; at first
	// that is [StartMTU]. Both sides agree on it. Larger packets get lost: the TUN device has to be told.
	OnMTU func(mtu int)
	// OnLeave is called like OnPath, once, when the other side has said that it is about to go away.
	OnLeave func()
	// Sent is called from packet paths when so many data packets have gone to the socket, or nowhere because there is no path, and with
	// 0 after handshake messages.
	Sent func(packets int)
}

// Status is a peer's state at one moment.
type Status struct {
	Path      Path      // zero without a path
	Handshake time.Time // when the device last had new keys; zero before the first
	RxBytes   uint64    // WireGuard packets, without UDP and IP headers
	TxBytes   uint64
	MTU       int      // the largest packet inside the tunnel, in bytes
	Lost      float64  // share of the packets sent that was lost lately, by the peer's account
	Parities  bool     // are sent, because of that
	Rebuilt   uint64   // packets of the peer that were lost and rebuilt
	History   []Change // the last changes of path, oldest first
}

// Peer is the other side of one session. Towards wireguard-go it is the endpoint of that side, at a synthetic address of its
// own: hundreds of jobs share a cloud NAT's address, and wireguard-go limits handshakes by address.
type Peer struct {
	tunnel    *Tunnel
	opts      PeerOptions
	index     uint32     // the first four bytes of the ids of our checks, by which their answers find us
	key       []byte     // authenticates checks
	name      string     // USERNAME of our checks
	synthetic netip.Addr // what wireguard-go takes for the endpoint's address

	current   atomic.Pointer[route] // the chosen path
	hint      atomic.Pointer[route] // where the peer has been heard, before any path is validated
	rx, tx    atomic.Uint64
	mtu       atomic.Int32 // what OnMTU was last told
	alive     atomic.Int64 // when it last answered a check, Unix nanoseconds
	successor atomic.Pointer[Peer]
	handshake handshake
	asleep    atomic.Bool          // the device does not know the peer
	woken     atomic.Int64         // when it last learned of it, Unix nanoseconds
	dozing    sync.Mutex           // held while the device learns or forgets; taken before mu
	line      atomic.Pointer[line] // towards a device outside this process
	tally     tally
	parities  atomic.Pointer[parities] // nil while little is lost
	mender    atomic.Pointer[mender]   // nil while no parities come
	rebuilt   atomic.Uint64            // packets of the peer's
	turn      turn                     // of its packets for the device

	mu        sync.Mutex // guards what follows, and the engine's paths
	allowed   []netip.Prefix
	engine    engine
	legs      []*leg
	seq       uint64 // of our last check
	seen      replay // of the other side's checks
	timer     *time.Timer
	fresh     bool // a path has just come up
	waking    bool
	letter    []byte // for the device, once it knows the peer
	closed    bool
	notifying bool
	latest    *Path // to be told to OnPath
	latestMTU int   // to be told to OnMTU; 0 for nothing
	left      bool  // the other side has said that it leaves
	leaving   bool  // to be told to OnLeave
	punch     punch
	governor  repair.Governor // of parities

	timers sync.WaitGroup
}

var _ conn.Endpoint = (*Peer)(nil)

// ClearSrc does nothing: a path keeps the local address that its last check came in on.
func (*Peer) ClearSrc() {}

// SrcToString is empty: the local address belongs to the path.
func (*Peer) SrcToString() string { return "" }

// DstToString is the session, which is also what the device is configured with.
func (p *Peer) DstToString() string { return p.opts.Session }

// DstToBytes gives the synthetic address, over which the device computes its cookies.
func (p *Peer) DstToBytes() []byte { return p.synthetic.AsSlice() }

// DstIP gives the synthetic address, by which the device limits handshakes.
func (p *Peer) DstIP() netip.Addr { return p.synthetic }

// SrcIP is the zero address.
func (*Peer) SrcIP() netip.Addr { return netip.Addr{} }

// AddCandidates checks further candidates; known ones and ones that cannot be a unicast UDP address are ignored.
func (p *Peer) AddCandidates(candidates []wire.Candidate) {
	p.act(func(now time.Time) { p.add(candidates, now) })
}

func (p *Peer) add(candidates []wire.Candidate, now time.Time) {
	for _, c := range candidates {
		remote := unmap(c.Addr)
		// Observed paths come from checks, never from hearsay: they make room for each other, so that a list of them would have
		// us check any number of addresses. A relay comes with a ticket.
		if usable(remote) && c.Kind.Valid() {
			p.engine.add(&path{peer: p, spot: spot{remote: remote}, kind: c.Kind}, now)
		}
	}
}

// usable reports whether an address may be a candidate at all.
func usable(a netip.AddrPort) bool {
	ip := a.Addr()
	return a.IsValid() && a.Port() != 0 && !ip.IsUnspecified() && !ip.IsMulticast() && ip.Zone() == "" &&
		!ip.IsLinkLocalUnicast() && ip != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// Refresh checks every path at once, from whatever local address leads there now. It is to be called when the local network has changed;
// sockets and sessions stay.
func (p *Peer) Refresh() {
	p.act(func(now time.Time) {
		p.engine.refresh(now)
		for _, q := range p.engine.paths {
			if q.spot.via == nil {
				q.route = &route{spot: q.spot}
			}
		}
		p.punch.reset()
		if c := p.engine.chosen; c != nil {
			p.current.Store(c.route)
		}
	})
}

// SetAllowedIPs replaces what may be sent to and taken from the peer.
func (p *Peer) SetAllowedIPs(prefixes []netip.Prefix) error {
	p.mu.Lock()
	p.allowed = prefixes
	p.mu.Unlock()
	if err := p.tunnel.device.setAllowedIPs(p, prefixes); err != nil {
		return fmt.Errorf("set allowed ips of session %s: %w", p.opts.Session, err)
	}
	return nil
}

// MTU is the largest packet inside the tunnel, in bytes, as far as is known. It takes no lock.
func (p *Peer) MTU() int { return int(p.mtu.Load()) }

// Live tells whether the device has keys for the peer, as far as is known. It takes no lock.
func (p *Peer) Live() bool {
	at := p.handshake.completed.Load()
	return at != 0 && time.Since(time.Unix(0, at)) < device.RejectAfterTime
}

// Status reads the peer's state.
func (p *Peer) Status() Status {
	s := Status{RxBytes: p.rx.Load(), TxBytes: p.tx.Load(), MTU: p.MTU()}
	if at := p.handshake.completed.Load(); at != 0 {
		s.Handshake = time.Unix(0, at)
	}
	p.tunnel.device.status(p, &s)
	s.Rebuilt, s.Parities = p.rebuilt.Load(), p.parities.Load() != nil
	p.mu.Lock()
	defer p.mu.Unlock()
	s.Lost = p.governor.Loss()
	if c := p.engine.chosen; c != nil {
		s.Path = c.public()
	}
	s.History = slices.Clone(p.engine.history)
	return s
}

// WaitHandshake returns when the device has had keys with the peer, or ctx has ended.
func (p *Peer) WaitHandshake(ctx context.Context) error {
	select {
	case <-p.handshake.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// tell hands what is new to OnPath, OnMTU and OnLeave, from a goroutine of its own. p.mu is held.
func (p *Peer) tell() {
	if p.notifying || p.latest == nil && p.latestMTU == 0 && !p.leaving {
		return
	}
	p.notifying = true
	p.tunnel.tasks.Go(func() {
		for p.tellOnce() {
		}
	})
}

// tellOnce hands on what is new at this moment; false where nothing was.
func (p *Peer) tellOnce() bool {
	p.mu.Lock()
	path, mtu, leaving := p.latest, p.latestMTU, p.leaving
	p.latest, p.latestMTU, p.leaving = nil, 0, false
	p.notifying = path != nil || mtu != 0 || leaving
	more := p.notifying
	p.mu.Unlock()
	if mtu != 0 && p.opts.OnMTU != nil {
		p.opts.OnMTU(mtu)
	}
	if path != nil && p.opts.OnPath != nil {
		p.opts.OnPath(*path)
	}
	if leaving && p.opts.OnLeave != nil {
		p.opts.OnLeave()
	}
	return more
}

// close ends the peer's paths and waits for its timer.
func (p *Peer) close() {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.closed = true
	p.disarm()
	p.cover(false)
	p.unmend(time.Time{}, true)
	var last []outgoing
	for _, l := range p.legs {
		if o := l.close(); o != nil {
			last = append(last, *o)
		}
	}
	for _, path := range p.engine.paths {
		p.dropped(path)
	}
	p.closeSpares()
	p.current.Store(nil)
	p.hint.Store(nil)
	p.mu.Unlock()
	if ts := p.tunnel.bind.turns; ts != nil {
		ts.forget(p)
	}
	for _, o := range last {
		_ = p.tunnel.bind.sendTo(o.pkt, o.to)
	}
	p.timers.Wait()
}
