// Package netstack is a TUN device that ends in gVisor's network stack instead of the kernel: batched, with segmentation
// and receive offload, for the gateway and for the client's rootless mode.
//
// One packet's way, both directions without an allocation for each packet:
//
//	stack → WritePackets → outbound queue (bounded in bytes) → Read: join neighbours of a flow, split at the MTU → WireGuard
//	WireGuard → Write: check the source, merge contiguous segments of a flow, copy once → stack
//
// The stack hands down TCP segments of up to 64 KiB with unfinished checksums (host GSO); Read finishes them while it
// copies them into WireGuard's buffers. Write does the opposite: what it has merged, it has also checked.
package netstack

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

const (
	// DefaultMTU leaves room for WireGuard and an outer IPv6 header in 1,500 bytes.
	DefaultMTU = 1420
	minMTU     = 1280 // RFC 8200, section 5
	maxMTU     = 65535 - 80
	batchSize  = 128 // packets a Read or Write takes at most; conn.IdealBatchSize of wireguard-go
	nicID      = tcpip.NICID(1)
)

// Buffers and timers of the stack's TCP.
const (
	bufferMin     = 4 << 10
	bufferDefault = 1 << 20
	// forwardBuffer is what a forwarded connection's receive buffer begins with, before whoever carries it has heard of it: half of that is promised to
	// the job, for good. Enough for how a sender on a long path begins.
	forwardBuffer = 256 << 10
	receiveMax    = 16 << 20         // 800 Mbit/s at 80 ms: half of it is promised
	sendMax       = 16 << 20         // the same: a writer is woken when half of it is free
	timeWait      = 10 * time.Second // a gateway closes many flows first; the port pair is the job's, not ours
	synRetries    = 5                // about a minute
	minRTO        = time.Second      // RFC 6298, section 2.4: downloads that begin at once delay each other by more than the 200 ms of the stack
)

// Options configure a [Device].
type Options struct {
	Addresses []netip.Addr // the stack's own addresses
	MTU       int          // default 1420
	Forward   bool         // take packets for any destination and answer from any source: the gateway
	Logger    *slog.Logger
}

// Validate checks the options and fills in defaults.
func (o *Options) Validate() error {
	if o.MTU == 0 {
		o.MTU = DefaultMTU
	}
	if o.MTU < minMTU || o.MTU > maxMTU {
		return fmt.Errorf("an MTU of %d is outside %d to %d", o.MTU, minMTU, maxMTU)
	}
	for _, a := range o.Addresses {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.Is4In6() || a.Zone() != "" {
			return fmt.Errorf("%v cannot be an address of a network stack", a)
		}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Device is a tun.Device backed by a network stack.
type Device struct {
	opts   Options
	stack  *stack.Stack
	link   *link
	events chan tun.Event

	// Reading side; readMu because a splitter carries over what a batch had no room for.
	readMu sync.Mutex
	path   atomic.Pointer[func(netip.Addr) int] // see [Device.SetPathMTU]
	ident  uint32                               // of fragments; Read's

	// Writing side.
	inbound  [2]stack.NetworkEndpoint // IPv4, IPv6
	mergers  sync.Pool                // of *merger
	filter   atomic.Pointer[func(netip.Addr) bool]
	gate     atomic.Pointer[func(src, dst netip.Addr) bool]
	pieces   *pieces
	watch    atomic.Pointer[Watch]
	writing  sync.RWMutex // held shared by Write, so that Close can wait for those under way
	counters counters

	addrMu    sync.Mutex
	addresses map[netip.Addr]struct{}

	closing sync.Once
	closed  atomic.Bool
}

var _ tun.Device = (*Device)(nil)

// New makes a device. Closing it closes every connection of the stack and waits for its goroutines.
func New(opts Options) (*Device, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	d := &Device{
		opts:      opts,
		stack:     newStack(opts),
		events:    make(chan tun.Event, 1),
		addresses: make(map[netip.Addr]struct{}),
		pieces:    newPieces(),
	}
	d.link = newLink(opts.MTU, d.newOutbound())
	d.mergers.New = func() any { return newMerger() }
	if err := d.setup(); err != nil {
		d.stack.Destroy()
		return nil, err
	}
	d.events <- tun.EventUp
	return d, nil
}

// newOutbound makes what waits between the stack and Read: on a gateway, a lane for each session.
func (d *Device) newOutbound() outbound {
	split := func() *splitter {
		return &splitter{mtu: d.opts.MTU, counters: &d.counters, path: &d.path, ident: &d.ident}
	}
	if d.opts.Forward {
		return newLanes(&d.counters, split)
	}
	return single{newQueue(queueLimit, queueReserve, queueWait, &d.counters), split()}
}

// newStack makes the stack itself. A forwarding stack must not short-cut packets between the addresses that it plays,
// and a target may be a loopback address that the gateway's own policy names, so loopback addresses are no Martians here.
func newStack(opts Options) *stack.Stack {
	return stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			ipv4.NewProtocolWithOptions(ipv4.Options{AllowExternalLoopbackTraffic: true}),
			ipv6.NewProtocolWithOptions(ipv6.Options{AllowExternalLoopbackTraffic: true}),
		},
		TransportProtocols: []stack.TransportProtocolFactory{
			tcp.NewProtocolCUBIC, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6,
		},
		HandleLocal: !opts.Forward,
	})
}

func (d *Device) setup() error {
	receive := bufferDefault
	if d.opts.Forward {
		receive = forwardBuffer
	}
	if err := tuneTCP(d.stack, receive); err != nil {
		return err
	}
	if err := d.stack.CreateNIC(nicID, d.link); err != nil {
		return fmt.Errorf("make the stack's interface: %v", err)
	}
	if d.opts.Forward {
		if err := d.stack.SetPromiscuousMode(nicID, true); err != nil {
			return fmt.Errorf("take packets for any address: %v", err)
		}
		if err := d.stack.SetSpoofing(nicID, true); err != nil {
			return fmt.Errorf("answer from any address: %v", err)
		}
	}
	d.stack.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	for i, proto := range []tcpip.NetworkProtocolNumber{ipv4.ProtocolNumber, ipv6.ProtocolNumber} {
		ep, err := d.stack.GetNetworkEndpoint(nicID, proto)
		if err != nil {
			return fmt.Errorf("find the stack's network endpoint: %v", err)
		}
		d.inbound[i] = ep
	}
	return d.SetAddresses(d.opts.Addresses)
}

// tuneTCP raises the buffers to what a long fat path needs and says outright what else throughput rests on: SACK and receive
// buffers that grow with the connection. RACK (RFC 8985) is off: in this version of gVisor a sender that has lost a whole window, as
// when a path dies under a download, then sends one segment for each retransmission timeout, or none, for good.
//
// The timeout forgets what was acknowledged out of order and sends the first segment again. When that is acknowledged, RACK finds the others
// lost and enters recovery, where sender.SetPipe goes by the forgotten acknowledgements alone, and not by RACK's marks: all that was
// lost counts as in flight, which is more than the window for as long as it has not been sent again. So each further segment takes a timeout.
func tuneTCP(s *stack.Stack, receive int) error {
	sack := tcpip.TCPSACKEnabled(true)
	recovery := tcpip.TCPRecovery(0)
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	snd := tcpip.TCPSendBufferSizeRangeOption{Min: bufferMin, Default: bufferDefault, Max: sendMax}
	rcv := tcpip.TCPReceiveBufferSizeRangeOption{Min: bufferMin, Default: receive, Max: receiveMax}
	wait := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	retries := tcpip.TCPSynRetriesOption(synRetries)
	timeout := tcpip.TCPMinRTOOption(minRTO)
	for _, opt := range []tcpip.SettableTransportProtocolOption{&sack, &recovery, &moderate, &snd, &rcv, &wait, &retries, &timeout} {
		if err := s.SetTransportProtocolOption(tcp.ProtocolNumber, opt); err != nil {
			return fmt.Errorf("set %T: %v", opt, err)
		}
	}
	return nil
}

// Stack is the network stack, for package forward.
func (d *Device) Stack() *stack.Stack { return d.stack }

// SetFilter makes Write drop packets from sources for which keep is false, before anything else looks at them. It is
// called from many goroutines and must not block; nil takes every source.
func (d *Device) SetFilter(keep func(netip.Addr) bool) {
	if keep == nil {
		d.filter.Store(nil)
		return
	}
	d.filter.Store(&keep)
}

// SetGate makes Write drop datagrams, and SYNs, for which pass is false, on a device that forwards. It is called like what [Device.SetFilter]
// takes; nil lets all pass.
func (d *Device) SetGate(pass func(src, dst netip.Addr) bool) {
	if pass == nil {
		d.gate.Store(nil)
		return
	}
	d.gate.Store(&pass)
}

// SetAddresses replaces the stack's own addresses.
func (d *Device) SetAddresses(addrs []netip.Addr) error {
	if err := (&Options{Addresses: addrs}).Validate(); err != nil {
		return err
	}
	d.addrMu.Lock()
	defer d.addrMu.Unlock()
	want := make(map[netip.Addr]struct{}, len(addrs))
	for _, a := range addrs {
		want[a] = struct{}{}
		if _, have := d.addresses[a]; have {
			continue
		}
		if err := d.stack.AddProtocolAddress(nicID, protocolAddress(a), stack.AddressProperties{}); err != nil {
			return fmt.Errorf("add address %v: %v", a, err)
		}
		d.addresses[a] = struct{}{}
	}
	for a := range d.addresses {
		if _, keep := want[a]; keep {
			continue
		}
		if err := d.stack.RemoveAddress(nicID, tcpip.AddrFromSlice(a.AsSlice())); err != nil {
			return fmt.Errorf("remove address %v: %v", a, err)
		}
		delete(d.addresses, a)
	}
	return nil
}

func protocolAddress(a netip.Addr) tcpip.ProtocolAddress {
	return tcpip.ProtocolAddress{
		Protocol:          protocolOf(a),
		AddressWithPrefix: tcpip.AddrFromSlice(a.AsSlice()).WithPrefix(),
	}
}

func protocolOf(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

// Close closes every connection of the stack and waits for its goroutines. Read and Write return os.ErrClosed from then
// on. It is idempotent and safe under traffic.
//
// The order matters: nothing may enter the stack while it is taken down, and nothing that the stack still says on its
// way down may block.
func (d *Device) Close() error {
	d.closing.Do(func() {
		d.writing.Lock() // no Write is inside any more, and the next sees closed
		d.closed.Store(true)
		d.writing.Unlock()
		d.pieces.close()
		d.link.acks.close()
		d.link.out.close()
		d.stack.Destroy()
		d.readMu.Lock() // Read has been woken by the queue
		d.link.out.drop()
		d.readMu.Unlock()
		close(d.events)
	})
	return nil
}

// Name is the device's name, for logs.
func (d *Device) Name() (string, error) { return "netstack", nil }

// File is nil: there is no descriptor behind the device.
func (d *Device) File() *os.File { return nil }

// MTU is the largest packet in bytes.
func (d *Device) MTU() (int, error) { return d.opts.MTU, nil }

// Events tells wireguard-go that the device is up; it is closed by Close.
func (d *Device) Events() <-chan tun.Event { return d.events }

// BatchSize is how many packets Read gives and Write takes at most.
func (d *Device) BatchSize() int { return batchSize }

// Stats counts what the device has done since it was made.
type Stats struct {
	ReadPackets  uint64 // to WireGuard
	WritePackets uint64 // from WireGuard
	Merged       uint64 // of those, appended to the one before
	Joined       uint64 // segments of the stack appended to the one before in Read
	Malformed    uint64 // dropped in Write: no IP, a bad length or checksum
	Filtered     uint64 // dropped in Write: the source is unknown
	Fragments    uint64 // dropped in Write: pieces of packets that did not become whole
	Uncarried    uint64 // dropped in Write: what a gateway does not forward
	Gated        uint64 // dropped in Write: by the gate
	Overflow     uint64 // dropped on the way out: the queue stayed full
	Unread       uint64 // datagrams dropped in the stack: their flow does not keep up
	Spared       uint64 // acknowledgements of the stack that a later packet made needless
}

// Depth is how much waits between the stack and Read, in bytes.
func (d *Device) Depth() int { return d.link.out.depth() }

type counters struct {
	read, written, merged, joined, malformed, filtered, uncarried, gated, overflow atomic.Uint64
}

// Stats reads the counters.
func (d *Device) Stats() Stats {
	c := &d.counters
	return Stats{
		ReadPackets: c.read.Load(), WritePackets: c.written.Load(), Merged: c.merged.Load(), Joined: c.joined.Load(),
		Malformed: c.malformed.Load(), Filtered: c.filtered.Load(), Overflow: c.overflow.Load(),
		Fragments: d.pieces.dropped.Load(), Uncarried: c.uncarried.Load(), Gated: c.gated.Load(),
		Unread: d.stack.Stats().UDP.ReceiveBufferErrors.Value(),
		Spared: d.link.acks.spared.Load(),
	}
}
