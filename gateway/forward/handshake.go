package forward

import (
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/wire"
)

// abortRetry is how often a handshake that is to end is looked for: it has a connection only once it has begun.
const abortRetry = 2 * time.Millisecond

// handshake completes the job's handshake; nil where that fails or the flow is reset meanwhile. The stack gives the connection
// away only when it is established, so a reset has to find it by its ends.
func (fl *flow) handshake(r *tcp.ForwarderRequest, wq *waiter.Queue) tcpip.Endpoint {
	f, id, done := fl.s.f, r.ID(), make(chan struct{})
	defer close(done)
	if !fl.onReset(func() { f.work.Go(func() { f.abortHandshake(id, done) }) }) {
		f.complete(r, true)
		return nil
	}
	ep, terr := r.CreateEndpoint(wq)
	if terr == nil {
		f.complete(r, false)
		return ep
	}
	answered := fl.answered.Load()
	f.complete(r, answered == 0)
	if fl.isDead() && answered != 0 {
		fl.resetAnswered(uint32(answered))
		return nil
	}
	fl.s.counts.failed.Add(1)
	fl.because(wire.CauseReset)
	fl.s.f.log.Debug("the job did not complete its handshake", "session", fl.s.id, "addr", fl.key.dst, "err", netstack.Errno(terr))
	return nil
}

// requests are the connection requests that the stack has handed over and that are not complete, with their flows. The stack
// drops further ones for the same ends without a word.
type requests struct {
	mu    sync.Mutex
	flows map[stack.TransportEndpointID]*flow // nil while it is decided
}

// reserve takes the place of a request; false says that there is one already.
func (r *requests) reserve(id stack.TransportEndpointID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, taken := r.flows[id]; taken {
		return false
	}
	if r.flows == nil {
		r.flows = map[stack.TransportEndpointID]*flow{}
	}
	r.flows[id] = nil
	return true
}

func (r *requests) set(id stack.TransportEndpointID, fl *flow) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flows[id] = fl
}

func (r *requests) get(id stack.TransportEndpointID) *flow {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.flows[id]
}

func (r *requests) release(id stack.TransportEndpointID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.flows, id)
}

// complete ends a request towards the stack, with a reset to the job or without.
func (f *Forwarder) complete(r *tcp.ForwarderRequest, reset bool) {
	id := r.ID()
	r.Complete(reset)
	f.requests.release(id)
}

// abortHandshake ends the handshake with these ends, as soon as there is one.
func (f *Forwarder) abortHandshake(id stack.TransportEndpointID, done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		default:
		}
		if ep := f.endpoint(id); ep != nil {
			ep.Abort()
		}
		select {
		case <-done:
			return
		case <-time.After(abortRetry):
		}
	}
}

// endpoint finds the stack's connection with these very ends, or nil.
func (f *Forwarder) endpoint(id stack.TransportEndpointID) *tcp.Endpoint {
	proto := ipv4.ProtocolNumber
	if id.LocalAddress.Len() == header.IPv6AddressSize {
		proto = ipv6.ProtocolNumber
	}
	ep, _ := f.stack.FindTransportEndpoint(proto, tcp.ProtocolNumber, id, 1).(*tcp.Endpoint)
	if ep == nil || ep.TransportEndpointInfo.ID != id {
		return nil
	}
	return ep
}

// noteAnswer remembers the sequence number of a SYN-ACK, with which alone the job takes a reset for genuine.
func (f *Forwarder) noteAnswer(from, to netip.AddrPort, seq uint32) {
	if s := f.session(to.Addr()); s != nil && !f.isLocal(from.Addr()) {
		if fl := s.find(flowKey{policy.TCP, to, from}); fl != nil {
			fl.answered.Store(1<<32 | uint64(seq))
		}
	}
}

// resetAnswered resets a connection that the job takes for established, or will when the SYN-ACK arrives: the stack forgets
// one whose handshake is not complete without a word.
func (fl *flow) resetAnswered(seq uint32) {
	segment := header.TCP(make([]byte, header.TCPMinimumSize))
	segment.Encode(&header.TCPFields{
		SrcPort: fl.key.dst.Port(), DstPort: fl.key.src.Port(), SeqNum: seq + 1, AckNum: fl.asked + 1,
		DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagRst | header.TCPFlagAck,
	})
	_ = fl.s.f.device.Inject(tcpPacket(fl.key.dst.Addr(), fl.key.src.Addr(), segment)) // what is lost is asked for again
}

// clearStale makes way for a job that uses a port again while the stack still remembers its last connection from there: in
// TIME-WAIT it would not answer, and after a session has ended the next may have its address.
func (f *Forwarder) clearStale(from, to netip.AddrPort) {
	s := f.session(from.Addr())
	if s == nil || f.isLocal(to.Addr()) {
		return
	}
	ep := f.endpoint(endpointID(from, to))
	if ep != nil && s.find(flowKey{policy.TCP, from, to}) == nil {
		ep.Abort()
	}
}

// endpointID is how the stack knows a connection from a job's address to a destination.
func endpointID(from, to netip.AddrPort) stack.TransportEndpointID {
	return stack.TransportEndpointID{
		LocalAddress: tcpip.AddrFromSlice(to.Addr().AsSlice()), LocalPort: to.Port(),
		RemoteAddress: tcpip.AddrFromSlice(from.Addr().AsSlice()), RemotePort: from.Port(),
	}
}

// tcpPacket builds an IP packet around a segment and fills in its checksum.
func tcpPacket(from, to netip.Addr, segment header.TCP) []byte {
	src, dst := tcpip.AddrFromSlice(from.AsSlice()), tcpip.AddrFromSlice(to.AsSlice())
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, uint16(len(segment)))
	segment.SetChecksum(^segment.CalculateChecksum(sum))
	if from.Is4() {
		p := make([]byte, header.IPv4MinimumSize, header.IPv4MinimumSize+len(segment))
		ip := header.IPv4(p)
		ip.Encode(&header.IPv4Fields{
			TotalLength: uint16(len(p) + len(segment)), TTL: ttl, Protocol: uint8(header.TCPProtocolNumber),
			Flags: header.IPv4FlagDontFragment, SrcAddr: src, DstAddr: dst,
		})
		ip.SetChecksum(^ip.CalculateChecksum())
		return append(p, segment...)
	}
	p := make([]byte, header.IPv6MinimumSize, header.IPv6MinimumSize+len(segment))
	header.IPv6(p).Encode(&header.IPv6Fields{
		PayloadLength: uint16(len(segment)), TransportProtocol: header.TCPProtocolNumber, HopLimit: ttl, SrcAddr: src, DstAddr: dst,
	})
	return append(p, segment...)
}
