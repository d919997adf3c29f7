package state

// Counts are the live leases and gateways of a network, as this node's mirror has them.
type Counts struct {
	Sessions int // leases that are not over
	Gateways int // that take sessions
}

// Counts gives what there is in each network that has any, without copying it.
func (s *Store) Counts() map[string]Counts {
	out := map[string]Counts{}
	now := s.now()
	s.bucket.mirror.each(leaseKind, now, func(r record) {
		if l := r.(Lease); l.Over == "" {
			c := out[l.Network]
			c.Sessions++
			out[l.Network] = c
		}
	})
	s.bucket.mirror.each(gatewayKind, now, func(r record) {
		if p := r.(presence); !p.Leaving {
			c := out[p.Network]
			c.Gateways++
			out[p.Network] = c
		}
	})
	return out
}

// Connected reports whether there is a connection to NATS.
func (s *Store) Connected() bool { return s.conn.IsConnected() }
