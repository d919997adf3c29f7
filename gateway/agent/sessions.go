package agent

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/gateway/forward"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// carrier is one session's place in the data plane: its peer in the tunnel and its side of the forwarder.
type carrier interface {
	AddCandidates([]wire.Candidate)
	SetScope(*policy.Scope)
	Counts() wire.FlowCounts
	// Reached adds up what was reached and denied, by target, and how many flows went elsewhere.
	Reached() ([]wire.Reached, uint64)
	Reach(forward.Target) wire.ReachResult
	// Connections counts open TCP connections; HoldIfQuiet keeps new flows from beginning for a while where there are none.
	Connections() int
	HoldIfQuiet(time.Duration) (connections int)
	// AwaitNames and Restore are for service addresses that another gateway has given the job.
	AwaitNames()
	Restore([]wire.NamedAddr)
	// Vitals tells of the tunnel: see [tunnel.Peer.Vitals].
	Vitals() (handshake time.Time, way string)
	// Leave tells the client that the gateway is about to stop.
	Leave()
	// Close resets the session's flows and forgets its peer: nothing of it is accepted afterwards.
	Close()
}

// session is one admitted job.
//
//	reserved ──open──▶ live ──deadline, end, close──▶ gone
//	    └──────────────── fails, end ───────────────────▲
type session struct {
	id       string
	key      wire.Key
	addrs    []netip.Addr // IPv4, IPv6
	grants   []wire.Grant // as offered
	offered  *policy.Grant
	rules    []string
	who      identity
	repo     string // for the log
	lease    time.Duration
	admitted time.Time

	questions *rate.Limiter // requests inside the tunnel
	renewals  *rate.Limiter // before a token is verified
	reaches   *rate.Limiter // before a target is tried
	tries     chan struct{} // places for tries under way
	said      *rate.Limiter // log lines on what it does wrong

	// mu orders what is done to the carrier. It is taken before table.mu, never after.
	mu      sync.Mutex
	carrier carrier // nil while reserved
	claims  *claims.Claims
	scope   *policy.Scope
	policy  *policy.Policy // the gateway's own, by which scope was made

	// guarded by table.mu
	standby bool // another gateway carries it
	opened  bool // was live once
	unsaid  bool // its end is nobody's business: it begins anew
	gone    bool
	expires time.Time
	ends    time.Time
	timer   *time.Timer

	counted bool // guarded by metrics.mu
}

// live reports whether the session is in place. table.mu is held.
func (s *session) live() bool { return s.opened && !s.gone }

// table holds the sessions and ends each at its deadline by the monotonic clock.
type table struct {
	max int
	// count and ended are called once for each session that was live, with no lock held: count when its flows are reset and
	// the table still lists it, ended when its key and addresses are free.
	count func(*session)
	ended func(s *session, reason string)

	mu      sync.Mutex
	byID    map[string]*session
	byAddr  map[netip.Addr]*session
	arrival map[string]*arrival // offers that are being verified
	closed  bool
	leaving bool           // takes no more, keeps what it has
	wg      sync.WaitGroup // deadlines being acted upon
}

// arrival is an offer that is being verified, and what was heard of its session meanwhile.
type arrival struct {
	candidates []wire.Candidate
	over       bool
}

func newTable(limit int, count func(*session), ended func(*session, string)) *table {
	return &table{
		max: limit, count: count, ended: ended,
		byID: map[string]*session{}, byAddr: map[netip.Addr]*session{}, arrival: map[string]*arrival{},
	}
}

var errKeyInUse = problem.New(problem.KeyInUse, "this WireGuard key already has a session on the gateway",
	"join again with a fresh key and a fresh token")

// arrive notes an offer that is about to be verified, so that candidates which trickle in meanwhile are not lost. done
// must be called when the offer is answered.
func (t *table) arrive(id string) (done func(), err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, busy := t.arrival[id]; busy {
		return nil, errKeyInUse
	}
	t.arrival[id] = &arrival{}
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.arrival, id)
	}, nil
}

// reserve takes the session's id and addresses, or says why it cannot.
func (t *table) reserve(s *session) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return problem.New(problem.NoGateway, "the gateway is stopping", "join again; another gateway or its successor will answer")
	}
	if t.leaving {
		return problem.New(problem.NoGateway, "the gateway is about to stop", "join again; another gateway or its successor will answer")
	}
	if a := t.arrival[s.id]; a != nil && a.over {
		return errOver
	}
	if _, taken := t.byID[s.id]; taken {
		return errKeyInUse
	}
	if len(t.byID) >= t.max {
		return problem.New(problem.NoGateway, "the gateway holds as many sessions as it may",
			"add a gateway to the network, or raise this one's --max-sessions")
	}
	for _, a := range s.addrs {
		if _, taken := t.byAddr[a]; taken {
			return problem.New(problem.GatewayRefused, "the offered address belongs to another session",
				"join again; if this repeats, look at the coordinator's state")
		}
	}
	t.byID[s.id] = s
	for _, a := range s.addrs {
		t.byAddr[a] = s
	}
	return nil
}

// open makes a reserved session live until its deadline. It gives the candidates that arrived meanwhile, and false where
// the session was ended before it began.
func (t *table) open(s *session) (late []wire.Candidate, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.gone {
		return nil, false
	}
	s.opened = true
	s.timer = time.AfterFunc(time.Until(s.expires), func() { t.deadline(s) })
	if a := t.arrival[s.id]; a != nil {
		late, a.candidates = a.candidates, nil
	}
	return late, true
}

// deadline ends a session whose lease has run out. A renewal may have come between the timer and here.
func (t *table) deadline(s *session) {
	t.mu.Lock()
	if left := time.Until(s.expires); left > 0 && !s.gone {
		s.timer.Reset(left)
		t.mu.Unlock()
		return
	}
	if t.closed || s.gone {
		t.mu.Unlock()
		return
	}
	reason := "lease ran out"
	if !s.expires.Before(s.ends) {
		reason = "longest session reached"
	}
	t.wg.Add(1)
	defer t.wg.Done()
	t.mu.Unlock()
	t.end(s, reason)
}

// extend moves a live session's deadline, never past its end.
func (t *table) extend(s *session, ends time.Time) (wire.Lease, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !s.live() {
		return wire.Lease{}, errOver
	}
	if ends.Before(s.ends) {
		s.ends = ends
	}
	s.expires = earlier(time.Now().Add(s.lease), s.ends)
	s.timer.Reset(time.Until(s.expires))
	return wire.Lease{Expires: s.expires, Ends: s.ends}, nil
}

// bound makes a session end no later than ends.
func (t *table) bound(s *session, ends time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !s.live() || !ends.Before(s.ends) {
		return
	}
	s.ends = ends
	s.expires = earlier(s.expires, ends)
	s.timer.Reset(time.Until(s.expires))
}

var errOver = problem.New(problem.SessionOver, "the session has ended", "join again")

// end ends a session in whatever state it is. It is idempotent and returns when nothing of the session is accepted any more.
func (t *table) end(s *session, reason string) {
	t.mu.Lock()
	if s.gone {
		t.mu.Unlock()
		return
	}
	s.gone = true
	opened, unsaid := s.opened, s.unsaid
	if s.timer != nil {
		s.timer.Stop()
	}
	t.mu.Unlock()

	s.mu.Lock()
	if s.carrier != nil {
		s.carrier.Close()
	}
	s.mu.Unlock()
	if opened {
		t.count(s)
	}

	t.mu.Lock() // only now may its key and addresses be given to another
	if t.byID[s.id] == s {
		delete(t.byID, s.id)
	}
	for _, a := range s.addrs {
		if t.byAddr[a] == s {
			delete(t.byAddr, a)
		}
	}
	t.mu.Unlock()
	if opened && !unsaid {
		t.ended(s, reason)
	}
}

// get gives a session by its id, and whether it is live. Where its offer is still being verified, s is nil.
func (t *table) get(id string) (s *session, live bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s = t.byID[id]
	return s, s != nil && s.live()
}

// from gives the live session whose packets come from a.
func (t *table) from(a netip.Addr) (*session, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s, ok := t.byAddr[a.Unmap()]
	return s, ok && s.live()
}

// isGone reports whether a session has ended.
func (t *table) isGone(s *session) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return s.gone
}

// trickle keeps candidates for a session that is not live yet.
func (t *table) trickle(id string, c []wire.Candidate) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if a := t.arrival[id]; a != nil && len(a.candidates)+len(c) <= wire.MaxCandidates {
		a.candidates = append(a.candidates, c...)
	}
}

// cancel ends a session by its id, even where its offer is still being verified.
func (t *table) cancel(id, reason string) {
	t.mu.Lock()
	if a := t.arrival[id]; a != nil {
		a.over = true
	}
	s := t.byID[id]
	t.mu.Unlock()
	if s != nil {
		t.end(s, reason)
	}
}

// all lists the sessions, those being opened included.
func (t *table) all() []*session {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]*session, 0, len(t.byID))
	for _, s := range t.byID {
		out = append(out, s)
	}
	return out
}

// opened lists the sessions that have flows to count: live ones, and ended ones until they are counted.
func (t *table) opened() []*session {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]*session, 0, len(t.byID))
	for _, s := range t.byID {
		if s.opened {
			out = append(out, s)
		}
	}
	return out
}

// held lists the live sessions as the coordinator is told of them.
func (t *table) held() []wire.Held {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]wire.Held, 0, len(t.byID))
	for _, s := range t.byID {
		if s.live() {
			out = append(out, wire.Held{Session: s.id, Key: s.key, Addresses: s.addrs, Rules: s.rules, Expires: s.expires, Ends: s.ends, Standby: s.standby})
		}
	}
	return out
}

// take makes a session that stood by one that is carried here; false where it was already.
func (t *table) take(s *session) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	was := s.standby
	s.standby = false
	return was
}

// displace ends a session that stands by, because it is offered anew.
func (t *table) displace(id string) {
	t.mu.Lock()
	s := t.byID[id]
	if s == nil || !s.standby {
		t.mu.Unlock()
		return
	}
	s.unsaid = true
	t.mu.Unlock()
	t.end(s, "offered anew")
}

// drain takes no more sessions.
func (t *table) drain() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.leaving = true
}

// carried lists the live sessions that do not only stand by.
func (t *table) carried() []*session { return t.living(false) }

// spares lists the live sessions that another gateway carries.
func (t *table) spares() []*session { return t.living(true) }

func (t *table) living(standby bool) []*session {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []*session
	for _, s := range t.byID {
		if s.live() && s.standby == standby {
			out = append(out, s)
		}
	}
	return out
}

// standbys counts the live sessions that another gateway carries.
func (t *table) standbys() (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.byID {
		if s.live() && s.standby {
			n++
		}
	}
	return n
}

// leaseOf gives a session's lease as it stands.
func (t *table) leaseOf(s *session) wire.Lease {
	t.mu.Lock()
	defer t.mu.Unlock()
	return wire.Lease{Expires: s.expires, Ends: s.ends}
}

// size counts the sessions.
func (t *table) size() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.byID)
}

// close ends all sessions, takes no more, and waits.
func (t *table) close(reason string) {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	for _, s := range t.all() {
		t.end(s, reason)
	}
	t.wg.Wait()
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
