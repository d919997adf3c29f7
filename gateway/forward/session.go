package forward

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/gateway/names"
	"github.com/culvertnet/culvert/internal/netstack"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	errorRate   = 50  // ICMP errors a second to one session
	denialRate  = 0.2 // log lines a second on one session's denied flows
	denialBurst = 10
	askRate     = 300 // datagrams and connections a second to the gateway itself; the buffers of its sockets hold as many
	echoRate    = 50  // datagrams a second to the gateway's own echo port
	maxLookups  = 32  // names that one session has resolved at once
)

// Reasons why the forwarder itself turns a flow away, next to those of [policy.Verdict].
const (
	reasonSessionFlows = "too many open flows in this session"
	reasonTotalFlows   = "too many open flows at this gateway"
	reasonRate         = "too many new flows a second"
	reasonServed       = "too many connections to the gateway itself"
	reasonOver         = "the session has ended"
	reasonNoName       = "no name has this service address in this session"
)

// Session is one session's side of the forwarder.
type Session struct {
	id      string
	addrs   []netip.Addr
	f       *Forwarder
	ctx     context.Context
	cancel  context.CancelFunc
	purse   purse
	limiter *rate.Limiter // new flows
	errors  *rate.Limiter // ICMP errors
	denials *rate.Limiter // log lines
	asks    *rate.Limiter // packets to the gateway itself
	echoes  *rate.Limiter // datagrams to the gateway's own echo port
	queries *rate.Limiter // DNS questions
	lookups chan struct{} // places for names being resolved

	counts     counters
	reached    reached
	suppressed atomic.Uint64 // denials since the last log line
	scope      atomic.Pointer[policy.Scope]
	lane       atomic.Pointer[netstack.Lane]
	awaits     atomic.Bool // see [Session.AwaitNames]

	// carrying is held by the one of the session's UDP flows that carries some, so that a session with many flows keeps a gateway no
	// busier than one with one.
	carrying sync.Mutex

	hungry      int64         // of Forwarder.hungry
	hungryFlows census        // those that want to send faster
	gate        chan struct{} // see [turn]

	// mu orders decisions and changes of scope: a flow is in the table before the next scope is looked at.
	mu     sync.Mutex
	flows  map[flowKey]*flow // nil until the first
	served int               // of those, connections to the gateway itself
	book   *names.Book       // nil until the first name
	ended  bool
	// heldUntil is until when no flow begins, see [Session.HoldIfQuiet].
	heldUntil time.Time
}

// counters are what a session's flows have done.
type counters struct {
	allowed, observed, denied, limited, failed, up, down atomic.Uint64
}

// flowKey names a flow within its session. ICMP has the identifier where TCP and UDP have the source port, and no
// destination port.
type flowKey struct {
	proto    policy.Proto
	src, dst netip.AddrPort
}

// judgement is what is decided on a flow before it begins.
type judgement struct {
	policy.Verdict
	name   string // the name behind a service address
	served bool   // a connection to the gateway itself
	limit  bool   // not policy but a limit refuses
}

func (f *Forwarder) newSession(id string, addrs []netip.Addr, scope *policy.Scope) *Session {
	l := &f.limits
	s := &Session{
		id: id, addrs: append([]netip.Addr(nil), addrs...), f: f,
		purse:   purse{limit: l.SessionBytes, from: &f.purse},
		limiter: rate.NewLimiter(rate.Limit(l.SessionRate), l.SessionRate),
		errors:  rate.NewLimiter(errorRate, errorRate),
		denials: rate.NewLimiter(denialRate, denialBurst),
		asks:    rate.NewLimiter(askRate, askRate),
		echoes:  rate.NewLimiter(echoRate, 2*echoRate),
		queries: rate.NewLimiter(rate.Limit(l.SessionQueries), l.SessionQueries),
		lookups: make(chan struct{}, maxLookups),
		gate:    make(chan struct{}, 1),
	}
	s.scope.Store(scope)
	s.ctx, s.cancel = context.WithCancel(f.ctx)
	return s
}

// SetLane says where what is sent to the session waits for its turn, so that its buffers do not grow while enough waits there.
func (s *Session) SetLane(l *netstack.Lane) { s.lane.Store(l) }

// crowded reports that enough waits for its turn.
func (s *Session) crowded() bool {
	l := s.lane.Load()
	return l != nil && l.Crowded()
}

// judge holds a new flow against the scope. mu is held.
func (s *Session) judge(key flowKey) judgement {
	scope := s.scope.Load()
	if !s.f.ranges.Contains(key.dst.Addr()) {
		return judgement{Verdict: s.f.decide(scope, policy.Flow{Proto: key.proto, Dst: key.dst})}
	}
	if name, ok := s.theBook().Name(key.dst.Addr()); ok {
		return judgement{Verdict: scope.OffersName(name, key.proto, key.dst.Port()), name: name}
	}
	if s.awaits.Load() {
		return judgement{Verdict: policy.Verdict{Reason: reasonHeld}}
	}
	return judgement{Verdict: policy.Verdict{Reason: reasonNoName}}
}

// admit decides on a flow and, where it may, puts it into the table, with one unit of the forwarder's work that ends with
// [flow.close]. Where not, it returns nil and why. known says that the flow is there already.
func (s *Session) admit(key flowKey, idle time.Duration) (fl *flow, why judgement, known bool) {
	return s.enter(key, idle, s.judge)
}

// enter is admit with a judge of the caller's; it is called with mu held.
func (s *Session) enter(key flowKey, idle time.Duration, judge func(flowKey) judgement) (fl *flow, why judgement, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil, judgement{Verdict: policy.Verdict{Reason: reasonOver}}, false
	}
	if fl := s.flows[key]; fl != nil {
		return fl, judgement{}, true
	}
	j := judge(key)
	if s.waits(j.served) {
		return nil, judgement{Verdict: policy.Verdict{Reason: reasonHeld}}, false
	}
	if j.Allowed {
		if reason := s.limit(j.served); reason != "" {
			j.Allowed, j.Reason, j.limit = false, reason, true
		}
	}
	if !j.Allowed {
		return nil, j, false
	}
	return s.begin(key, idle, j), j, false
}

// limit takes a new flow from the session's and the process's allowances; it says what is used up. mu is held.
func (s *Session) limit(served bool) string {
	switch l := &s.f.limits; {
	case len(s.flows) >= l.SessionFlows:
		return reasonSessionFlows
	case served && s.served >= l.SessionServed:
		return reasonServed
	case !s.limiter.Allow():
		return reasonRate
	case !s.f.room(len(s.flows)):
		return reasonTotalFlows
	}
	return ""
}

// begin puts a flow that may be into the table. mu is held.
func (s *Session) begin(key flowKey, idle time.Duration, j judgement) *flow {
	fl := &flow{s: s, key: key, judgement: j, idle: idle, began: time.Now(), floors: floorsFor(len(s.flows))}
	if key.proto == policy.ICMP {
		fl.echo = make(chan ping, echoQueue)
	}
	fl.ctx, fl.cancel = context.WithCancel(s.ctx)
	fl.touch()
	if len(s.flows) == 0 {
		s.f.busy.Add(1)
		if s.flows == nil {
			s.flows = make(map[flowKey]*flow)
		}
	}
	s.flows[key] = fl
	if j.served {
		s.served++
	} else {
		fl.number = s.f.numbers.Add(1)
		if fl.name == "" {
			fl.granted(j.Verdict)
		}
	}
	s.f.work.Add(1)
	return fl
}

// drop takes a flow out of the table.
func (s *Session) drop(fl *flow) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.flows, fl.key)
	if fl.served {
		s.served--
	}
	if len(s.flows) == 0 {
		s.flows = nil // a map keeps the room that it once had
		s.f.busy.Add(-1)
	}
}

// find gives an open flow; nil if there is none.
func (s *Session) find(key flowKey) *flow {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flows[key]
}

// open lists the open flows.
func (s *Session) open() []*flow {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.flows) == 0 {
		return nil
	}
	return slices.Collect(maps.Values(s.flows))
}

// SetScope changes what the session may reach. Open flows that the new scope does not give are reset.
func (s *Session) SetScope(scope *policy.Scope) {
	s.mu.Lock()
	s.scope.Store(scope)
	if s.book != nil {
		exact, _ := scope.Names()
		s.book.Fix(exact)
	}
	s.mu.Unlock()
	for _, fl := range s.open() {
		if !fl.allowedBy(scope) {
			fl.reset(wire.CauseRevoked)
		}
	}
}

// end resets everything and takes no new flow.
func (s *Session) end() {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	for _, fl := range s.open() {
		fl.reset(wire.CauseSession)
	}
	s.cancel()
}

// Counts gives the session's counters.
func (s *Session) Counts() wire.FlowCounts {
	s.mu.Lock()
	open := len(s.flows)
	s.mu.Unlock()
	c := &s.counts
	return wire.FlowCounts{
		Open: uint64(open), Allowed: c.allowed.Load(), Observed: c.observed.Load(), Denied: c.denied.Load(), Limited: c.limited.Load(),
		Failed: c.failed.Load(), BytesUp: c.up.Load(), BytesDn: c.down.Load(),
	}
}

// deny counts, traces and logs a flow that was turned away. A job that tries again and again does not fill the log.
func (s *Session) deny(key flowKey, why judgement) {
	verdict, code := wire.FlowRefused, problem.FlowDenied
	if why.limit {
		verdict, code = wire.FlowOverLimits, problem.RateLimited
		s.counts.limited.Add(1)
	} else {
		s.counts.denied.Add(1)
	}
	if why.served {
		return // between the job and the gateway alone
	}
	s.tell(wire.FlowRecord{
		Session: s.id, Proto: protoName(key.proto), Name: why.name, Addr: key.dst, Verdict: verdict,
		Rule: why.Rule, Reason: why.Reason, Began: time.Now(), Count: 1,
	})
	if !s.denials.Allow() {
		s.suppressed.Add(1)
		return
	}
	s.f.log.Info("flow denied", "session", s.id, "code", code, "proto", protoName(key.proto),
		"addr", key.dst, "name", why.name, "reason", why.Reason, "suppressed", s.suppressed.Swap(0))
}
