package names

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/net/dns/dnsmessage"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/culvertnet/culvert/internal/wire"
)

// What is told to a gateway is bounded in bytes: a request to it holds no more than [wire.MaxInsideBody].
const (
	maxHeard  = 16 << 10
	heardSize = 80 // of what is around a name: an address of IPv6, and JSON
)

// Listen gives a device that does what dev does, and hears on the way which addresses the gateway's servers give to names under
// wildcards: another gateway does not know these until it is told. Nil stays nil.
func (r *Resolver) Listen(dev tun.Device) tun.Device {
	if dev == nil {
		return nil
	}
	return &listener{dev, r}
}

// listener hears what comes out of the tunnel.
type listener struct {
	tun.Device
	resolver *Resolver
}

// Write passes packets on. A look at three bytes tells those apart that are no answers of a DNS server.
func (l *listener) Write(bufs [][]byte, offset int) (int, error) {
	for _, buf := range bufs {
		if from, message := datagramFrom(buf[offset:], wire.DNSPort); message != nil {
			l.resolver.hear(from, message)
		}
	}
	return l.Device.Write(bufs, offset)
}

// datagramFrom gives the payload of a UDP datagram (RFC 768) from a port, and who sent it; nil for any other packet. Options and fragments
// are for longer messages than an answer to one question is.
func datagramFrom(p []byte, port uint16) (from netip.Addr, payload []byte) {
	const udp, udpLen, len4, len6 = 17, 8, 20, 40
	switch {
	case len(p) > len4+udpLen && p[0] == 4<<4|len4/4 && p[9] == udp && binary.BigEndian.Uint16(p[6:])&0x3fff == 0:
		from, payload = netip.AddrFrom4([4]byte(p[12:16])), p[len4:]
	case len(p) > len6+udpLen && p[0]>>4 == 6 && p[6] == udp:
		from, payload = netip.AddrFrom16([16]byte(p[8:24])), p[len6:]
	default:
		return netip.Addr{}, nil
	}
	if binary.BigEndian.Uint16(payload) != port {
		return netip.Addr{}, nil
	}
	return from, payload[udpLen:]
}

// hear takes the addresses out of an answer.
func (r *Resolver) hear(from netip.Addr, message []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.scope == nil || !slices.Contains(r.scope.servers, from) {
		return
	}
	for _, named := range addressesIn(message) {
		if r.scope.exact[named.Name] || !hostname(named.Name) || !r.scope.covers(named.Name) || !r.scope.believable(named.Addr) {
			continue
		}
		r.heard = slices.DeleteFunc(r.heard, func(n wire.NamedAddr) bool { return n.Name == named.Name })
		if len(r.heard) == wire.MaxTakenNames {
			r.heard = slices.Delete(r.heard, 0, 1)
		}
		r.heard = append(r.heard, named)
		if r.OnAddress != nil {
			r.OnAddress(named.Addr)
		}
	}
}

// addressesIn reads names with their addresses out of an answer: to a question for them, or for services, with which they come along.
func addressesIn(message []byte) (list []wire.NamedAddr) {
	var p dnsmessage.Parser
	head, err := p.Start(message)
	if err != nil || !head.Response || head.RCode != dnsmessage.RCodeSuccess || p.SkipAllQuestions() != nil {
		return nil
	}
	take := func(next func() (dnsmessage.Resource, error)) {
		for range maxAnswers {
			rr, err := next()
			if err != nil {
				return
			}
			switch body := rr.Body.(type) {
			case *dnsmessage.AResource:
				list = append(list, wire.NamedAddr{Name: canonical(rr.Header.Name.String()), Addr: netip.AddrFrom4(body.A)})
			case *dnsmessage.AAAAResource:
				list = append(list, wire.NamedAddr{Name: canonical(rr.Header.Name.String()), Addr: netip.AddrFrom16(body.AAAA)})
			}
		}
	}
	take(p.Answer)
	if p.SkipAllAnswers() == nil && p.SkipAllAuthorities() == nil {
		take(p.Additional)
	}
	return list
}

// Heard lists the names under wildcards that the job has heard addresses for, as far as they are granted still; the oldest are left out
// where they are too many.
func (r *Resolver) Heard() []wire.NamedAddr {
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []wire.NamedAddr
	room := maxHeard
	for _, n := range slices.Backward(r.heard) {
		if r.scope == nil || !r.scope.covers(n.Name) {
			continue
		}
		if room -= len(n.Name) + heardSize; room < 0 {
			break
		}
		list = append(list, n)
	}
	slices.Reverse(list)
	return list
}
