// Package forward carries flows out of the tunnel into the private network: TCP, UDP and ICMP echo, each checked against
// its session's grant before anything is dialled.
//
// A packet's source address is authenticated by WireGuard, so source → session → grant is one lookup: an unknown source
// is dropped before the network stack sees the packet, and a flow to a destination outside the grant is refused at once
// (TCP: reset; UDP and ICMP: administratively prohibited). TCP completes the job's handshake only once the target has
// accepted, so that a target that refuses or does not answer looks to the job as it is. A flow to a service address leads to
// the name behind it, see package names: the name is held against the grant, then the address that it resolves to.
//
// A flow's life, whatever its protocol:
//
//	open (counted, in its session's table) → dial → carry → close
//	                       └── reset: Remove, SetScope, idle, Close ──┘
//
// Every flow is traced when it ends, and one that was turned away at once.
package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/culvertnet/culvert/gateway/names"
	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/wire"
)

// Options configure a [Forwarder].
type Options struct {
	Device *netstack.Device // with Forward set
	Local  []netip.Addr     // the gateway's overlay addresses: served by the gateway, never forwarded
	// Ranges are where services have their addresses, Resolver resolves the names behind them. Without a range no name is
	// reached.
	Ranges   names.Ranges
	Resolver *names.Resolver
	// Trace is told of every flow that ended, that lives long, or that was turned away; it must not block. Nil for nobody.
	Trace  func(wire.FlowRecord)
	Limits Limits
	Logger *slog.Logger
}

// Validate checks the options and fills in defaults.
func (o *Options) Validate() error {
	if o.Device == nil {
		return errors.New("a forwarder needs a device")
	}
	if o.Ranges.Prefixes() != nil && o.Resolver == nil {
		return errors.New("a forwarder with service addresses needs a resolver")
	}
	if o.Trace == nil {
		o.Trace = func(wire.FlowRecord) {}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o.Limits.validate()
}

// Forwarder forwards the flows of all sessions.
type Forwarder struct {
	device   *netstack.Device
	stack    *stack.Stack
	limits   Limits
	log      *slog.Logger
	local    map[netip.Addr]struct{}
	ranges   names.Ranges
	resolver *names.Resolver
	trace    func(wire.FlowRecord)
	tcp      *tcp.Forwarder
	decide   func(*policy.Scope, policy.Flow) policy.Verdict                 // (*policy.Scope).Decide, but in tests
	dial     func(context.Context, string, netip.AddrPort) (net.Conn, error) // [dial], but in tests

	requests requests
	sources  sources
	purse    purse
	flows    atomic.Int64  // open in all
	busy     atomic.Int64  // sessions with an open flow
	hungry   census        // sessions that want to send faster
	pace     pace          // of all flows
	turns    *turns        // of what comes from the jobs
	numbers  atomic.Uint64 // of flows

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
		ranges:   opts.Ranges,
		resolver: opts.Resolver,
		trace:    opts.Trace,
		decide:   (*policy.Scope).Decide,
		dial:     dial,
		purse:    purse{limit: opts.Limits.TotalBytes},
		turns:    newTurns(turnFrom, turnTotal),
		sessions: make(map[*Session]struct{}),
	}
	for _, a := range opts.Local {
		f.local[a] = struct{}{}
	}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.tcp = tcp.NewForwarder(f.stack, 0, f.limits.TotalFlows+1, f.serveTCP)
	f.device.SetFilter(func(src netip.Addr) bool { return f.session(src) != nil })
	f.device.SetGate(f.mayAsk)
	f.device.SetWatch(&netstack.Watch{Asked: f.clearStale, Answered: f.noteAnswer})
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
	f.work.Wait()
	f.device.SetWatch(nil)
	f.device.SetGate(nil)
	return nil
}

// Add makes a session known: packets from its addresses are held against scope. Unknown sources are dropped.
func (f *Forwarder) Add(id string, addrs []netip.Addr, scope *policy.Scope) (*Session, error) {
	if scope == nil || len(addrs) == 0 {
		return nil, fmt.Errorf("session %s needs addresses and a scope", id)
	}
	for _, a := range addrs {
		if f.isLocal(a) || !a.IsValid() {
			return nil, fmt.Errorf("session %s cannot have the address %v", id, a)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, errors.New("the forwarder is closed")
	}
	s := f.newSession(id, addrs, scope)
	if err := f.sources.add(s); err != nil {
		s.cancel()
		return nil, err
	}
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
	f.sources.remove(s)
	f.mu.Unlock()
	s.end()
}

// Find gives the session of a source address; nil if there is none.
func (f *Forwarder) Find(src netip.Addr) *Session { return f.session(src) }

// session finds the session of a source address; nil if there is none. It takes no lock.
func (f *Forwarder) session(src netip.Addr) *Session { return f.sources.find(src) }

// mayAsk lets packets pass but for those to the gateway itself of a session that sends too many: what its services have in common, queues and
// goroutines, is everybody's.
func (f *Forwarder) mayAsk(src, dst netip.Addr) bool {
	if !f.isLocal(dst) {
		return true
	}
	s := f.session(src)
	return s != nil && s.asks.Allow()
}

func (f *Forwarder) isLocal(a netip.Addr) bool {
	_, local := f.local[a]
	return local
}

// room takes a place for a flow of a session that has open ones. The last quarter of the places is for sessions with less than
// an equal share, so that a few greedy ones do not shut out the others.
func (f *Forwarder) room(open int) bool {
	total, n := int64(f.limits.TotalFlows), f.flows.Add(1)
	share := total / (f.busy.Load() + 1)
	if n <= total-total/4 || n <= total && int64(open) < share {
		return true
	}
	f.flows.Add(-1)
	return false
}

// Load is what the process's flows take at the moment.
type Load struct {
	Flows    int64 // open
	Sessions int64 // with an open flow
	Lent     int64 // bytes of buffers beyond the flows' floors
}

// Load reads what the process's flows take.
func (f *Forwarder) Load() Load {
	return Load{Flows: f.flows.Load(), Sessions: f.busy.Load(), Lent: f.purse.lent.Load()}
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
		for _, fl := range s.open() {
			fl.look(now)
		}
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
