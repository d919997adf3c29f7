package server

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"net"
	"net/http"
	"net/netip"

	"github.com/go-chi/chi/v5/middleware"

	"github.com/culvertnet/culvert/internal/nat"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/relay"
)

// openUDP opens the UDP ports, as far as there are to be any, and the relay, which does without them where there are none.
func (s *Server) openUDP(ctx context.Context) (err error) {
	switch {
	case !s.config.Relay.Off:
		s.relay, err = relay.New(ctx, s.relayOptions())
	case s.config.UDP != "":
		s.stun, err = nat.Listen(ctx, nat.ServerOptions{Addr: s.config.UDP, Logger: s.log})
	}
	if err != nil {
		return problem.Wrap(err, problem.BadConfig, fmt.Sprintf("cannot listen on UDP %s: %v", s.config.UDP, problem.Reason(err)), problem.PortNext(err))
	}
	return s.openProbe(ctx)
}

func (s *Server) relayOptions() relay.Options {
	c := s.config.Relay
	return relay.Options{
		UDP: s.config.UDP, Keys: []ed25519.PublicKey{s.tickets.Public().(ed25519.PublicKey)},
		Rate: c.BytesPerSecond(), FlowQueue: c.QueueBytes(), Sessions: c.Sessions, Logger: s.log,
		Remote: func(r *http.Request) netip.Addr { return middleware.GetClientIPAddr(r.Context()) },
	}
}

// openProbe opens the second STUN port. Unless it was asked for, the coordinator does without.
func (s *Server) openProbe(ctx context.Context) (err error) {
	if s.config.Probe == "" {
		return nil
	}
	s.probe, err = nat.Listen(ctx, nat.ServerOptions{Addr: s.config.Probe, Logger: s.log})
	switch {
	case err == nil:
	case s.config.ProbeChosen:
		return problem.Wrap(err, problem.BadConfig, fmt.Sprintf("cannot listen on UDP %s: %v", s.config.Probe, problem.Reason(err)),
			"give probe another address, or set probe: off")
	default:
		s.log.Warn("no second STUN port, so jobs learn less about their NAT", "addr", s.config.Probe, "err", err)
	}
	return nil
}

// STUNAddr is the UDP address on which STUN is answered; nil without UDP.
func (s *Server) STUNAddr() net.Addr {
	switch {
	case s.relay != nil && s.relay.Addr().IsValid():
		return net.UDPAddrFromAddrPort(s.relay.Addr())
	case s.stun != nil:
		return s.stun.Addr()
	}
	return nil
}

// ports are the UDP ports that answer STUN.
func (s *Server) ports() []net.Addr {
	var out []net.Addr
	if addr := s.STUNAddr(); addr != nil {
		out = append(out, addr)
	}
	if s.probe != nil {
		out = append(out, s.probe.Addr())
	}
	return out
}

// stunAt says for the log where STUN is answered: what clients are told has no host where that is the coordinator's own.
func (s *Server) stunAt() []string {
	if len(s.config.STUN) > 0 {
		return s.config.STUN
	}
	var out []string
	for _, addr := range s.ports() {
		out = append(out, addr.String())
	}
	return out
}
