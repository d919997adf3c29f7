package forward

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/culvertnet/culvert/internal/policy"
)

// echoQueue bounds the requests of one flow on their way to the socket.
const echoQueue = 16

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
	select {
	case fl.echo <- message.ToSlice():
	default: // a flood is thinned out
	}
	return true
}

// serveEcho carries the requests of one flow, and the replies of its target alone, over a ping socket of its own.
func (f *Forwarder) serveEcho(fl *flow) {
	defer fl.close()
	target, err := f.echoTarget(fl)
	if err != nil {
		fl.turnAway(err)
		<-fl.ctx.Done() // until it is idle: no new attempt for each request
		return
	}
	network, listen := "udp4", "0.0.0.0"
	if target.Is6() {
		network, listen = "udp6", "::"
	}
	conn, err := icmp.ListenPacket(network, listen)
	if err != nil {
		fl.fail(err)
		<-fl.ctx.Done()
		return
	}
	stop := sync.OnceFunc(func() { _ = conn.Close() })
	defer stop()
	if !fl.onReset(stop) {
		return
	}
	var replies sync.WaitGroup
	replies.Go(func() { fl.echoReplies(conn, target) })
	fl.echoRequests(conn, target)
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
func (fl *flow) echoRequests(conn *icmp.PacketConn, target netip.Addr) {
	kind := byte(ipv4.ICMPTypeEcho)
	if target.Is6() {
		kind = byte(ipv6.ICMPTypeEchoRequest)
	}
	to := &net.UDPAddr{IP: target.AsSlice()}
	for {
		select {
		case request := <-fl.echo:
			request[0] = kind // a name may lead to the other family; the kernel puts in the checksum
			fl.carry(len(request), 0)
			if _, err := conn.WriteTo(request, to); err != nil {
				fl.fail(err)
			}
		case <-fl.ctx.Done():
			return
		}
	}
}

// echoReplies passes replies on to the job, with the identifier that it chose: the socket has put in its own.
func (fl *flow) echoReplies(conn *icmp.PacketConn, target netip.Addr) {
	buf := make([]byte, 2048) // a reply is as long as its request, and that came through the tunnel's MTU
	src, dst := fl.key.dst.Addr(), fl.key.src.Addr()
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		peer, ok := netip.AddrFromSlice(from.(*net.UDPAddr).IP)
		if !ok || peer.Unmap() != target || n < header.ICMPv4MinimumSize || !isEchoReply(buf[0], target) {
			continue
		}
		fl.carry(0, n)
		rest := uint32(fl.key.src.Port())<<16 | uint32(binary.BigEndian.Uint16(buf[6:]))
		body := buf[header.ICMPv4MinimumSize:n]
		if dst.Is4() {
			_ = fl.s.f.device.Inject(icmp4Packet(src, dst, header.ICMPv4EchoReply, 0, rest, body))
		} else {
			_ = fl.s.f.device.Inject(icmp6Packet(src, dst, header.ICMPv6EchoReply, 0, rest, body))
		}
	}
}

func isEchoReply(typ byte, from netip.Addr) bool {
	if from.Is4() {
		return typ == byte(ipv4.ICMPTypeEchoReply)
	}
	return typ == byte(ipv6.ICMPTypeEchoReply)
}
