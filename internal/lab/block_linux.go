package lab

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"
)

// Block lets nothing pass between two public IPv4 addresses any more, see [Host.Public]. Flows that are open feel it as well.
func (n *Net) Block(a, b netip.Addr) error {
	if err := n.barrier(); err != nil {
		return err
	}
	return n.change(a, b, (*nftables.Conn).SetAddElements)
}

// Unblock takes [Net.Block] back.
func (n *Net) Unblock(a, b netip.Addr) error {
	return n.change(a, b, (*nftables.Conn).SetDeleteElements)
}

func (n *Net) change(a, b netip.Addr, how setChange) error {
	if err := n.router.rule(func(r *rules) { r.pair(a, b, how) }); err != nil {
		return fmt.Errorf("change what passes between %s and %s: %w", a, b, err)
	}
	return nil
}

// barrier gives the internet's router the rule and its set, once.
func (n *Net) barrier() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.apart {
		return nil
	}
	if err := n.router.rule((*rules).keepApart); err != nil {
		return fmt.Errorf("prepare to block: %w", err)
	}
	n.apart = true
	return nil
}
