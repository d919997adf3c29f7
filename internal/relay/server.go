package relay

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/udpconn"
	"github.com/culvertnet/culvert/internal/wire"
)

// Options configure a [Server].
type Options struct {
	UDP   string              // address for STUN and relaying, such as ":3478"; empty for none: WebSockets alone
	Probe string              // second address, on which only STUN is answered, so that a NAT's mapping shows; empty for none
	Keys  []ed25519.PublicKey // of the coordinators whose tickets are taken; at least one; see [Server.SetKeys]

	Sockets   int    // on UDP, each with its own reader; default one for each CPU, at most 8
	Buffer    int    // bytes that the kernel may hold for each socket in each direction; default [udpconn.DefaultBuffer]
	Sessions  int    // at once; default [DefaultSessions]
	Rate      uint64 // bytes a second from one side of one session at most; default [DefaultRate]
	FlowQueue int    // bytes of one session that may wait on a WebSocket; default [DefaultFlowQueue]
	Queue     int    // bytes that may wait on one WebSocket; default [DefaultQueue]
	Links     int    // WebSockets at once; default [DefaultLinks]
	Logger    *slog.Logger

	// Remote tells a WebSocket's source, where proxies stand before this relay. Defaults to the connection's other end.
	Remote func(*http.Request) netip.Addr
}

// Defaults and bounds of [Options].
const (
	DefaultSessions = 100_000
	DefaultRate     = 625_000_000 // 5 Gbit/s
	DefaultLinks    = 20_000
	MinRate         = 10_000 // bytes a second
	maxSockets      = 8

	// rateBurst is how far a session may be ahead of its rate.
	rateBurst = 50 * time.Millisecond
)

// Validate fills defaults.
func (o *Options) Validate() error {
	if err := checkKeys(o.Keys); err != nil {
		return err
	}
	orElse(&o.Sockets, min(runtime.GOMAXPROCS(0), maxSockets))
	orElse(&o.Buffer, udpconn.DefaultBuffer)
	orElse(&o.Sessions, DefaultSessions)
	orElse(&o.Rate, DefaultRate)
	orElse(&o.FlowQueue, DefaultFlowQueue)
	orElse(&o.Queue, max(DefaultQueue, o.FlowQueue))
	orElse(&o.Links, DefaultLinks)
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.Remote == nil {
		o.Remote = remoteAddr
	}
	switch {
	case o.Sockets < 1 || o.Sockets > 64 || o.Buffer < 0 || o.Sessions < 1 || o.Links < 1:
		return errors.New("a relay's limits are positive numbers, and it has at most 64 sockets")
	case o.Rate < MinRate:
		return fmt.Errorf("a relay's rate is at least %d bytes a second", MinRate)
	case o.FlowQueue < maxRun || o.Queue < o.FlowQueue:
		return fmt.Errorf("a relay's queue takes at least %d bytes of a session, and as many in all", maxRun)
	}
	if runtime.GOOS != "linux" {
		o.Sockets = 1
	}
	return nil
}

func checkKeys(keys []ed25519.PublicKey) error {
	if len(keys) == 0 {
		return errors.New("a relay needs the public key of a coordinator")
	}
	for _, k := range keys {
		if len(k) != ed25519.PublicKeySize {
			return fmt.Errorf("a coordinator's public key has %d bytes, not %d", len(k), ed25519.PublicKeySize)
		}
	}
	return nil
}

func remoteAddr(r *http.Request) netip.Addr {
	a, _ := netip.ParseAddrPort(r.RemoteAddr)
	return a.Addr()
}

func orElse[T comparable](v *T, otherwise T) {
	var zero T
	if *v == zero {
		*v = otherwise
	}
}

// Server is a relay.
//
//	New ──► serving: UDP readers, WebSockets through ServeHTTP, expiry ──► Close: all ended and waited for
type Server struct {
	opts    Options
	log     *slog.Logger
	private wire.PrivateKey // new at every start: a changed key tells sides that the relay has forgotten them
	public  wire.Key
	keys    atomic.Pointer[[]ed25519.PublicKey]
	nonces  *nonces
	guard   *guard
	table   table
	ports   []*port
	probe   *nat.Server
	counts  counts // of WebSockets; each port has its own

	stop    context.CancelFunc
	running sync.WaitGroup
	mu      sync.Mutex // guards what follows
	links   map[*link]struct{}
	unbound map[netip.Addr]int // WebSockets without a binding, by source; not those that stand
	// standing are WebSockets that may stay without one, by the key of their standing ticket, the oldest first.
	standing map[wire.Key][]*link
	closed   bool
}

// New opens the sockets and serves until Close. WebSockets come in through [Server.ServeHTTP].
func New(ctx context.Context, opts Options) (_ *Server, err error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	s := &Server{
		opts: opts, log: opts.Logger, nonces: newNonces(), guard: newGuard(),
		table: table{limit: opts.Sessions}, links: map[*link]struct{}{}, unbound: map[netip.Addr]int{},
		standing: map[wire.Key][]*link{},
	}
	if s.private, err = wire.NewPrivateKey(); err != nil {
		return nil, err
	}
	s.public = s.private.Public()
	s.keys.Store(&opts.Keys)
	ctx, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	if err := s.open(ctx); err != nil {
		_ = s.Close()
		return nil, err
	}
	s.running.Go(func() { s.keep(ctx) })
	return s, nil
}

// open opens the sockets and starts their readers.
func (s *Server) open(ctx context.Context) (err error) {
	if s.opts.UDP != "" {
		if err := s.openPorts(ctx); err != nil {
			return err
		}
	}
	if s.opts.Probe != "" {
		if s.probe, err = nat.Listen(ctx, nat.ServerOptions{Addr: s.opts.Probe, Logger: s.log}); err != nil {
			return err
		}
	}
	for _, p := range s.ports {
		s.running.Go(p.read)
	}
	return nil
}

// openPorts opens several sockets on one port. The kernel chooses one by the peer's address, so the packets of a peer keep
// their order, and a bind comes before the frames that follow it.
func (s *Server) openPorts(ctx context.Context) error {
	addr := s.opts.UDP
	if err := s.alone(ctx); err != nil {
		return err
	}
	for range s.opts.Sockets {
		c, err := udpconn.Listen(ctx, udpconn.Options{Addr: addr, ReusePort: s.opts.Sockets > 1, Buffer: s.opts.Buffer})
		if err != nil {
			return err
		}
		s.ports = append(s.ports, newPort(s, c))
		addr = s.addrFor(c.LocalAddr())
	}
	if k := s.ports[0].conn.Stats(); k.ReceiveBuffer > 0 && k.ReceiveBuffer < s.opts.Buffer {
		s.log.Warn("the kernel gives UDP sockets less buffer than asked for; bursts may be dropped",
			"asked", s.opts.Buffer, "receive", k.ReceiveBuffer, "send", k.SendBuffer,
			"next", fmt.Sprintf("set the sysctls net.core.rmem_max and net.core.wmem_max to %d", s.opts.Buffer))
	}
	return nil
}

// alone fails where another process has the port: sockets that share it would let us in beside it, and half of the packets
// would go there.
func (s *Server) alone(ctx context.Context) error {
	c, err := udpconn.Listen(ctx, udpconn.Options{Addr: s.opts.UDP})
	if err != nil {
		return err
	}
	return c.Close()
}

// addrFor is where the next socket of the group is bound: what the first one got.
func (s *Server) addrFor(got netip.AddrPort) string {
	if got.Addr().IsUnspecified() {
		return fmt.Sprintf(":%d", got.Port()) // both families, as with the first
	}
	return got.String()
}

// keep rotates the nonces' secret and expires sessions.
func (s *Server) keep(ctx context.Context) {
	rotate, expire := time.NewTicker(NonceLife), time.NewTicker(expireEvery)
	defer rotate.Stop()
	defer expire.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-rotate.C:
			s.nonces.rotate()
		case now := <-expire.C:
			s.table.expire(now.UnixNano(), s.release)
		}
	}
}

// SetKeys replaces the coordinators' public keys. Tickets that are in use stay so until they end.
func (s *Server) SetKeys(keys []ed25519.PublicKey) error {
	if err := checkKeys(keys); err != nil {
		return err
	}
	s.keys.Store(&keys)
	return nil
}

// Addr is the UDP address, not valid where there is none.
func (s *Server) Addr() netip.AddrPort {
	if len(s.ports) == 0 {
		return netip.AddrPort{}
	}
	return s.ports[0].conn.LocalAddr()
}

// ProbeAddr is the second address for STUN, not valid where there is none.
func (s *Server) ProbeAddr() netip.AddrPort {
	if s.probe == nil {
		return netip.AddrPort{}
	}
	a, _ := netip.ParseAddrPort(s.probe.Addr().String())
	return a
}

// ServeHTTP takes WebSockets on [wire.PathRelay]. It returns once one is open, which then lives on until it ends, at the
// latest with Close: so nothing of the request is kept as long as that.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	l := s.newLink(s.opts.Remote(r))
	if l == nil {
		w.Header().Set("Retry-After", "5")
		http.Error(w, "this relay takes no more connections", http.StatusServiceUnavailable)
		return
	}
	socket, err := acceptSocket(w, r)
	if err != nil {
		s.log.Debug("relay websocket refused", "remote", r.RemoteAddr, "err", err)
		s.drop(l)
		return
	}
	go func() {
		defer s.drop(l)
		l.ended(l.serve(socket))
	}()
}

// ended logs why a link has ended.
//
//go:noinline
func (l *link) ended(err error) {
	if err != nil {
		l.server.log.Debug("relay websocket ended", "source", l.source, "err", err)
	}
}

// newLink makes room for a WebSocket, nil where there is none. It counts as running until drop.
func (s *Server) newLink(remote netip.Addr) *link {
	s.mu.Lock()
	defer s.mu.Unlock()
	source := sourceOf(remote)
	if s.closed || len(s.links) >= s.opts.Links || s.unbound[source] >= maxUnbound {
		return nil
	}
	l := newLink(s, source)
	s.links[l] = struct{}{}
	s.unbound[source]++
	s.running.Add(1)
	return l
}

// maxUnbound is how many WebSockets without a binding one source may have.
const maxUnbound = 64

// countUnbound counts a WebSocket that has become bound (-1) or unbound (+1).
func (s *Server) countUnbound(source netip.Addr, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unbound[source] += n; s.unbound[source] == 0 {
		delete(s.unbound, source)
	}
}

// drop takes a WebSocket that has ended out of the count.
func (s *Server) drop(l *link) {
	defer s.running.Done()
	l.leave()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.links, l)
	s.noLongerStanding(l)
}

// Close ends everything and waits. Sides on WebSockets are told. Only the first call does anything.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		s.running.Wait()
		return nil
	}
	s.closed = true
	links := make([]*link, 0, len(s.links))
	for l := range s.links {
		links = append(links, l)
	}
	s.mu.Unlock()
	s.stop()
	var errs []error
	for _, p := range s.ports {
		errs = append(errs, p.conn.Close())
	}
	if s.probe != nil {
		errs = append(errs, s.probe.Close())
	}
	for _, l := range links {
		s.running.Go(func() { l.end(closeGoingAway, "the relay stops") })
	}
	s.running.Wait()
	return errors.Join(errs...)
}
