// Package forward carries flows out of the tunnel into the private network: TCP, UDP and ICMP echo, each checked against
// its session's grant before anything is dialled.
//
// A packet's source address is authenticated by WireGuard, so source → session → grant is one lookup: an unknown source
// is dropped before the network stack sees the packet, and a flow to a destination outside the grant is refused at once
// (TCP: reset; UDP and ICMP: administratively prohibited). TCP completes the job's handshake only once the target has
// accepted, so that a target that refuses or does not answer looks to the job as it is.
//
// A flow's life, whatever its protocol:
//
//	open (counted, in its session's table) → dial → carry → close
//	                       └── reset: Remove, SetScope, idle, Close ──┘
package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/policy"
)

// Limits bound what one session and the process may do.
type Limits struct {
	SessionFlows int           // open flows of one session; default 4096
	SessionRate  int           // new flows a second of one session, with a burst of as many; default 1000
	TotalFlows   int           // open flows in all; default 65536
	DialTimeout  time.Duration // default 10 s
	UDPIdle      time.Duration // default 60 s; ICMP echo as well
	TCPIdle      time.Duration // default 2 h without data, whether or not keepalive probes are answered
}

func (l *Limits) validate() error {
	if l.SessionFlows < 0 || l.SessionRate < 0 || l.TotalFlows < 0 || l.DialTimeout < 0 || l.UDPIdle < 0 || l.TCPIdle < 0 {
		return errors.New("a limit on flows cannot be negative")
	}
	setDefault(&l.SessionFlows, 4096)
	setDefault(&l.SessionRate, 1000)
	setDefault(&l.TotalFlows, 65536)
	setDefault(&l.DialTimeout, 10*time.Second)
	setDefault(&l.UDPIdle, time.Minute)
	setDefault(&l.TCPIdle, 2*time.Hour)
	return nil
}

func setDefault[T int | time.Duration](v *T, to T) {
	if *v == 0 {
		*v = to
	}
}

// Options configure a [Forwarder].
type Options struct {
	Device *netstack.Device // with Forward set
	Local  []netip.Addr     // the gateway's overlay addresses: served by the gateway, never forwarded
	Limits Limits
	Logger *slog.Logger
}

// Validate checks the options and fills in defaults.
func (o *Options) Validate() error {
	if o.Device == nil {
		return errors.New("a forwarder needs a device")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o.Limits.validate()
}

// Forwarder forwards the flows of all sessions.
type Forwarder struct {
	device *netstack.Device
	stack  *stack.Stack
	limits Limits
	log    *slog.Logger
	local  map[netip.Addr]struct{}
	tcp    *tcp.Forwarder
	decide func(*policy.Scope, policy.Flow) policy.Verdict // (*policy.Scope).Decide, but in tests

	// sources is read for every batch of packets and copied on write.
	sources atomic.Pointer[map[netip.Addr]*Session]
	flows   atomic.Int64
	wide    atomic.Int64 // flows with a large send buffer

	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu       sync.Mutex
	sessions map[*Session]struct{}
	closed   bool
}

// New installs the handlers on the device's stack.
func New(opts Options) (*Forwarder, error) {
	if err := opts.Validate(); err != nil {
		return nil, fmt.Errorf("set up the forwarder: %w", err)
	}
	f := &Forwarder{
		device:   opts.Device,
		stack:    opts.Device.Stack(),
		limits:   opts.Limits,
		log:      opts.Logger,
		local:    make(map[netip.Addr]struct{}),
		decide:   (*policy.Scope).Decide,
		sessions: make(map[*Session]struct{}),
	}
	for _, a := range opts.Local {
		f.local[a] = struct{}{}
	}
	f.sources.Store(&map[netip.Addr]*Session{})
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.tcp = tcp.NewForwarder(f.stack, 0, f.limits.TotalFlows+1, f.serveTCP)
	f.device.SetFilter(func(src netip.Addr) bool { return f.session(src) != nil })
	f.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, f.handleTCP)
	f.stack.SetTransportProtocolHandler(udp.ProtocolNumber, f.handleUDP)
	f.stack.SetTransportProtocolHandler(icmp.ProtocolNumber4, f.handleICMP4)
	f.stack.SetTransportProtocolHandler(icmp.ProtocolNumber6, f.handleICMP6)
	f.work.Go(f.sweepIdle)
	return f, nil
}

// Close resets all flows and waits.
func (f *Forwarder) Close() error {
	f.mu.Lock()
	f.closed = true
	sessions := make([]*Session, 0, len(f.sessions))
	for s := range f.sessions {
		sessions = append(sessions, s)
	}
	f.mu.Unlock()
	for _, s := range sessions {
		f.Remove(s)
	}
	f.cancel()
	done := make(chan struct{})
	go func() {
		f.work.Wait()
		close(done)
	}()
	for {
		select {
		case <-done:
			return nil
		case <-time.After(closeRetry): // a handshake that has just begun has an endpoint only now
			f.abortEndpoints(func(_, local netip.Addr) bool { return !f.isLocal(local) })
		}
	}
}

const closeRetry = 20 * time.Millisecond

// Add makes a session known: packets from its addresses are held against scope. Unknown sources are dropped.
func (f *Forwarder) Add(id string, addrs []netip.Addr, scope *policy.Scope) (*Session, error) {
	if scope == nil || len(addrs) == 0 {
		return nil, fmt.Errorf("session %s needs addresses and a scope", id)
	}
	s := &Session{
		id: id, addrs: append([]netip.Addr(nil), addrs...), f: f, scope: scope,
		limiter: rate.NewLimiter(rate.Limit(f.limits.SessionRate), f.limits.SessionRate),
		errors:  rate.NewLimiter(errorRate, errorRate),
		denials: rate.NewLimiter(denialRate, denialBurst),
		flows:   make(map[flowKey]*flow),
	}
	s.ctx, s.cancel = context.WithCancel(f.ctx)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		s.cancel()
		return nil, errors.New("the forwarder is closed")
	}
	next := f.copySources()
	for _, a := range addrs {
		if _, taken := next[a]; taken || f.isLocal(a) || !a.IsValid() {
			s.cancel()
			return nil, fmt.Errorf("address %v of session %s is in use", a, id)
		}
		next[a] = s
	}
	f.sources.Store(&next)
	f.sessions[s] = struct{}{}
	return s, nil
}

// Remove ends a session: its flows are reset and nothing from its addresses is taken. It is idempotent.
func (f *Forwarder) Remove(s *Session) {
	f.mu.Lock()
	if _, known := f.sessions[s]; !known {
		f.mu.Unlock()
		return
	}
	delete(f.sessions, s)
	next := f.copySources()
	for _, a := range s.addrs {
		delete(next, a)
	}
	f.sources.Store(&next)
	f.mu.Unlock()
	s.end()
	f.abortEndpoints(func(remote, _ netip.Addr) bool { return s.has(remote) })
}

// abortEndpoints resets what the stack still holds besides flows: handshakes under way, connections that are being
// closed, connections to the gateway itself.
func (f *Forwarder) abortEndpoints(gone func(remote, local netip.Addr) bool) {
	for _, ep := range append(f.stack.RegisteredEndpoints(), f.stack.CleanupEndpoints()...) {
		e, ok := ep.(tcpip.Endpoint)
		if !ok {
			continue
		}
		info, ok := e.Info().(*stack.TransportEndpointInfo)
		if !ok {
			continue
		}
		remote, local := endpoints(info.ID)
		if gone(remote.Addr(), local.Addr()) {
			e.Abort()
		}
	}
}

func (f *Forwarder) copySources() map[netip.Addr]*Session {
	now := *f.sources.Load()
	next := make(map[netip.Addr]*Session, len(now)+2)
	for a, s := range now {
		next[a] = s
	}
	return next
}

// session finds the session of a source address; nil if there is none. It takes no lock.
func (f *Forwarder) session(src netip.Addr) *Session { return (*f.sources.Load())[src] }

func (f *Forwarder) isLocal(a netip.Addr) bool {
	_, local := f.local[a]
	return local
}

// sweepIdle resets flows that have been idle for too long.
func (f *Forwarder) sweepIdle() {
	tick := time.NewTicker(min(max(min(f.limits.UDPIdle, f.limits.TCPIdle)/4, 100*time.Millisecond), 15*time.Second))
	defer tick.Stop()
	for {
		select {
		case <-f.ctx.Done():
			return
		case now := <-tick.C:
			f.sweep(now)
		}
	}
}

func (f *Forwarder) sweep(now time.Time) {
	f.mu.Lock()
	sessions := make([]*Session, 0, len(f.sessions))
	for s := range f.sessions {
		sessions = append(sessions, s)
	}
	f.mu.Unlock()
	for _, s := range sessions {
		s.resetIf(func(fl *flow) bool { return fl.idleSince(now) > fl.idle })
	}
}

// endpoints turns the stack's 4-tuple around: from the job's address to its destination.
func endpoints(id stack.TransportEndpointID) (src, dst netip.AddrPort) {
	s, _ := netip.AddrFromSlice(id.RemoteAddress.AsSlice())
	d, _ := netip.AddrFromSlice(id.LocalAddress.AsSlice())
	return netip.AddrPortFrom(s, id.RemotePort), netip.AddrPortFrom(d, id.LocalPort)
}

// protoName is the word for a protocol in logs.
func protoName(p policy.Proto) string {
	switch p {
	case policy.TCP:
		return "tcp"
	case policy.UDP:
		return "udp"
	}
	return "icmp"
}

// quoteOf copies the headers of a packet for an ICMP error about it (RFC 1812, section 4.3.2.3, allows more; eight bytes
// behind the IP header are what every host needs).
func quoteOf(pkt *stack.PacketBuffer) []byte {
	ip, tp := pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice()
	quote := make([]byte, 0, len(ip)+len(tp))
	return append(append(quote, ip...), tp[:min(len(tp), header.TCPHeaderMaximumSize)]...)
}
