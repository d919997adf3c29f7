package agent

import (
	"net"
	"net/netip"
	"slices"
	"strconv"

	"github.com/culvertnet/culvert/gateway/forward"
	"github.com/culvertnet/culvert/gateway/names"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// defaultServices is where service addresses come from unless the coordinator says otherwise.
var defaultServices = netip.MustParsePrefix("198.19.0.0/16")

// serviceRanges makes the ranges of service addresses out of what a welcome says.
func serviceRanges(addrs []netip.Addr, services netip.Prefix) (names.Ranges, error) {
	if !services.IsValid() {
		services = defaultServices
	}
	r, err := names.NewRanges(services, addrs[1])
	if err == nil && (r.Contains(addrs[0]) || r.Contains(addrs[1])) {
		err = problem.New(problem.Incompatible, "the range of service addresses holds the gateway's own overlay address", "")
	}
	if err != nil {
		return names.Ranges{}, problem.Wrap(err, problem.Incompatible, "the coordinator gives the gateway no usable range of service addresses",
			"check services in the coordinator's file: an IPv4 range between /8 and /29 of its own")
	}
	return r, nil
}

// grantedNames tells a client which names it may ask for; nil where there is none.
func grantedNames(scope *policy.Scope, servers []netip.Addr, ranges names.Ranges) *wire.Names {
	exact, below := scope.Names()
	if len(exact)+len(below) == 0 {
		return nil
	}
	return &wire.Names{Servers: servers, Exact: exact, Suffixes: below, Services: ranges.Prefixes()}
}

// reach is what a session may reach at this moment: routes, those to service addresses included, and names.
func (d *door) reach(s *session) ([]netip.Prefix, *wire.Names) {
	s.mu.Lock()
	scope := s.scope
	s.mu.Unlock()
	ranges := d.plane.services()
	named := grantedNames(scope, d.plane.addresses(), ranges)
	routes := scope.Routes()
	if named != nil {
		routes = slices.Concat(routes, ranges.Prefixes())
	}
	return routes, named
}

// parseTarget reads "host:port", where host is an address or a name.
func parseTarget(text string) (forward.Target, error) {
	host, service, err := net.SplitHostPort(text)
	port, perr := strconv.ParseUint(service, 10, 16)
	if err == nil && perr == nil && port != 0 {
		if addr, err := netip.ParseAddr(host); err == nil {
			return forward.Target{Addr: addr.Unmap(), Port: uint16(port)}, nil
		}
		if name, ok := policy.CanonicalName(host); ok {
			return forward.Target{Name: name, Port: uint16(port)}, nil
		}
	}
	return forward.Target{}, problem.New(problem.BadRequest, "the target is not a host and a port", "name the target as HOST:PORT")
}
