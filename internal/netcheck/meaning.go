package netcheck

import (
	"fmt"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/wire"
)

// Sizes of packets in bytes.
const (
	tunnelMTU = 1420 // what the tunnel carries inside where it can
	// What WireGuard and a relay put around a packet, with UDP and IP: RFC 791, RFC 8200, and 4 bytes of channel.
	overhead4, overhead6, overheadRelay = 20 + 8 + 32, 40 + 8 + 32, 4
	minMTU                              = 1280 // of IPv6 (RFC 8200, section 5)
)

// judge tells what was found means for a tunnel.
func judge(r *Report) (t Tunnel) {
	relayed := relayedPath(r)
	t.Possible = r.Coordinator.Reachable
	p := &t.Paths
	switch {
	case !t.Possible:
		p.Public, p.Easy, p.Hard = PathNone, PathNone, PathNone
	case !r.UDP.Works:
		p.Public, p.Easy, p.Hard = relayed, relayed, relayed
		t.Possible = relayed != PathNone
	case receptive(r):
		p.Public, p.Easy, p.Hard = PathDirect, PathDirect, PathDirect
	case r.NAT.Mapping == wire.MappingEasy:
		p.Public, p.Easy, p.Hard = PathDirect, PathDirect, PathProbing
	default: // hard, or not known: then nobody is promised more
		p.Public, p.Easy, p.Hard = PathDirect, PathProbing, relayed
	}
	t.Meaning = explain(r, &t, relayed)
	return t
}

// receptive reports whether packets come in from ports that were not sent to, so that even a peer behind a hard NAT, whose
// port nobody knows beforehand, gets through.
func receptive(r *Report) bool {
	return r.NAT.Mapping == wire.MappingEasy && (r.NAT.Filtering == nat.EndpointIndependent || r.NAT.Filtering == nat.AddressDependent)
}

// relayedPath is the best way to any relay.
func relayedPath(r *Report) Path {
	path := PathNone
	for _, relay := range r.Relays {
		if relay.UDP != nil && relay.UDP.Works {
			return PathUDP
		}
		if relay.WebSocket != nil && relay.WebSocket.Works {
			path = PathWebSocket
		}
	}
	return path
}

// explain says it in words.
func explain(r *Report, t *Tunnel, relayed Path) []string {
	if !r.Coordinator.Reachable {
		return []string{"no tunnel: the coordinator cannot be reached, and nothing works without it"}
	}
	var say []string
	add := func(format string, args ...any) { say = append(say, fmt.Sprintf(format, args...)) }
	switch t.Paths.Hard {
	case PathDirect:
		add("direct paths to every gateway that UDP reaches")
	case PathProbing:
		add("direct paths to gateways with a public address, a forwarded port or an easy NAT; to those behind hard NATs direct after some seconds of probing")
	default:
		switch {
		case t.Paths.Public == PathDirect && relayed == PathNone:
			add("direct paths to gateways with a public address or a forwarded port, after some seconds of probing to those behind easy NATs; no path to hard ones, because no relay can be reached")
		case t.Paths.Public == PathDirect:
			add("direct paths to gateways with a public address or a forwarded port, after some seconds of probing to those behind easy NATs; relayed to hard ones")
		case relayed == PathNone:
			add("no tunnel: UDP does not get out, and no relay can be reached over HTTPS")
		default:
			add("every tunnel is relayed over HTTPS, because UDP does not get out")
		}
	}
	if relayed == PathNone && t.Possible && t.Paths.Hard != relayed {
		add("no relay can be reached: until a direct path is up nothing flows, and where none comes up nothing will")
	}
	if r.UDP.Works && r.NAT.Mapping == wire.MappingUnknown {
		add("only one server answered over UDP, so whether the NAT is easy or hard could not be told: have the firewall let the coordinator's second STUN port through")
	}
	if r.UDP.Works && relayed == PathWebSocket {
		add("no relay answers over UDP, so what is relayed goes over HTTPS, which is slower")
	}
	if m := r.MTU; m != nil {
		explainMTU(m, add)
	}
	if len(r.IPv6.Addresses) > 0 && r.IPv6.Public == nil && r.UDP.Works {
		add("this host has IPv6 addresses, but no server answers over IPv6")
	}
	return say
}

func explainMTU(m *MTU, add func(string, ...any)) {
	fits := m.Bytes - overhead4 - overheadRelay
	if m.Server.Addr().Is6() {
		fits = m.Bytes - overhead6 - overheadRelay
	}
	switch {
	case fits >= tunnelMTU || m.Server.Addr().Is6() && fits >= tunnelMTU-overheadRelay:
	case fits >= minMTU:
		add("packets of at most %d bytes get out, so the tunnel's are at most %d instead of %d", m.Bytes, fits, tunnelMTU)
	default:
		add("packets of at most %d bytes get out, which is less than a tunnel needs for IPv6", m.Bytes)
	}
}
