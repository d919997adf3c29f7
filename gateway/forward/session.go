package forward

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	errorRate   = 50  // ICMP errors a second to one session
	denialRate  = 0.2 // log lines a second on one session's denied flows
	denialBurst = 10
)

// Reasons why the forwarder itself turns a flow away, next to those of [policy.Verdict].
const (
	reasonSessionFlows = "too many open flows in this session"
	reasonTotalFlows   = "too many open flows at this gateway"
	reasonRate         = "too many new flows a second"
	reasonOver         = "the session has ended"
)

// Session is one session's side of the forwarder.
type Session struct {
	id      string
	addrs   []netip.Addr
	f       *Forwarder
	ctx     context.Context
	cancel  context.CancelFunc
	limiter *rate.Limiter // new flows
	errors  *rate.Limiter // ICMP errors
	denials *rate.Limiter // log lines

	allowed, denied, failed, up, down atomic.Uint64
	suppressed                        atomic.Uint64 // denials since the last log line

	// mu orders decisions and changes of scope: a flow is in the table before the next scope is looked at.
	mu    sync.Mutex
	scope *policy.Scope
	flows map[flowKey]*flow
	ended bool
}

// flowKey names a flow within its session. ICMP has the identifier where TCP and UDP have the source port, and no
// destination port.
type flowKey struct {
	proto    policy.Proto
	src, dst netip.AddrPort
}

// flow is one open flow.
type flow struct {
	s    *Session
	key  flowKey
	rule string
	idle time.Duration
	last atomic.Int64 // time of the last data, Unix nanoseconds
	// quote is the head of the packet that opened the flow, for ICMP errors about it.
	quote []byte

	ctx    context.Context // ended by reset and close
	cancel context.CancelFunc

	mu    sync.Mutex
	abort []func() // undo what has been opened so far, at once
	dead  bool

	echo chan []byte // ICMP only: requests on their way out
}

// admit decides on a flow and, where it may, puts it into the table, with one unit of the forwarder's work that ends with
// [flow.close]. It returns nil with a reason where not. known says that the flow is there already.
func (s *Session) admit(key flowKey, idle time.Duration) (fl *flow, reason string, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil, reasonOver, false
	}
	if fl := s.flows[key]; fl != nil {
		return fl, "", true
	}
	v := s.f.decide(s.scope, policy.Flow{Proto: key.proto, Dst: key.dst})
	switch {
	case !v.Allowed:
		return nil, v.Reason, false
	case len(s.flows) >= s.f.limits.SessionFlows:
		return nil, reasonSessionFlows, false
	case !s.limiter.Allow():
		return nil, reasonRate, false
	case s.f.flows.Add(1) > int64(s.f.limits.TotalFlows):
		s.f.flows.Add(-1)
		return nil, reasonTotalFlows, false
	}
	fl = &flow{s: s, key: key, rule: v.Rule, idle: idle}
	if key.proto == policy.ICMP {
		fl.echo = make(chan []byte, echoQueue)
	}
	fl.ctx, fl.cancel = context.WithCancel(s.ctx)
	fl.touch()
	s.flows[key] = fl
	s.allowed.Add(1)
	s.f.work.Add(1)
	return fl, "", false
}

// find gives an open flow; nil if there is none.
func (s *Session) find(key flowKey) *flow {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flows[key]
}

// SetScope changes what the session may reach. Open flows that the new scope does not give are reset.
func (s *Session) SetScope(scope *policy.Scope) {
	s.mu.Lock()
	s.scope = scope
	s.mu.Unlock()
	s.resetIf(func(fl *flow) bool {
		return !s.f.decide(scope, policy.Flow{Proto: fl.key.proto, Dst: fl.key.dst}).Allowed
	})
}

// resetIf resets the flows for which gone is true.
func (s *Session) resetIf(gone func(*flow) bool) {
	s.mu.Lock()
	var reset []*flow
	for _, fl := range s.flows {
		if gone(fl) {
			reset = append(reset, fl)
		}
	}
	s.mu.Unlock()
	for _, fl := range reset {
		fl.reset()
	}
}

// end resets everything and takes no new flow.
func (s *Session) end() {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.resetIf(func(*flow) bool { return true })
	s.cancel()
}

func (s *Session) has(a netip.Addr) bool { return slices.Contains(s.addrs, a) }

// Counts gives the session's counters.
func (s *Session) Counts() wire.FlowCounts {
	s.mu.Lock()
	open := len(s.flows)
	s.mu.Unlock()
	return wire.FlowCounts{
		Open: uint64(open), Allowed: s.allowed.Load(), Denied: s.denied.Load(), Failed: s.failed.Load(),
		BytesUp: s.up.Load(), BytesDn: s.down.Load(),
	}
}

// deny counts and logs a flow that was turned away. A job that tries again and again does not fill the log.
func (s *Session) deny(key flowKey, reason string) {
	s.denied.Add(1)
	if !s.denials.Allow() {
		s.suppressed.Add(1)
		return
	}
	s.f.log.Info("flow denied", "session", s.id, "code", problem.FlowDenied, "proto", protoName(key.proto),
		"addr", key.dst, "reason", reason, "suppressed", s.suppressed.Swap(0))
}

// fail counts and logs a flow whose target refused or did not answer.
func (fl *flow) fail(err error) {
	fl.s.failed.Add(1)
	fl.s.f.log.Debug("flow failed", "session", fl.s.id, "code", problem.FlowUnreachable, "proto", protoName(fl.key.proto),
		"addr", fl.key.dst, "rule", fl.rule, "err", err)
}

// Reach tries a TCP target as the session would. It takes at most the dial timeout and counts as a new flow.
func (s *Session) Reach(target netip.AddrPort) wire.ReachResult {
	res := wire.ReachResult{Target: target.String(), Verdict: wire.FlowDenied}
	fl, reason, known := s.admit(flowKey{proto: policy.TCP, dst: target}, s.f.limits.TCPIdle)
	if known {
		res.Reason = "this target is being tried already"
		res.Verdict = wire.Unreachable
		return res
	}
	if fl == nil {
		s.deny(flowKey{proto: policy.TCP, dst: target}, reason)
		res.Reason = reason
		return res
	}
	defer fl.close()
	res.Rule = fl.rule
	start := time.Now()
	conn, err := s.f.dial(fl.ctx, "tcp", target)
	if err != nil {
		fl.fail(err)
		res.Verdict, res.Reason = wire.Unreachable, dialReason(err)
		return res
	}
	res.Verdict, res.RTT = wire.Reachable, wire.Duration(time.Since(start))
	_ = conn.Close()
	return res
}

// dial opens a connected socket to a target.
func (f *Forwarder) dial(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{Timeout: f.limits.DialTimeout, KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: keepaliveIdle, Interval: keepaliveInterval, Count: keepaliveCount,
	}}
	return d.DialContext(ctx, network, to.String())
}

func (fl *flow) touch() { fl.last.Store(time.Now().UnixNano()) }

func (fl *flow) idleSince(now time.Time) time.Duration {
	return time.Duration(now.UnixNano() - fl.last.Load())
}

// onReset adds what a reset has to undo; false says that the flow has been reset already, and that undo has been called.
func (fl *flow) onReset(undo func()) bool {
	fl.mu.Lock()
	if !fl.dead {
		fl.abort = append(fl.abort, undo)
		fl.mu.Unlock()
		return true
	}
	fl.mu.Unlock()
	undo()
	return false
}

// reset ends a flow at once, towards both sides. Whoever carries it notices and closes it.
func (fl *flow) reset() {
	fl.mu.Lock()
	undo := fl.abort
	fl.abort, fl.dead = nil, true
	fl.mu.Unlock()
	fl.cancel()
	for _, f := range undo {
		f()
	}
}

// close takes the flow out of its session's table. Every admitted flow is closed exactly once.
func (fl *flow) close() {
	fl.cancel()
	fl.s.mu.Lock()
	delete(fl.s.flows, fl.key)
	fl.s.mu.Unlock()
	fl.s.f.flows.Add(-1)
	fl.s.f.work.Done()
}
