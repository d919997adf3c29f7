package agent

import (
	"net/netip"
	"testing"
	"time"

	"github.com/culvertnet/culvert/client/control"
	granted "github.com/culvertnet/culvert/client/names"
	"github.com/culvertnet/culvert/internal/problem"
)

// beside makes the agent of a job that has the tunnels of others beside its own.
func beside(job string, claims ...control.Claim) *Agent {
	a := &Agent{opts: Options{Name: "own", Job: job}, direct: newOutside(), granted: granted.NewResolver(nil)}
	a.others.claims, a.others.asked = claims, time.Now().Add(time.Hour) // not to be asked again
	return a
}

// A proxy leads to the job's other networks, and to nobody else's: runners of one machine may run as one user.
func TestProxiesLeadToNetworksOfTheSameJob(t *testing.T) {
	proxy := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port) }
	claim := func(job string, port uint16, names ...string) control.Claim {
		return control.Claim{Name: "other", Job: job, Proxy: proxy(port), Names: names, Routes: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}}
	}
	for name, c := range map[string]struct {
		other control.Claim
		host  string
		want  netip.AddrPort
	}{
		"name of the same job":        {claim("r1/j1", 1000, "db.internal"), "db.internal", proxy(1000)},
		"address of the same job":     {claim("r1/j1", 1000), "10.9.0.4", proxy(1000)},
		"name that nobody has":        {claim("r1/j1", 1000, "db.internal"), "db.example", netip.AddrPort{}},
		"job of another runner":       {claim("r2/j2", 1000, "db.internal"), "db.internal", netip.AddrPort{}},
		"former job of the runner":    {claim("r1/j0", 1000, "db.internal"), "10.9.0.4", netip.AddrPort{}},
		"tunnel of no job":            {claim("", 1000, "db.internal"), "db.internal", netip.AddrPort{}},
		"interface instead of proxy":  {control.Claim{Name: "other", Job: "r1/j1", Interface: "culvert1", Names: []string{"db.internal"}}, "db.internal", netip.AddrPort{}},
		"proxy that is not this host": {control.Claim{Name: "other", Job: "r1/j1", Proxy: netip.MustParseAddrPort("192.0.2.1:80"), Names: []string{"db.internal"}}, "db.internal", netip.AddrPort{}},
	} {
		a := beside("r1/j1", c.other)
		if got, ok := a.elsewhere(t.Context(), c.host); got != c.want || ok != c.want.IsValid() {
			t.Errorf("%s: %v, %t; want %v", name, got, ok, c.want)
		}
	}
}

// What two networks both grant is refused in so many words; what is narrower in one of them is not.
func TestNetworksThatGrantTheSameAreRefused(t *testing.T) {
	claim := func(routes []string, names ...string) control.Claim {
		c := control.Claim{Name: "one", Names: names}
		for _, r := range routes {
			c.Routes = append(c.Routes, netip.MustParsePrefix(r))
		}
		return c
	}
	for name, c := range map[string]struct {
		a, b control.Claim
		both int
	}{
		"nothing in common":      {claim([]string{"10.1.0.0/16"}, "db.internal"), claim([]string{"10.2.0.0/16"}, "db.example"), 0},
		"narrower":               {claim([]string{"10.1.0.0/16"}), claim([]string{"10.1.2.0/24"}), 0},
		"the same prefix":        {claim([]string{"10.1.0.0/16"}), claim([]string{"10.1.0.0/16"}), 1},
		"the same name":          {claim(nil, "db.internal"), claim(nil, "db.internal"), 1},
		"name under a wildcard":  {claim(nil, "a.svc.corp"), claim(nil, "*.svc.corp"), 1},
		"wildcard below another": {claim(nil, "*.a.svc.corp"), claim(nil, "*.svc.corp"), 1},
		"the wildcard's own end": {claim(nil, "svc.corp"), claim(nil, "*.svc.corp"), 0},
	} {
		if ab, ba := len(inBoth(c.a, c.b)), len(inBoth(c.b, c.a)); ab != c.both || ba != c.both {
			t.Errorf("%s: %d and %d in common, want %d", name, ab, ba, c.both)
		}
	}
	if err := beside("").clash(t.Context()); err != nil {
		t.Errorf("a tunnel without an interface: %s: %v", problem.CodeOf(err), err)
	}
}
