package forward

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/policy"
)

const (
	echoQueue = 16      // requests of one flow on their way to the socket
	echoWaits = 2 << 10 // bytes of one that may wait behind another
)

// handleICMP4 sees ICMPv4 messages that belong to no endpoint of the stack. The stack answers echo requests to the
// gateway's own addresses; those to targets go out through a ping socket, which Linux gives to unprivileged processes
// whose group lies in net.ipv4.ping_group_range (it covers ICMPv6 as well). Where it does not, requests are counted as
// failed and dropped.
func (f *Forwarder) handleICMP4(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.ICMPv4(pkt.TransportHeader().Slice())
	if len(h) < header.ICMPv4MinimumSize || h.Type() != header.ICMPv4Echo {
		return false
	}
	return f.handleEcho(id, pkt, h.Ident())
}

// handleICMP6 does the same for ICMPv6.
func (f *Forwarder) handleICMP6(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.ICMPv6(pkt.TransportHeader().Slice())
	if len(h) < header.ICMPv6EchoMinimumSize || h.Type() != header.ICMPv6EchoRequest {
		return false
	}
	return f.handleEcho(id, pkt, h.Ident())
}

// handleEcho hands a request to its flow; it never blocks. True keeps the stack from answering in the target's name.
func (f *Forwarder) handleEcho(id stack.TransportEndpointID, pkt *stack.PacketBuffer, ident uint16) bool {
	src, dst := endpoints(id)
	if f.isLocal(dst.Addr()) {
		return false
	}
	s := f.session(src.Addr())
	if s == nil {
		return true
	}
	key := flowKey{policy.ICMP, netip.AddrPortFrom(src.Addr(), ident), netip.AddrPortFrom(dst.Addr(), 0)}
	fl, why, known := s.admit(key, f.limits.UDPIdle)
	if fl == nil && why.Reason == reasonHeld {
		return true
	}
	if fl == nil {
		s.deny(key, why)
		if dst.Addr().IsGlobalUnicast() || dst.Addr().IsLoopback() {
			s.reject(quoteOf(pkt), prohibited)
		}
		return true
	}
	if !known {
		go f.serveEcho(fl)
	}
	message := stack.PayloadSince(pkt.TransportHeader())
	defer message.Release()
	fl.ask(ping{message.ToSlice(), quoteOf(pkt), netstack.MayBeFragmented(pkt.NetworkHeader().Slice())})
	return true
}

// ask hands a request on; a flood is thinned out. Large ones, put together from fragments, do not wait behind others: a session may have
// thousands of flows.
func (fl *flow) ask(p ping) {
	if len(p.message) > echoWaits && len(fl.echo) > 0 {
		return
	}
	select {
	case fl.echo <- p:
	default:
	}
}

// refuse drops requests until the flow is idle, so that there is no new attempt for each.
func (fl *flow) refuse() {
	for {
		select {
		case <-fl.echo:
		case <-fl.ctx.Done():
			return
		}
	}
}

// ping is an ICMP echo request on its way out.
type ping struct {
	message []byte // from the ICMP header on
	quote   []byte // for errors about it
	cut     bool   // it may be fragmented
}

// serveEcho carries the requests of one flow, and the replies of its target alone, over a ping socket of its own.
func (f *Forwarder) serveEcho(fl *flow) {
	defer fl.close()
	target, err := f.echoTarget(fl)
	if err != nil {
		fl.turnAway(err)
		fl.refuse()
		return
	}
	conn, err := newPinger(target)
	if err != nil {
		fl.fail(err)
		fl.refuse()
		return
	}
	stop := sync.OnceFunc(func() { _ = conn.Close() })
	defer stop()
	if !fl.onReset(stop) {
		return
	}
	out := newOutlet(fl, conn, target, 0)
	var replies sync.WaitGroup
	replies.Go(func() { fl.echoReplies(conn, target, out) })
	fl.echoRequests(out)
	stop()
	replies.Wait()
}

// echoTarget is where a flow's requests go: its destination, or the first address of the name behind it that policy lets
// through, IPv4 before IPv6.
func (f *Forwarder) echoTarget(fl *flow) (netip.Addr, error) {
	if fl.name == "" {
		fl.target.Store(&fl.key.dst)
		return fl.key.dst.Addr(), nil
	}
	ctx, cancel := context.WithTimeout(fl.ctx, f.limits.DialTimeout)
	defer cancel()
	targets, verdicts, err := f.resolve(ctx, fl)
	if err != nil {
		return netip.Addr{}, err
	}
	best := 0
	for i, to := range targets {
		if to.Addr().Is4() && !targets[best].Addr().Is4() {
			best = i
		}
	}
	if !fl.settle(targets[best], verdicts[best]) {
		return netip.Addr{}, context.Canceled
	}
	return targets[best].Addr(), nil
}

// echoRequests sends what the job asks until the flow is reset.
func (fl *flow) echoRequests(out *outlet) {
	kind := byte(ipv4.ICMPTypeEcho)
	if out.target.Is6() {
		kind = byte(ipv6.ICMPTypeEchoRequest)
	}
	for {
		select {
		case r := <-fl.echo:
			r.message[0] = kind // a name may lead to the other family; the kernel puts in the checksum
			fl.carry(len(r.message), 0)
			fl.asking.Store(&r.quote)
			if err := out.send(r.message, r.quote, r.cut); err != nil && !errors.Is(err, syscall.EMSGSIZE) {
				fl.fail(err)
			}
		case <-fl.ctx.Done():
			return
		}
	}
}

// echoReplies passes replies on to the job, with the identifier that it chose: the socket has put in its own.
func (fl *flow) echoReplies(conn *pinger, target netip.Addr, out *outlet) {
	src, dst := fl.key.dst.Addr(), fl.key.src.Addr()
	reply := func(b []byte, from netip.Addr) {
		if from != target || len(b) < header.ICMPv4MinimumSize || !isEchoReply(b[0], target) {
			return
		}
		fl.carry(0, len(b))
		rest := uint32(fl.key.src.Port())<<16 | uint32(binary.BigEndian.Uint16(b[6:]))
		body := b[header.ICMPv4MinimumSize:]
		if dst.Is4() {
			_ = fl.s.f.device.Inject(icmp4Packet(src, dst, header.ICMPv4EchoReply, 0, rest, body))
		} else {
			_ = fl.s.f.device.Inject(icmp6Packet(src, dst, header.ICMPv6EchoReply, 0, rest, body))
		}
	}
	for {
		err := conn.next(reply)
		if errors.Is(err, net.ErrClosed) || errors.Is(err, errors.ErrUnsupported) || fl.ctx.Err() != nil {
			return
		}
		// What else is an error is a router's word on one request, and told once.
		if quote := fl.asking.Load(); quote != nil && errors.Is(err, syscall.EMSGSIZE) {
			out.heard(*quote)
		}
	}
}

func isEchoReply(typ byte, from netip.Addr) bool {
	if from.Is4() {
		return typ == byte(ipv4.ICMPTypeEchoReply)
	}
	return typ == byte(ipv6.ICMPTypeEchoReply)
}
