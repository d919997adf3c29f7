package forward

import (
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	// fitsAll is how much of a datagram fits every path: Linux takes no smaller path MTU than 552 from anybody
	// (net.ipv4.route.min_pmtu), so that nothing has to be set for the questions and answers that most datagrams are.
	fitsAll = 512
	minMTU6 = 1280 // RFC 8200, section 5
)

// outlet sends a flow's datagrams, or echo requests, to their target as a router would pass them on: what the job does not let be
// fragmented leaves with "don't fragment", and where it does not fit on the way to the target the job hears what does (RFC 1191,
// RFC 8201).
//
// The kernel finds out: it keeps the path MTU of each destination, reports EMSGSIZE for what it knows not to fit, and, once, when a
// router has said so.
type outlet struct {
	fl     *flow
	conn   socket // connected
	raw    syscall.RawConn
	target netip.Addr
	head   int  // what the kernel puts before what is sent
	cuts   bool // what is sent at present may be fragmented
	set    bool // the socket has been told of cuts
	narrow atomic.Bool

	attempt attempt
}

// newOutlet makes an outlet over a connected socket. overhead is the length of the transport header that the kernel adds.
func newOutlet(fl *flow, conn socket, target netip.Addr, overhead int) *outlet {
	o := &outlet{fl: fl, conn: conn, target: target.Unmap()}
	o.head = ipHeader(o.target) + overhead
	o.raw, _ = conn.SyscallConn() // without it the kernel's defaults hold
	return o
}

func ipHeader(of netip.Addr) int {
	if of.Is6() {
		return header.IPv6MinimumSize
	}
	return header.IPv4MinimumSize
}

// send sends what the job has sent in the packet that quote begins; cut says that it may be fragmented. Errors are those of the socket:
// EMSGSIZE, of which the job has been told, takes nothing but this datagram. It waits while the socket is full, which it is while a link is
// slow, or a neighbour is being looked for.
func (o *outlet) send(b, quote []byte, cut bool) error {
	return o.sendBy(o.wait, b, quote, cut)
}

// sendNow is send where nothing may wait: EAGAIN says that the socket is full.
func (o *outlet) sendNow(b, quote []byte, cut bool) error {
	return o.sendBy(o.now, b, quote, cut)
}

// wait sends when the socket takes it.
func (o *outlet) wait(b []byte) error {
	_, err := o.conn.Write(b)
	return err
}

func (o *outlet) sendBy(write func([]byte) error, b, quote []byte, cut bool) error {
	if len(b) > fitsAll {
		o.fragment(cut || o.narrow.Load())
	}
	err := write(b)
	if !errors.Is(err, syscall.EMSGSIZE) {
		return err
	}
	mtu := o.mtu()
	if !o.cuts {
		o.tooBig(quote, mtu)
		o.fragment(o.narrow.Load())
	}
	if o.cuts || len(b)+o.head <= mtu { // the word was about an earlier datagram
		err = write(b)
	}
	return err
}

// fragment tells the socket whether what is sent next may be fragmented.
func (o *outlet) fragment(cut bool) {
	if o.raw == nil || o.set && o.cuts == cut {
		return
	}
	_ = o.raw.Control(func(fd uintptr) { o.set = setFragment(int(fd), o.target.Is6(), cut) == nil })
	o.cuts = cut
}

// mtu is what the kernel knows to fit on the way to the target, IP header included; 0 where it does not say.
func (o *outlet) mtu() (mtu int) {
	if o.raw == nil {
		return 0
	}
	_ = o.raw.Control(func(fd uintptr) { mtu = pathMTU(int(fd), o.target) })
	return mtu
}

// heard is told of EMSGSIZE that came up while nothing was being sent.
func (o *outlet) heard(quote []byte) { o.tooBig(quote, o.mtu()) }

// tooBig tells the job what fits, by the size of its own packets, which are of another family where a name leads there. No host sends
// packets of IPv6 that are smaller than 1,280 bytes: where they do not fit in IPv4, they are fragmented here (RFC 7915, section 5.1).
func (o *outlet) tooBig(quote []byte, mtu int) {
	if mtu == 0 {
		return
	}
	inside := mtu - ipHeader(o.target) + ipHeader(o.fl.key.dst.Addr())
	if o.fl.key.dst.Addr().Is6() && inside < minMTU6 {
		o.narrow.Store(true)
		return
	}
	o.fl.s.tooBig(quote, inside)
}

// tooBig sends the job an ICMP error about the packet that begins with quote: no more than mtu bytes fit on its way.
func (s *Session) tooBig(quote []byte, mtu int) {
	if most, err := s.f.device.MTU(); err != nil || mtu >= most || len(quote) == 0 || !s.errors.Allow() {
		return // what is longer than the tunnel takes has come in fragments
	}
	var packet []byte
	switch {
	case len(quote) >= header.IPv4MinimumSize && quote[0]>>4 == 4:
		to, about := netip.AddrFrom4([4]byte(quote[12:16])), netip.AddrFrom4([4]byte(quote[16:20]))
		packet = icmp4Packet(s.f.rejecter(about, prohibited), to, header.ICMPv4DstUnreachable, uint8(header.ICMPv4FragmentationNeeded), uint32(mtu), quote)
	case len(quote) >= header.IPv6MinimumSize && quote[0]>>4 == 6:
		to, about := netip.AddrFrom16([16]byte(quote[8:24])), netip.AddrFrom16([16]byte(quote[24:40]))
		packet = icmp6Packet(s.f.rejecter(about, prohibited), to, header.ICMPv6PacketTooBig, 0, uint32(mtu), quote)
	}
	if packet != nil {
		_ = s.f.device.Inject(packet) // lost where there is no room, and said again
	}
}

var _ socket = (*net.UDPConn)(nil)
