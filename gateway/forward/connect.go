package forward

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/culvertnet/culvert/gateway/names"
	"github.com/culvertnet/culvert/internal/eyeballs"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// maxTargets bounds the addresses of one name that a flow tries.
const maxTargets = 8

// refusedError says that a name leads nowhere that the session may go.
type refusedError struct{ reason, next string }

// Error gives the reason.
func (e *refusedError) Error() string { return e.reason }

// connect opens a connected socket to where a flow leads: its destination, or an address of the name behind it that policy
// lets through. It takes no longer than a dial may.
func (f *Forwarder) connect(fl *flow, network string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(fl.ctx, f.limits.DialTimeout)
	defer cancel()
	if fl.name == "" {
		fl.target.Store(&fl.key.dst)
		return f.dial(ctx, network, fl.key.dst)
	}
	targets, verdicts, err := f.resolve(ctx, fl)
	if err != nil {
		return nil, err
	}
	var conn net.Conn
	if network == "tcp" {
		conn, err = eyeballs.Dial(ctx, targets, func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
			return f.dial(ctx, network, to)
		})
	} else {
		conn, err = f.dialFirst(ctx, network, targets)
	}
	if err != nil {
		fl.granted(verdicts[0])
		return nil, err
	}
	to := remote(conn)
	if !fl.settle(to, verdicts[max(slices.Index(targets, to), 0)]) {
		_ = conn.Close()
		return nil, context.Canceled
	}
	return conn, nil
}

// remote is the address that a socket is connected to.
func remote(conn net.Conn) netip.AddrPort {
	to, _ := netip.ParseAddrPort(conn.RemoteAddr().String()) // it was dialled as one
	return netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
}

// resolve gives the addresses of a flow's name that policy lets through, and what it says of each. The flow is refused where
// there is none.
func (f *Forwarder) resolve(ctx context.Context, fl *flow) ([]netip.AddrPort, []policy.Verdict, error) {
	addrs, err := fl.s.lookup(ctx, fl.name)
	if err != nil {
		fl.granted(fl.Verdict)
		return nil, nil, err
	}
	scope := fl.s.scope.Load()
	var targets []netip.AddrPort
	var verdicts []policy.Verdict
	var refused refusedError
	for _, a := range eyeballs.Interleave(addrs) {
		to := netip.AddrPortFrom(a.Unmap(), fl.key.dst.Port())
		v := scope.DecideName(fl.name, policy.Flow{Proto: fl.key.proto, Dst: to})
		if !v.Allowed {
			refused = refusedError{"its name leads to: " + v.Reason, scope.RemedyName(fl.name, policy.Flow{Proto: fl.key.proto, Dst: to})}
		} else if len(targets) < maxTargets {
			targets, verdicts = append(targets, to), append(verdicts, v)
		}
	}
	if len(targets) == 0 {
		return nil, nil, &refused
	}
	return targets, verdicts, nil
}

// lookup resolves a name within what the session may have resolved at once.
func (s *Session) lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	done, ok := s.TakeLookup()
	if !ok {
		return nil, names.ErrBusy
	}
	defer done()
	return s.f.resolver.Addrs(ctx, name, s.ExactName(name))
}

// settle notes where the flow of a name leads, and what policy says of it. False says that the scope has changed meanwhile
// and no longer gives it.
func (fl *flow) settle(to netip.AddrPort, v policy.Verdict) bool {
	fl.target.Store(&to)
	fl.granted(v)
	if !fl.allowedBy(fl.s.scope.Load()) { // whoever changed the scope did not know the target yet
		fl.because(wire.CauseRevoked)
		return false
	}
	return true
}

// dialFirst opens a socket to the first target to which this host has a way, IPv4 first: datagrams get no second chance.
func (f *Forwarder) dialFirst(ctx context.Context, network string, targets []netip.AddrPort) (net.Conn, error) {
	ordered := slices.Clone(targets)
	slices.SortStableFunc(ordered, func(a, b netip.AddrPort) int { return a.Addr().BitLen() - b.Addr().BitLen() })
	var errs []error
	for _, to := range ordered {
		conn, err := f.dial(ctx, network, to)
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// dial opens a connected socket to an address.
func dial(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	if network == "tcp" {
		return dialTCP(ctx, to)
	}
	d := net.Dialer{Control: unicastOnly}
	return d.DialContext(ctx, network, to.String())
}

// turnAway counts and logs a flow that came to nothing because of err, and says what its job is to see.
func (fl *flow) turnAway(err error) rejection {
	refused, ok := errors.AsType[*refusedError](err)
	if !ok {
		fl.fail(err)
		return rejectFor(err)
	}
	fl.mu.Lock()
	fl.Verdict = policy.Verdict{Rule: fl.Rule, Reason: refused.reason}
	fl.mu.Unlock()
	fl.s.counts.denied.Add(1)
	if fl.s.denials.Allow() {
		fl.s.f.log.Info("flow denied", "session", fl.s.id, "code", problem.FlowDenied, "proto", protoName(fl.key.proto),
			"addr", fl.key.dst, "name", fl.name, "reason", refused.reason, "suppressed", fl.s.suppressed.Swap(0))
	} else {
		fl.s.suppressed.Add(1)
	}
	return prohibited
}

// Target is what [Session.Reach] tries: a name, or an address where there is none, and a TCP port.
type Target struct {
	Name string // canonical
	Addr netip.Addr
	Port uint16
}

// Reach tries a TCP target as the session would. It takes at most the dial timeout and counts as a new flow.
func (s *Session) Reach(target Target) wire.ReachResult {
	res := wire.ReachResult{Verdict: wire.FlowDenied}
	addr := target.Addr
	if target.Name != "" {
		var ok bool
		if addr, ok = s.serviceAddr(target.Name); !ok {
			res.Reason, res.Next = "not granted by this name", s.scope.Load().RemedyOffer(target.Name, policy.TCP, target.Port)
			return res
		}
	}
	key := flowKey{proto: policy.TCP, dst: netip.AddrPortFrom(addr, target.Port)}
	fl, why, known := s.admit(key, s.f.limits.TCPIdle)
	if known {
		res.Verdict, res.Reason = wire.Unreachable, "this target is being tried already"
		return res
	}
	if fl == nil {
		s.deny(key, why)
		res.Reason, res.Next = why.Reason, s.remedy(key, why)
		return res
	}
	defer fl.close()
	res.Rule = fl.Rule
	start := time.Now()
	conn, err := s.f.connect(fl, "tcp")
	if err != nil {
		why := fl.turnAway(err)
		if refused, ok := errors.AsType[*refusedError](err); ok && why == prohibited {
			res.Reason, res.Next = refused.reason, refused.next
			return res
		}
		res.Verdict, res.Reason = wire.Unreachable, dialReason(err)
		return res
	}
	res.Verdict, res.RTT = wire.Reachable, wire.Duration(time.Since(start))
	_ = conn.Close()
	return res
}

// remedy is what has to change for a flow that policy refuses; "" where it is a limit that does.
func (s *Session) remedy(key flowKey, why judgement) string {
	scope := s.scope.Load()
	switch {
	case why.limit || why.Reason == reasonOver || why.Reason == reasonHeld:
		return ""
	case why.Reason == reasonNoName:
		return "look the name up again, by the DNS inside the tunnel"
	case why.name != "":
		return scope.RemedyOffer(why.name, key.proto, key.dst.Port())
	}
	return scope.Remedy(policy.Flow{Proto: key.proto, Dst: key.dst})
}
