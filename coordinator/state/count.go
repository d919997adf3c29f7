package state

import "unique"

// Counts are the live leases and gateways of a network, as this node's mirror has them.
type Counts struct {
	Sessions int // leases that are not over
	Gateways int // that take sessions
}

// Counts gives what there is in each network that has any, without copying it.
func (s *Store) Counts() map[string]Counts {
	out, sessions := map[string]Counts{}, map[unique.Handle[string]]int{}
	now := s.now()
	s.bucket.mirror.each(leaseKind, now, func(r record) {
		if l := r.(*compact); l.over == unover {
			sessions[l.network]++
		}
	})
	s.bucket.mirror.each(gatewayKind, now, func(r record) {
		if p := r.(presence); !p.Leaving {
			c := out[p.Network]
			c.Gateways++
			out[p.Network] = c
		}
	})
	for network, n := range sessions {
		c := out[network.Value()]
		c.Sessions = n
		out[network.Value()] = c
	}
	return out
}

// Held counts the leases that a gateway instance holds and that are not over, as this node's mirror has them.
func (s *Store) Held(instance string) int { return s.bucket.mirror.heldBy(instance) }

// Connected reports whether there is a connection to NATS.
func (s *Store) Connected() bool { return s.conn.IsConnected() }
