package agent

import (
	"context"
	"fmt"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/portmap"
)

// newMapper makes what keeps a port mapping on the router, nil where none is wanted.
func (g *Gateway) newMapper() (*portmap.Manager, error) {
	if !g.opts.PortMapping || g.opts.PublicAddress.IsValid() {
		return nil, nil
	}
	m, err := portmap.New(portmap.Options{Port: g.plane.tunnel.Port(), OnChange: g.gather.again, Logger: g.log})
	if err != nil {
		return nil, fmt.Errorf("set up the port mapping: %w", err)
	}
	g.gather.mapped = m.Candidate
	return m, nil
}

// watchNetwork has everything that hangs on this machine's network looked at again when that changes, until ctx ends.
func (g *Gateway) watchNetwork(ctx context.Context) {
	for c := range nat.Watch(ctx, nat.WatchOptions{Logger: g.log}) {
		g.log.Info("the network changed", "addresses", c.Now.Addrs, "routes", len(c.Now.Routes))
		if g.mapper != nil {
			g.mapper.Refresh()
		}
		g.plane.tunnel.Refresh()
		g.gather.moved()
	}
}
