package tunnel

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// PeerOptions describe a peer: the other side of one session.
type PeerOptions struct {
	Key        wire.Key
	Session    string         // names the session in path checks; the same on both sides
	AllowedIPs []netip.Prefix // WireGuard's cryptokey routing
	Candidates []wire.Candidate
	// Initiate makes this the leading side, the client: it keeps the paths alive, chooses, and starts the handshake as soon as
	// a path shows life. The other side follows.
	Initiate bool
	// OnPath is called, never concurrently for one peer and never from a packet path, when the chosen path changes. A
	// zero Path says that none is left.
	OnPath func(Path)
}

// Path is one way to a peer.
type Path struct {
	Kind   wire.CandidateKind `json:"kind"`   // the remote candidate's kind
	Remote netip.AddrPort     `json:"remote"` // zero without a path
	RTT    time.Duration      `json:"rtt"`    // smoothed round-trip time of path checks, in nanoseconds
}

// Change is one change of path.
type Change struct {
	At   time.Time `json:"at"`
	Path Path      `json:"path"` // zero where none was left
	Why  string    `json:"why"`
}

// Status is a peer's state at one moment.
type Status struct {
	Path      Path      // zero without a path
	Handshake time.Time // when the last handshake response was seen on the wire; zero before the first
	RxBytes   uint64    // WireGuard packets, without UDP and IP headers
	TxBytes   uint64
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

	current   atomic.Pointer[conn.StdNetEndpoint] // the chosen path
	hint      atomic.Pointer[conn.StdNetEndpoint] // where the peer has been heard, before any path is validated
	rx, tx    atomic.Uint64
	handshake handshake

	mu        sync.Mutex // guards what follows, and the engine's paths
	engine    engine
	timer     *time.Timer
	started   bool // the first handshake has been asked for
	fresh     bool // a path has just come up
	closed    bool
	notifying bool
	latest    *Path // to be told to OnPath

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
		// us check any number of addresses.
		if usable(remote) && c.Kind != wire.Observed {
			p.engine.add(&path{peer: p, remote: remote, kind: c.Kind}, now)
		}
	}
}

// usable reports whether an address may be a candidate at all.
func usable(a netip.AddrPort) bool {
	ip := a.Addr()
	return a.IsValid() && a.Port() != 0 && !ip.IsUnspecified() && !ip.IsMulticast() && ip.Zone() == "" &&
		!ip.IsLinkLocalUnicast() && ip != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// SetAllowedIPs replaces what may be sent to and taken from the peer.
func (p *Peer) SetAllowedIPs(prefixes []netip.Prefix) error {
	var b strings.Builder
	fmt.Fprintf(&b, "public_key=%s\nupdate_only=true\nreplace_allowed_ips=true\n", p.opts.Key.Hex())
	for _, prefix := range prefixes {
		fmt.Fprintf(&b, "allowed_ip=%s\n", prefix)
	}
	if err := p.tunnel.device.IpcSet(b.String()); err != nil {
		return fmt.Errorf("set allowed ips of session %s: %w", p.opts.Session, err)
	}
	return nil
}

// Status reads the peer's state.
func (p *Peer) Status() Status {
	s := Status{RxBytes: p.rx.Load(), TxBytes: p.tx.Load()}
	if at := p.handshake.completed.Load(); at != 0 {
		s.Handshake = time.Unix(0, at)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.engine.chosen; c != nil {
		s.Path = c.public()
	}
	s.History = slices.Clone(p.engine.history)
	return s
}

// WaitHandshake returns when a handshake response has been seen, or ctx has ended.
func (p *Peer) WaitHandshake(ctx context.Context) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for p.handshake.completed.Load() == 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// act is how anything happens to a peer's paths: do changes the engine, then what has become due is sent, outside the
// lock, and the timer is set for what comes next.
func (p *Peer) act(do func(now time.Time)) {
	now := time.Now()
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	do(now)
	checks := p.checks(now)
	fresh := p.fresh
	p.fresh = false
	p.rearm(now)
	p.mu.Unlock()

	for _, c := range checks {
		_ = p.tunnel.bind.sendTo(c.pkt, c.to) // a path that cannot be sent to stays unanswered
	}
	to := p.current.Load()
	if to == nil {
		to = p.hint.Load()
	}
	if to == nil {
		return
	}
	if pkt := p.handshake.again(now, fresh); pkt != nil {
		_ = p.tunnel.bind.sendTo(pkt, to)
	}
}

type outgoing struct {
	pkt []byte
	to  *conn.StdNetEndpoint
}

// checks encodes the checks that are due.
func (p *Peer) checks(now time.Time) []outgoing {
	var out []outgoing
	for _, path := range p.engine.due(now) {
		id := p.newID()
		c := nat.Check{ID: id, Username: p.name, Nominate: p.opts.Initiate && path == p.engine.chosen}
		pkt, err := nat.AppendCheck(nil, c, p.key, 0)
		if err != nil {
			continue // only a name that is too long; AddPeer has refused it
		}
		path.booked(id, now)
		out = append(out, outgoing{pkt, &conn.StdNetEndpoint{AddrPort: path.remote}})
	}
	return out
}

func (p *Peer) newID() nat.TxID {
	id := randomID()
	binary.BigEndian.PutUint32(id[:4], p.index)
	return id
}

// randomID makes an unpredictable transaction id (RFC 8489, section 5).
func randomID() nat.TxID {
	var id nat.TxID
	_, _ = rand.Read(id[:]) // never fails, see crypto/rand
	return id
}

// rearm sets the timer for the next thing to do.
func (p *Peer) rearm(now time.Time) {
	wake := p.engine.wake(now)
	if again := p.handshake.wake(); !again.IsZero() && (wake.IsZero() || again.Before(wake)) {
		wake = again
	}
	p.disarm()
	if wake.IsZero() {
		return
	}
	p.timers.Add(1)
	p.timer = time.AfterFunc(wake.Sub(now), func() {
		defer p.timers.Done()
		p.act(func(now time.Time) {
			p.engine.expire(now)
			p.engine.traffic(p.rx.Load(), p.tx.Load(), now)
		})
	})
}

func (p *Peer) disarm() {
	if p.timer != nil && p.timer.Stop() {
		p.timers.Done()
	}
	p.timer = nil
}

// changed is the engine's onChange: traffic moves to a path, or none is left.
func (p *Peer) changed(to *path) {
	if to == nil {
		p.current.Store(nil)
		p.tell(Path{})
		return
	}
	p.current.Store(to.ep)
	p.fresh = true
	p.start()
	p.tell(to.public())
}

// dropped is the engine's onDrop.
func (p *Peer) dropped(gone *path) {
	gone.open.Store(false)
	p.tunnel.bind.table.drop(gone)
}

// start asks the device for the first handshake.
func (p *Peer) start() {
	if !p.opts.Initiate || p.started {
		return
	}
	p.started = true
	p.tunnel.tasks.Go(func() {
		if peer := p.tunnel.device.LookupPeer(device.NoisePublicKey(p.opts.Key)); peer != nil {
			_ = peer.SendHandshakeInitiation(false) // the device logs it and tries again
		}
	})
}

// tell hands the latest path to OnPath, from a goroutine of its own.
func (p *Peer) tell(path Path) {
	if p.opts.OnPath == nil {
		return
	}
	p.latest = &path
	if p.notifying {
		return
	}
	p.notifying = true
	p.tunnel.tasks.Go(func() {
		for {
			p.mu.Lock()
			next := p.latest
			p.latest = nil
			p.notifying = next != nil
			p.mu.Unlock()
			if next == nil {
				return
			}
			p.opts.OnPath(*next)
		}
	})
}

// close ends the peer's paths and waits for its timer.
func (p *Peer) close() {
	p.mu.Lock()
	p.closed = true
	p.disarm()
	for _, path := range p.engine.paths {
		p.dropped(path)
	}
	p.current.Store(nil)
	p.hint.Store(nil)
	p.mu.Unlock()
	p.timers.Wait()
}

// requested handles an authentic check from the peer. Our own check goes out before the answer, so that the path is validated
// on both sides before the first packet that follows the answer.
func (p *Peer) requested(from *conn.StdNetEndpoint, id nat.TxID, nominate bool) {
	p.act(func(now time.Time) {
		known := p.engine.find(from.AddrPort)
		if known == nil {
			known = p.engine.add(&path{peer: p, remote: from.AddrPort, kind: wire.Observed}, now)
		}
		if known == nil {
			return
		}
		p.tunnel.bind.table.put(known)
		p.engine.requested(known, nominate, now)
		if p.opts.Initiate && p.current.Load() == nil && p.hint.Load() == nil {
			p.hint.Store(from)
			p.start()
		}
	})
	pkt, err := nat.AppendCheckResponse(nil, id, from.AddrPort, p.key)
	if err == nil {
		_ = p.tunnel.bind.sendTo(pkt, from)
	}
}

// answered handles an authentic answer and gives the path that it validated, or nil.
func (p *Peer) answered(from *conn.StdNetEndpoint, id nat.TxID) (validated *path) {
	p.act(func(now time.Time) {
		path := p.engine.find(from.AddrPort)
		if path == nil {
			return
		}
		if !p.engine.answered(path, id, from, now) {
			return
		}
		p.tunnel.bind.table.put(path)
		validated = path
		if path == p.engine.chosen {
			p.current.Store(path.ep)
		}
	})
	return validated
}

// accept judges a WireGuard packet from path: what the device shall see of it.
func (p *Peer) accept(from *path, pkt []byte) (conn.Endpoint, int) {
	if !from.open.Load() {
		p.park(from, pkt)
		return nil, 0
	}
	p.rx.Add(uint64(len(pkt)))
	if messageType(pkt) == device.MessageTransportType {
		return p, len(pkt)
	}
	repeated, response := p.handshake.receiving(pkt)
	if !repeated {
		return p, len(pkt)
	}
	if to := p.current.Load(); to != nil && response != nil {
		_ = p.tunnel.bind.sendTo(response, to)
	}
	return nil, 0
}

// park keeps one handshake message that came from an address whose checks are authentic but whose path is not validated
// yet. It is the usual case: the first handshake follows the first check by microseconds.
func (p *Peer) park(from *path, pkt []byte) {
	if messageType(pkt) > device.MessageResponseType || len(pkt) > device.MessageInitiationSize {
		p.tunnel.bind.counts.stranger.Add(1)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	from.parked = append(from.parked[:0], pkt...)
}

// unpark moves the message that was parked for a path, now validated, into buf and gives its size; 0 if there is none.
func (p *Peer) unpark(from *path, buf []byte) int {
	p.mu.Lock()
	n := copy(buf, from.parked)
	from.parked = nil
	p.mu.Unlock()
	if n == 0 {
		return 0
	}
	_, n = p.accept(from, bytes.Clone(buf[:n]))
	return n
}
