package nat

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

// Addresses of documentation (RFC 5737, RFC 3849). Nothing is sent to them: they stand for any address out there.
var anywhere = []netip.AddrPort{
	netip.MustParseAddrPort("192.0.2.1:9"),
	netip.MustParseAddrPort("[2001:db8::1]:9"),
}

// poller looks at the network every so often.
type poller struct {
	skip func(string) bool
	tick *time.Ticker
	done chan struct{}
	once sync.Once
}

func newPoller(opts WatchOptions) *poller {
	return &poller{skip: opts.Skip, tick: time.NewTicker(opts.Poll), done: make(chan struct{})}
}

func (p *poller) read() (Network, error) {
	candidates, err := HostCandidates(0, p.skip)
	if err != nil {
		return Network{}, err
	}
	var n Network
	for _, c := range candidates {
		if !c.Addr.Addr().IsLoopback() {
			n.Addrs = append(n.Addrs, c.Addr.Addr())
		}
	}
	for _, to := range anywhere {
		if source, ok := sourceFor(to); ok {
			n.Routes = append(n.Routes, DefaultRoute{Source: source, IPv6: source.Is6()})
		}
	}
	return n.sorted(), nil
}

func (p *poller) wait() error {
	select {
	case <-p.tick.C:
		return nil
	case <-p.done:
		return net.ErrClosed
	}
}

func (p *poller) close() {
	p.once.Do(func() {
		p.tick.Stop()
		close(p.done)
	})
}

// sourceFor gives the address from which a packet to an address would leave. Connecting a UDP socket sends nothing.
func sourceFor(to netip.AddrPort) (netip.Addr, bool) {
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		return netip.Addr{}, false
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap().WithZone(""), true
}
