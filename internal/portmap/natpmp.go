package portmap

import (
	"context"
	"errors"
	"net/netip"
	"time"

	natpmp "github.com/jackpal/go-nat-pmp"
)

// pmp is a router that speaks NAT-PMP.
type pmp struct{ router netip.Addr }

func probeNATPMP(ctx context.Context, router, self netip.Addr) (method, error) {
	p := &pmp{router: router}
	_, err := p.client(ctx, self).GetExternalAddress()
	return p, err
}

// pmpTimeout bounds one call. The module knows no context, so the end of one is noticed only after that.
const pmpTimeout = 1500 * time.Millisecond

// client makes a client for one call.
func (p *pmp) client(ctx context.Context, self netip.Addr) *natpmp.Client {
	left := pmpTimeout
	if deadline, ok := ctx.Deadline(); ok {
		left = min(left, max(time.Until(deadline), time.Millisecond))
	}
	return natpmp.NewClientWithLocalAndTimeout(p.router.AsSlice(), self.AsSlice(), left)
}

func (*pmp) name() string { return "NAT-PMP" }

func (p *pmp) add(ctx context.Context, r request) (mapping, error) {
	got, err := p.client(ctx, r.self).AddPortMapping("udp", int(r.port), int(r.wish()), int(seconds(r.lifetime)))
	if err != nil {
		return mapping{}, err
	}
	if got.InternalPort != r.port {
		return mapping{}, errors.New("the router speaks of another port than was asked for")
	}
	seen, err := p.client(ctx, r.self).GetExternalAddress()
	if err != nil {
		return mapping{}, err
	}
	return mapping{
		external: netip.AddrPortFrom(netip.AddrFrom4(seen.ExternalIPAddress), got.MappedExternalPort),
		lifetime: time.Duration(got.PortMappingLifetimeInSeconds) * time.Second,
	}, nil
}

// verify asks again: a renewal is one datagram.
func (p *pmp) verify(ctx context.Context, r request, _ mapping) (mapping, error) {
	return p.add(ctx, r)
}

// remove asks for a lifetime and an external port of 0 (RFC 6886, section 3.4).
func (p *pmp) remove(ctx context.Context, r request, _ mapping) error {
	_, err := p.client(ctx, r.self).AddPortMapping("udp", int(r.port), 0, 0)
	return err
}
