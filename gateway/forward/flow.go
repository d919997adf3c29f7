package forward

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/culvertnet/culvert/gateway/names"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	longAfter = time.Minute     // a flow that lives longer is traced before it ends
	restAfter = 5 * time.Second // a flow that carries nothing for so long gives back what it was lent
)

// flow is one open flow.
type flow struct {
	s *Session
	judgement
	key    flowKey
	number uint64 // 0 for a connection to the gateway itself
	floors floors
	idle   time.Duration
	began  time.Time
	last   atomic.Int64 // time of the last data, Unix nanoseconds
	// quote is the head of the packet that opened the flow, for ICMP errors about it.
	quote []byte
	asked uint32 // TCP: the sequence number of the job's SYN
	// target is where the flow leads: the destination, or what its name was resolved to. Nil until that is known.
	target   atomic.Pointer[netip.AddrPort]
	up, down atomic.Uint64
	hungry   int64         // of Session.hungryFlows
	answered atomic.Uint64 // TCP: 1<<32 + the sequence number of the stack's SYN-ACK, once it is sent

	ctx    context.Context // ended by reset and close
	cancel context.CancelFunc

	mu    sync.Mutex
	abort []func() // undo what has been opened so far, at once
	rest  func()   // gives back what a flow that rests does not need; may be nil
	cause wire.FlowCause
	dead  bool
	told  bool // traced as open

	// ICMP only: requests on their way out, and the head of the last one.
	echo   chan ping
	asking atomic.Pointer[[]byte]
}

// granted counts a flow that policy lets through, once that is certain.
func (fl *flow) granted(v policy.Verdict) {
	fl.mu.Lock()
	fl.Verdict = v
	fl.mu.Unlock()
	if v.Observed {
		fl.s.counts.observed.Add(1)
		return
	}
	fl.s.counts.allowed.Add(1)
}

// allowedBy holds the flow against another scope, as far as it has come.
func (fl *flow) allowedBy(scope *policy.Scope) bool {
	target := fl.target.Load()
	switch {
	case fl.served:
		return true
	case fl.name == "":
		return fl.s.f.decide(scope, policy.Flow{Proto: fl.key.proto, Dst: fl.key.dst}).Allowed
	case target == nil:
		return scope.OffersName(fl.name, fl.key.proto, fl.key.dst.Port()).Allowed
	}
	return scope.DecideName(fl.name, policy.Flow{Proto: fl.key.proto, Dst: *target}).Allowed
}

// fail counts and logs a flow whose target refused or did not answer.
func (fl *flow) fail(err error) {
	fl.s.counts.failed.Add(1)
	fl.because(causeOf(err))
	fl.s.f.log.Debug("flow failed", "session", fl.s.id, "code", problem.FlowUnreachable, "proto", protoName(fl.key.proto),
		"addr", fl.key.dst, "name", fl.name, "rule", fl.Rule, "err", err)
}

// because notes why the flow ends; the first word stays.
func (fl *flow) because(cause wire.FlowCause) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	if fl.cause == "" {
		fl.cause = cause
	}
}

// causeOf names what a failed dial came to.
func causeOf(err error) wire.FlowCause {
	var timeout net.Error
	switch {
	case errors.Is(err, context.Canceled):
		return wire.CauseReset
	case errors.Is(err, names.ErrNoName), errors.Is(err, names.ErrNoData), errors.Is(err, names.ErrSilent), errors.Is(err, names.ErrBusy):
		return wire.CauseNoName
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET):
		return wire.CauseRefused
	case errors.Is(err, syscall.ETIMEDOUT), errors.As(err, &timeout) && timeout.Timeout():
		return wire.CauseTimeout
	}
	return wire.CauseUnreachable
}

func (fl *flow) touch() { fl.last.Store(time.Now().UnixNano()) }

func (fl *flow) idleSince(now time.Time) time.Duration {
	return time.Duration(now.UnixNano() - fl.last.Load())
}

// carry counts bytes towards the target (up) or the job.
func (fl *flow) carry(up, down int) {
	fl.touch()
	fl.s.f.pace.carried.Add(int64(up + down))
	if up > 0 {
		fl.up.Add(uint64(up))
		fl.s.counts.up.Add(uint64(up))
	}
	if down > 0 {
		fl.down.Add(uint64(down))
		fl.s.counts.down.Add(uint64(down))
	}
}

// look is called now and then: a flow that has been idle for too long is reset, one that rests gives back what it was lent,
// one that lives long is traced.
func (fl *flow) look(now time.Time) {
	idle := fl.idleSince(now)
	if idle > fl.idle {
		fl.reset(wire.CauseIdle)
		return
	}
	fl.mu.Lock()
	rest, tell := fl.rest, !fl.told && !fl.served && now.Sub(fl.began) > longAfter && fl.target.Load() != nil
	fl.told = fl.told || tell
	fl.mu.Unlock()
	if rest != nil && idle > restAfter {
		rest()
	}
	if tell {
		fl.s.f.trace(fl.record(wire.CauseOpen))
	}
}

// onRest sets what a flow that rests gives back.
func (fl *flow) onRest(rest func()) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	fl.rest = rest
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
func (fl *flow) reset(cause wire.FlowCause) {
	fl.because(cause)
	fl.mu.Lock()
	undo := fl.abort
	fl.abort, fl.dead = nil, true
	fl.mu.Unlock()
	fl.cancel()
	for _, f := range undo {
		f()
	}
}

// isDead tells whether the flow has been reset.
func (fl *flow) isDead() bool {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	return fl.dead
}

// close takes the flow out of its session's table and traces it. Every admitted flow is closed exactly once.
func (fl *flow) close() {
	fl.cancel()
	fl.because(wire.CauseClosed)
	fl.s.drop(fl)
	if !fl.served {
		fl.s.tell(fl.record(""))
	}
	fl.s.f.flows.Add(-1)
	fl.s.f.work.Done()
}

// record is what is told of the flow: how it stands, if open says so, or how it ended.
func (fl *flow) record(open wire.FlowCause) wire.FlowRecord {
	fl.mu.Lock()
	v, cause := fl.Verdict, fl.cause
	fl.mu.Unlock()
	r := wire.FlowRecord{
		Flow: fl.number, Session: fl.s.id, Proto: protoName(fl.key.proto), Name: fl.name, Addr: fl.key.dst,
		Verdict: wire.FlowAllowed, Rule: v.Rule, Reason: v.Reason, Began: fl.began, Lasted: wire.Duration(time.Since(fl.began)),
		BytesUp: fl.up.Load(), BytesDn: fl.down.Load(), Cause: cause,
	}
	if target := fl.target.Load(); target != nil {
		r.Addr = *target
	}
	if open != "" {
		r.Cause = open
	}
	switch {
	case !v.Allowed:
		r.Verdict, r.Cause, r.Count = wire.FlowRefused, "", 1
	case v.Observed:
		r.Verdict = wire.FlowObserved
	}
	return r
}
