//go:build unix

package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"time"
)

// blocks are the documentation ranges (RFC 5737) that play the public internet.
var blocks = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("198.51.100.0/24")}

// Link says how an attachment to the internet behaves, in both directions alike. The zero Link is a plain veth pair.
type Link struct {
	Delay time.Duration // one way
	Loss  float64       // share of packets lost, 0 to 1
	// MTU is the largest packet, in bytes; default 1500. On a smaller link nobody is told of what was too big: it is a black
	// hole, except for TCP connections of hosts behind a NAT, whose segments the NAT makes fit.
	MTU uint16
}

// Net is one lab: an internet and what is attached to it.
type Net struct {
	router *namespace // nil: flat
	stop   context.CancelFunc
	ctx    context.Context

	mu      sync.Mutex
	closed  bool
	apart   bool // the router has its rule for [Net.Block]
	publics int  // /30 networks given out
	nats    int
	spaces  []*namespace
	wires   []*wire
	procs   []*Process
}

// New makes an internet with nothing attached. Close ends it; so does the end of ctx, as far as programs go.
func New(ctx context.Context) (*Net, error) {
	n := Flat(ctx)
	router, err := n.space(true)
	if err != nil {
		return nil, fmt.Errorf("build the internet: %w", errors.Join(err, n.Close()))
	}
	n.router = router
	return n, nil
}

// Flat makes a lab without namespaces, for where there are none: its hosts are loopback addresses of this machine (all
// the same one off Linux), and nothing keeps them apart.
func Flat(ctx context.Context) *Net {
	n := &Net{}
	n.ctx, n.stop = context.WithCancel(ctx)
	return n
}

// Flat reports whether the lab's hosts are this machine itself.
func (n *Net) Flat() bool { return n.router == nil }

// space makes a namespace that Close will end.
func (n *Net) space(forward bool) (*namespace, error) {
	ns, err := newNamespace()
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	n.spaces = append(n.spaces, ns)
	n.mu.Unlock()
	if !forward {
		return ns, nil
	}
	// What cannot be routed is refused each time, not once a second: a lab's answers do not depend on what came before.
	if err := ns.sysctl("net/ipv4/icmp_ratelimit", "0"); err != nil {
		return nil, err
	}
	if err := ns.sysctl("net/ipv4/ip_forward", "1"); err != nil {
		return nil, err
	}
	_ = ns.sysctl("net/ipv6/conf/all/forwarding", "1") // a kernel without IPv6 is as good until somebody asks for it
	return ns, nil
}

// nextPublic gives the next attachment's number and /30: the router's side and the attached side.
func (n *Net) nextPublic() (index int, router, attached netip.Prefix, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	i := n.publics
	if i >= 64*len(blocks) {
		return i, router, attached, errors.New("the lab's internet is full")
	}
	n.publics++
	base := blocks[i/64].Addr().As4()
	base[3] = byte(i%64) * 4
	router = netip.PrefixFrom(offset(base, 1), 30)
	return i, router, netip.PrefixFrom(offset(base, 2), 30), nil
}

// public6 is an address of the attachment's /64 out of 2001:db8::/32 (RFC 3849).
func public6(index int, host byte) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, byte(index), 15: host}), 64)
}

func offset(base [4]byte, by byte) netip.Addr {
	base[3] += by
	return netip.AddrFrom4(base)
}

// nextLoopback gives a flat lab's next host its address. Off Linux only 127.0.0.1 answers.
func (n *Net) nextLoopback() netip.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	if runtime.GOOS != "linux" {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	n.publics++
	return netip.AddrFrom4([4]byte{127, 0, 2, byte(n.publics)})
}

// Close kills every program of the lab, and what those left behind in its namespaces, waits for them, and lets go
// of the namespaces. It is idempotent.
func (n *Net) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	procs, wires, spaces := n.procs, n.wires, n.spaces
	n.mu.Unlock()

	n.stop()
	var errs []error
	for _, p := range procs {
		p.Kill()
		<-p.Done()
	}
	if err := killStrays(spaces); err != nil {
		errs = append(errs, err)
	}
	for _, w := range wires {
		errs = append(errs, w.close())
	}
	for _, ns := range spaces {
		ns.close()
	}
	return errors.Join(errs...)
}
