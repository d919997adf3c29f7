package agent

import (
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/culvertnet/culvert/internal/tunnel"
)

// narrow knows the sessions whose path takes less than the usual MTU. It is asked for every run of packets that leaves for
// a session, and most often there are none.
type narrow struct {
	mu    sync.Mutex // orders changes
	count atomic.Int64
	mtus  sync.Map // netip.Addr → int, bytes
}

// passage is one session's addresses, for as long as they are its own.
type passage struct {
	addrs []netip.Addr
	over  bool // guarded by narrow.mu
}

// set notes what a session's path takes, unless the session is over: its addresses may be another's by now.
func (n *narrow) set(p *passage, mtu int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p.over {
		return
	}
	for _, a := range p.addrs {
		_, known := n.mtus.LoadAndDelete(a)
		if mtu < tunnel.DefaultMTU {
			n.mtus.Store(a, mtu)
		}
		switch {
		case known && mtu >= tunnel.DefaultMTU:
			n.count.Add(-1)
		case !known && mtu < tunnel.DefaultMTU:
			n.count.Add(1)
		}
	}
}

// forget ends a session's passage.
func (n *narrow) forget(p *passage) {
	n.set(p, tunnel.DefaultMTU)
	n.mu.Lock()
	defer n.mu.Unlock()
	p.over = true
}

// at gives what the path to an address takes, 0 for the usual.
func (n *narrow) at(a netip.Addr) int {
	if n.count.Load() == 0 {
		return 0
	}
	mtu, _ := n.mtus.Load(a)
	v, _ := mtu.(int)
	return v
}
