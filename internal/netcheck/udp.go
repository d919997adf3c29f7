package netcheck

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/relay"
)

// samples is how often a relay is asked for its round trip; the fastest counts.
const samples = 3

// udp asks STUN servers and relays from one socket, so that what they see can be compared.
func (c *checker) udp(ctx context.Context) {
	conn, err := net.ListenPacket("udp", ":0")
	if err != nil {
		c.report.UDP.Error = fmt.Sprintf("no UDP socket can be opened: %v", err)
		return
	}
	defer conn.Close()
	q := c.questions(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { c.filtering(ctx, q) })
	answers := c.ask(ctx, conn, q)
	wg.Wait()
	c.classify(conn, q, answers)
	c.mtu(ctx, answers)
}

// questions are what is asked, and of which relay: "" for a STUN server alone.
type questions struct {
	list   []nat.Question
	relays []string
}

// add asks a server once, however often it is named. A relay's port answers STUN as well, so the relay's question wins.
func (q *questions) add(server netip.AddrPort, relayName string) {
	i := slices.IndexFunc(q.list, func(o nat.Question) bool { return o.Server == server })
	if i < 0 {
		i = len(q.list)
		q.list, q.relays = append(q.list, nat.Question{Server: server}), append(q.relays, "")
	}
	if relayName != "" {
		q.list[i].Request, q.relays[i] = relay.WantRequest, relayName
	}
}

// named gives a server a host for a person to read: one without is the coordinator.
func named(host, server string) string {
	if strings.HasPrefix(server, ":") {
		return host + server
	}
	return server
}

// questions looks up everybody who is to be asked. Relays get their entry in the report here.
func (c *checker) questions(ctx context.Context) *questions {
	q := &questions{}
	for _, s := range c.servers() {
		addrs, err := Lookup(ctx, c.url.Hostname(), s)
		if err != nil {
			c.Logger.Debug("a STUN server cannot be looked up", "addr", s, "err", err)
			c.report.UDP.Error = Printable(fmt.Sprintf("the STUN server %s cannot be looked up: %v", named(c.url.Hostname(), s), err))
		}
		for _, a := range addrs {
			q.add(a, "")
		}
	}
	for i, r := range c.relayEntries() {
		if c.info.Relays[i].UDP == "" {
			continue
		}
		r.UDP = &Way{To: Printable(c.info.Relays[i].UDP)}
		addrs, err := Lookup(ctx, c.url.Hostname(), c.info.Relays[i].UDP)
		if err != nil {
			r.UDP.Error = Printable(err.Error())
		}
		for _, a := range addrs {
			q.add(a, r.Name)
		}
	}
	return q
}

// ask asks everybody, and relays that answer again for a better figure.
func (c *checker) ask(ctx context.Context, conn net.PacketConn, q *questions) []nat.Answer {
	if len(q.list) == 0 {
		return nil
	}
	first, cancel := context.WithTimeout(ctx, c.UDPTimeout)
	defer cancel()
	answers, err := nat.Ask(first, conn, q.list)
	if err != nil {
		c.report.UDP.Error = fmt.Sprintf("no UDP packet can be sent: %v", err)
		return nil
	}
	var again []nat.Question
	var which []int
	for i, a := range answers {
		if a.Mapped.IsValid() {
			again, which = append(again, q.list[i]), append(which, i)
		}
	}
	for range samples - 1 {
		next, cancel := context.WithTimeout(ctx, time.Second)
		more, err := nat.Ask(next, conn, again)
		cancel()
		for j, a := range more {
			if old := &answers[which[j]]; err == nil && a.RTT > 0 && a.RTT < old.RTT {
				old.RTT = a.RTT
			}
		}
	}
	c.note(q, answers)
	return answers
}

// note puts the answers into the report.
func (c *checker) note(q *questions, answers []nat.Answer) {
	entries := c.relayEntries()
	for i, a := range answers {
		s := STUNServer{Server: a.Server}
		if a.Mapped.IsValid() {
			s.Mapped, s.RTT = &a.Mapped, milliseconds(a.RTT)
			c.report.UDP.Works = true
		}
		c.report.UDP.Servers = append(c.report.UDP.Servers, s)
		at := slices.IndexFunc(entries, func(r *Relay) bool { return r.Name == q.relays[i] })
		if at < 0 || !a.Mapped.IsValid() {
			continue
		}
		way := entries[at].UDP
		if _, ok := relay.ParseOffer(a.Message); !ok {
			way.Error = "what answers there is no relay"
			continue
		}
		if !way.Works || s.RTT < way.RTT {
			way.Works, way.RTT, way.Error = true, s.RTT, ""
		}
	}
	for _, r := range entries {
		if r.UDP != nil && !r.UDP.Works && r.UDP.Error == "" {
			r.UDP.Error = "no answer"
		}
	}
	if c.report.UDP.Works {
		c.report.UDP.Error = ""
	}
}

// relayEntries gives the report's relays, in the order in which the coordinator lists them.
func (c *checker) relayEntries() []*Relay {
	out := make([]*Relay, len(c.report.Relays))
	for i := range out {
		out[i] = &c.report.Relays[i]
	}
	return out
}

// classify tells what the NAT does from what was seen of the socket.
func (c *checker) classify(conn net.PacketConn, q *questions, answers []nat.Answer) {
	port := conn.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	var own []netip.AddrPort
	for _, a := range c.network.Addrs {
		own = append(own, netip.AddrPortFrom(a, port))
	}
	if loopback(c.url.Hostname()) { // the way to a coordinator on this very host
		own = append(own, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), netip.AddrPortFrom(netip.IPv6Loopback(), port))
	}
	var seen []nat.Observation
	for _, a := range answers {
		if !a.Mapped.IsValid() {
			continue
		}
		seen = append(seen, a.Observation)
		family := &c.report.IPv6
		if a.Mapped.Addr().Is4() {
			family = &c.report.IPv4
		}
		if family.Public == nil {
			family.Public = &a.Mapped
		}
	}
	b := nat.Classify(seen, own)
	n := &c.report.NAT
	n.Present, n.Mapping, n.Depends, n.Destinations = len(seen) > 0 && !b.Direct, b.Mapping, b.Dependence, b.Destinations
}

// filtering finds out what comes in that was not asked for, with sockets of its own.
func (c *checker) filtering(ctx context.Context, q *questions) {
	ctx, cancel := context.WithTimeout(ctx, c.UDPTimeout)
	defer cancel()
	var conns [2]net.PacketConn
	for i := range conns {
		var err error
		if conns[i], err = net.ListenPacket("udp", ":0"); err != nil {
			return
		}
		defer conns[i].Close()
	}
	var servers []netip.AddrPort
	v4 := slices.ContainsFunc(q.list, func(o nat.Question) bool { return o.Server.Addr().Is4() })
	for _, o := range q.list {
		if o.Server.Addr().Is4() == v4 {
			servers = append(servers, o.Server)
		}
	}
	result, err := nat.ProbeFiltering(ctx, conns[0], conns[1], servers)
	if err != nil {
		c.Logger.Debug("the NAT's filtering cannot be probed", "err", err)
	}
	c.report.NAT.Filtering = result
}

// sizes of IP packets that are tried: Ethernet, PPPoE, what tunnels and clouds leave of it, and what IPv6 asks for at least.
var sizes = []int{1500, 1492, 1484, 1480, 1460, 1450, 1440, 1420, 1400, 1380, 1340, 1300, 1280}

// mtu sends packets of many sizes that must not be fragmented to the nearest server.
func (c *checker) mtu(ctx context.Context, answers []nat.Answer) {
	to, ok := nearest(answers)
	if !ok {
		return
	}
	conn, err := listenUnfragmented(ctx, to.Addr())
	if err != nil {
		c.Logger.Debug("the path's MTU cannot be probed", "err", err)
		return
	}
	defer conn.Close()
	headers := 20 + 8
	if to.Addr().Is6() {
		headers = 40 + 8
	}
	var list []nat.Question
	for _, size := range sizes {
		list = append(list, nat.Question{Server: to, Request: func(id nat.TxID) []byte { return nat.PaddedRequest(id, size-headers) }})
	}
	ctx, cancel := context.WithTimeout(ctx, c.UDPTimeout/2)
	defer cancel()
	got, err := nat.Ask(ctx, conn, list)
	if err != nil {
		return
	}
	for i, a := range got {
		if a.Mapped.IsValid() {
			c.report.MTU = &MTU{Server: to, Bytes: sizes[i]}
			return
		}
	}
}

// nearest gives the server that answered fastest, an IPv4 one where there is one.
func nearest(answers []nat.Answer) (netip.AddrPort, bool) {
	var best *nat.Answer
	for i := range answers {
		a := &answers[i]
		if !a.Mapped.IsValid() {
			continue
		}
		if v4 := a.Server.Addr().Is4(); best == nil || v4 && !best.Server.Addr().Is4() ||
			v4 == best.Server.Addr().Is4() && a.RTT < best.RTT {
			best = a
		}
	}
	if best == nil {
		return netip.AddrPort{}, false
	}
	return best.Server, true
}
