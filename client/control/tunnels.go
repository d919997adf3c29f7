package control

import (
	"context"
	"math"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// pathClaim is GET: [Claim].
const pathClaim = "/v1/claim"

// Claim is what a tunnel has of its host at present: what other tunnels of the same user have to know.
type Claim struct {
	Name        string         `json:"name"`
	Job         string         `json:"job,omitempty"` // whose tunnel it is: "RUNNER/JOB" where it was said
	Coordinator string         `json:"coordinator"`
	Network     string         `json:"network,omitempty"`
	Interface   string         `json:"interface,omitempty"` // "" in mode proxy
	Proxy       netip.AddrPort `json:"proxy,omitzero"`      // in mode proxy
	Routes      []netip.Prefix `json:"routes,omitempty"`    // granted, those to services by name left out
	Names       []string       `json:"names,omitempty"`     // granted; "*.svc.corp" for all below svc.corp
}

// Covers reports whether a host, a name or an address, is granted.
func (c Claim) Covers(host string) bool { return c.Closeness(host) > 0 }

// Closeness is 0 for a host that is not granted, and the greater the narrower the grant is that covers it: of several networks, a host
// belongs to the one where that is the greatest.
func (c Claim) Closeness(host string) int {
	closest := 0
	if addr, err := netip.ParseAddr(host); err == nil {
		for _, p := range c.Routes {
			if p.Contains(addr.Unmap()) {
				closest = max(closest, 1+p.Bits())
			}
		}
		return closest
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	for _, name := range c.Names {
		below, wild := strings.CutPrefix(name, "*")
		switch {
		case host == name:
			return math.MaxInt
		case wild && len(host) > len(below) && strings.HasSuffix(host, below):
			closest = max(closest, len(below))
		}
	}
	return closest
}

// claimLimit is how long one tunnel may take to say what it has.
const claimLimit = time.Second

// Tunnels gives what the tunnels of this user have, and those that root runs for this user, but for one of this name. A tunnel that does not
// answer, or is of a version that does not know the question, is left out.
func Tunnels(ctx context.Context, except string) []Claim {
	names := slices.DeleteFunc(running(), func(name string) bool { return name == except })
	claims := make([]Claim, len(names))
	var group sync.WaitGroup
	for i, name := range names {
		group.Go(func() { claims[i] = claimOf(ctx, name) })
	}
	group.Wait()
	return slices.DeleteFunc(claims, func(c Claim) bool { return c.Name == "" })
}

// maxTunnels bounds how many are asked.
const maxTunnels = 256

// running lists the names of tunnels that run, sorted.
func running() []string {
	names := slices.DeleteFunc(sockets(Users()), func(name string) bool { return !nameShape.MatchString(name) })
	slices.Sort(names)
	names = slices.Compact(names)
	return names[:min(len(names), maxTunnels)]
}

// Claim is what the tunnel has of its host.
func (c *Client) Claim(ctx context.Context) (Claim, error) {
	var claim Claim
	err := c.call(ctx, http.MethodGet, pathClaim, nil, &claim)
	claim.Name = c.name // as we know it
	return claim, err
}

func claimOf(ctx context.Context, name string) Claim {
	client, err := NewClient(name)
	if err != nil {
		return Claim{}
	}
	ctx, cancel := context.WithTimeout(ctx, claimLimit)
	defer cancel()
	claim, err := client.Claim(ctx)
	if err != nil {
		return Claim{}
	}
	return claim
}
