package tunnel

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// Options configure a [Tunnel].
type Options struct {
	Key wire.PrivateKey
	TUN tun.Device // closed with the tunnel
	// Device takes the place of TUN and of the WireGuard in this process; closed with the tunnel.
	Device Device
	Port   uint16 // UDP port to listen on; 0 picks one
	// Window bounds the packets that wait inside the device in each direction, 64 KiB of memory each. 0 means no bound, for a
	// device with many peers, which must not slow each other down.
	Window int
	// Turns has the peers share fairly what the device can take of what comes in, and bounds how much of it waits. For a device with many
	// peers whose AllowedIPs are single addresses.
	Turns  bool
	Relays RelayOptions
	Logger *slog.Logger // default: discards
}

// Validate checks the options and fills in defaults.
func (o *Options) Validate() error {
	if o.Key.IsZero() {
		return errors.New("a tunnel needs a private key")
	}
	if (o.TUN == nil) == (o.Device == nil) {
		return errors.New("a tunnel needs either a tun device or a wireguard device outside this process")
	}
	if o.Device != nil {
		o.Window = 0 // nothing waits here
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Tunnel is one WireGuard device on one UDP socket.
type Tunnel struct {
	log    *slog.Logger
	device wireGuard
	bind   *bind
	relays *relays
	port   uint16
	tasks  sync.WaitGroup
	quit   chan struct{} // closed by Close
	crowd  *crowd
	mapper atomic.Pointer[mapper] // what the NAT in front does
	public func(netip.Addr) bool  // [public], but in tests

	mu        sync.RWMutex // guards what follows
	key       wire.PrivateKey
	sessions  map[string]*Peer
	checkers  map[string]*Peer // by the USERNAME of their checks
	indexes   map[uint32]*Peer // by the prefix of our checks' ids
	keys      map[wire.Key]*Peer
	owners    map[netip.Prefix]*Peer // of allowed IPs: who came last
	reflexive map[nat.TxID]chan<- netip.AddrPort
	bindKeys  map[wire.Key]relay.BindKey // by the relay's key
	lastIndex uint32
	closed    bool
}

// New opens the socket and starts the device.
func New(opts Options) (*Tunnel, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	t := &Tunnel{
		log:       opts.Logger,
		key:       opts.Key,
		sessions:  map[string]*Peer{},
		checkers:  map[string]*Peer{},
		indexes:   map[uint32]*Peer{},
		keys:      map[wire.Key]*Peer{},
		owners:    map[netip.Prefix]*Peer{},
		quit:      make(chan struct{}),
		reflexive: map[nat.TxID]chan<- netip.AddrPort{},
		bindKeys:  map[wire.Key]relay.BindKey{},
		crowd:     newCrowd(),
		public:    public,
	}
	t.mapper.Store(&mapper{})
	t.relays = newRelays(t, opts.Relays)
	in, out := newWindow(opts.Window), newWindow(opts.Window)
	t.bind = &bind{stun: t.handleSTUN, side: newSideEntrance(), find: t.session, in: in, out: out}
	if opts.Turns {
		t.bind.turns = newTurns(t.owner)
	}
	var err error
	if opts.Device != nil {
		t.device, err = newOutside(&opts, t.bind)
	} else {
		t.device, err = newInside(&opts, t.bind)
	}
	if err != nil {
		return nil, err
	}
	t.port = t.bind.port()
	t.tasks.Go(t.watchDozing)
	return t, nil
}

// deviceLogger passes the device's own messages on, at most a few a second: some come from packet paths.
func deviceLogger(log *slog.Logger) *device.Logger {
	limit := rate.NewLimiter(1, 10)
	at := func(level slog.Level) func(string, ...any) {
		return func(format string, args ...any) {
			if log.Enabled(context.Background(), level) && limit.Allow() {
				log.Log(context.Background(), level, "wireguard", "detail", fmt.Sprintf(format, args...))
			}
		}
	}
	return &device.Logger{Verbosef: at(slog.LevelDebug), Errorf: at(slog.LevelWarn)}
}

// Close ends all peers, the device, its TUN and the socket, and waits for every goroutine.
func (t *Tunnel) Close() error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	t.closed = true
	close(t.quit)
	peers := make([]*Peer, 0, len(t.sessions))
	for _, p := range t.sessions {
		peers = append(peers, p)
	}
	t.mu.Unlock()
	for _, p := range peers {
		p.close()
	}
	t.relays.close()
	t.device.close()
	t.tasks.Wait()
	return nil
}

// Port is the UDP port in use.
func (t *Tunnel) Port() uint16 { return t.port }

// PublicKey is the device's public key.
func (t *Tunnel) PublicKey() wire.Key {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.key.Public()
}

// SetKey changes the device's key. All peers must have been removed.
func (t *Tunnel) SetKey(key wire.PrivateKey) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.sessions) > 0 {
		return errors.New("a tunnel with peers keeps its key")
	}
	if err := t.device.setKey(key); err != nil {
		return fmt.Errorf("set the device's key: %w", err)
	}
	t.key = key
	clear(t.bindKeys)
	return nil
}

// bindKey gives the key between this tunnel and a relay.
func (t *Tunnel) bindKey(relayKey wire.Key) (relay.BindKey, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if key, ok := t.bindKeys[relayKey]; ok {
		return key, nil
	}
	key, err := relay.DeriveBindKey(t.key, relayKey)
	if err != nil {
		return key, err
	}
	if len(t.bindKeys) >= 4*wire.MaxRelays {
		clear(t.bindKeys)
	}
	t.bindKeys[relayKey] = key
	return key, nil
}

// Refresh asks every relay and checks every path at once. It is to be called when the local network has changed.
func (t *Tunnel) Refresh() {
	t.relays.refresh()
	t.mu.RLock()
	peers := slices.Collect(maps.Values(t.sessions))
	t.mu.RUnlock()
	for _, p := range peers {
		p.Refresh()
	}
}

// AddPeer adds a peer and starts checking its candidates at once.
func (t *Tunnel) AddPeer(opts PeerOptions) (*Peer, error) {
	if opts.Key.IsZero() || opts.Session == "" || len(opts.Session) > 64 {
		return nil, errors.New("a peer needs a key and a session of at most 64 characters")
	}
	p, err := t.register(opts)
	if err != nil {
		return nil, fmt.Errorf("add the peer of session %s: %w", opts.Session, err)
	}
	if !p.asleep.Load() {
		if err := t.device.addPeer(p); err != nil {
			t.RemovePeer(p)
			return nil, fmt.Errorf("add the peer of session %s: %w", opts.Session, err)
		}
	}
	if opts.Initiate {
		p.initiate()
	}
	t.listen(p)
	p.AddCandidates(opts.Candidates)
	p.AddRelays(opts.Relays)
	return p, nil
}

// register makes a peer known to the receive path.
func (t *Tunnel) register(opts PeerOptions) (*Peer, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	own := t.key.Public()
	p := &Peer{tunnel: t, opts: opts, name: checkName(opts.Session, own), allowed: opts.AllowedIPs}
	p.engine = engine{lead: opts.Initiate, most: DefaultMTU, onChange: p.changed, onDrop: p.dropped, succeeded: p.succeeded}
	p.punch = newPunch(opts.Initiate, t.crowd)
	p.turn.peer = p
	p.handshake.done = make(chan struct{})
	p.mtu.Store(StartMTU)
	p.seq = uint64(time.Now().UnixMicro()) // so that a session that is added again goes on where it was
	var err error
	if p.key, err = checkKey(t.key, opts.Key, opts.Session); err != nil {
		return nil, err
	}
	switch {
	case t.closed:
		return nil, errors.New("the tunnel is closed")
	case t.sessions[opts.Session] != nil:
		return nil, errors.New("the session has a peer already")
	case t.keys[opts.Key] != nil:
		return nil, errors.New("the key has a peer already")
	}
	for t.lastIndex++; t.indexes[t.lastIndex] != nil; t.lastIndex++ {
	}
	p.index = t.lastIndex
	p.synthetic = syntheticAddr(p.index)
	t.indexes[p.index] = p
	t.sessions[opts.Session], t.keys[opts.Key] = p, p
	_, here := t.device.(*inside)
	if here && !opts.Initiate {
		p.asleep.Store(true)
		for _, prefix := range opts.AllowedIPs {
			t.owners[prefix] = p
		}
	}
	return p, nil
}

// listen lets a peer's checks in. Until then nothing can start a handshake, which a device that does not quite have the
// peer yet would lose, or begin twice.
func (t *Tunnel) listen(p *Peer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.sessions[p.opts.Session] == p {
		t.checkers[checkName(p.opts.Session, p.opts.Key)] = p
	}
}

// syntheticAddr gives the nth address of a documentation prefix (RFC 3849), which no packet ever carries.
func syntheticAddr(n uint32) netip.Addr {
	a := [16]byte{0x20, 0x01, 0x0d, 0xb8}
	binary.BigEndian.PutUint32(a[12:], n)
	return netip.AddrFrom16(a)
}

// checkName is the USERNAME of checks that the holder of key sends in a session.
func checkName(session string, key wire.Key) string { return session + ":" + key.String()[:8] }

// checkKey derives what authenticates the checks of a session: HKDF-SHA256 (RFC 5869) over the X25519 secret of the two
// WireGuard keys. Only the two ends can compute it.
func checkKey(own wire.PrivateKey, peer wire.Key, session string) ([]byte, error) {
	secret, err := own.Shared(peer)
	if err != nil {
		return nil, fmt.Errorf("agree on a check key: %w", err)
	}
	return hkdf.Key(sha256.New, secret, nil, "culvert path check v1 "+session, sha256.Size)
}

// RemovePeer ends a peer; nothing of it is accepted afterwards. It is idempotent.
func (t *Tunnel) RemovePeer(p *Peer) {
	t.mu.Lock()
	known := t.sessions[p.opts.Session] == p
	if known {
		delete(t.sessions, p.opts.Session)
		delete(t.checkers, checkName(p.opts.Session, p.opts.Key))
		delete(t.indexes, p.index)
	}
	t.mu.Unlock()
	if !known {
		return
	}
	p.close()
	p.dozing.Lock()
	t.device.removePeer(p)
	p.dozing.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.keys, p.opts.Key)
	for _, prefix := range p.opts.AllowedIPs {
		if t.owners[prefix] == p {
			delete(t.owners, prefix)
		}
	}
}

// owner gives the peer that has an address inside the tunnel; nil if none has.
func (t *Tunnel) owner(a netip.Addr) *Peer {
	if !a.IsValid() {
		return nil
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.owners[netip.PrefixFrom(a, a.BitLen())]
}

func (t *Tunnel) session(id string) *Peer {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.sessions[id]
}
