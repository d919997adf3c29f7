package session

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// auditor is a log that tests read and break.
type auditor struct {
	mu      sync.Mutex
	away    bool
	before  func(audit.Record)
	stored  []audit.Record
	noted   []audit.Record
	refused []error
}

func (a *auditor) Record(_ context.Context, r audit.Record) error {
	if a.before != nil {
		a.before(r)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.away {
		return problem.Wrap(errors.New("away"), problem.Unreachable, "the coordinator cannot store its audit record", "try again")
	}
	a.stored = append(a.stored, r)
	return nil
}

func (a *auditor) Note(r audit.Record) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.noted = append(a.noted, r)
}

func (a *auditor) Refused(err error, _ netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refused = append(a.refused, err)
}

// TestJoinIsStoredFirst: when the record of a join is being stored, neither the gateway nor the job has heard anything.
func TestJoinIsStoredFirst(t *testing.T) {
	log := &auditor{}
	b := newBench(t, Options{Audit: log})
	g := b.gateway("east")
	req := b.job().request()
	told := false
	req.Admitted = func(wire.Session) error { told = true; return nil }
	log.before = func(r audit.Record) {
		if r.Event == audit.Join && (told || len(got[wire.Offer](g, wire.FrameOffer)) > 0) {
			t.Error("somebody has heard of a join that is not on record")
		}
	}
	if _, err := b.m.Join(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	if len(log.stored) != 1 || log.stored[0].Event != audit.Join || !told {
		t.Errorf("%+v", log.stored)
	}
}

// TestStrangersDoNotFillTheLog: of the jobs whose owner no rule names some are recorded and the others counted; whom a rule names is always
// recorded.
func TestStrangersDoNotFillTheLog(t *testing.T) {
	log := &auditor{}
	b := newBench(t, Options{Audit: log})
	if r := b.m.joins.strangers; r.Burst() != strangerBurst || r.Limit() != strangerRate {
		t.Errorf("%d at once, %v a second", r.Burst(), r.Limit())
	}
	b.m.joins.strangers = rate.NewLimiter(0, 3)
	b.gateway("east")
	stranger := b.job("repository_owner_id", "666", "repository_owner", "mallory", "repository", "mallory/x")
	for i := range 10 {
		r := stranger.request()
		r.Network = []string{"corp", "nowhere"}[i%2]
		_, err := b.m.Join(t.Context(), r)
		wantCode(t, err, problem.Denied)
	}
	if len(log.stored) != 3 || len(log.refused) != 7 || problem.CodeOf(log.refused[0]) != problem.Denied {
		t.Errorf("%d records, %d counted: %v", len(log.stored), len(log.refused), log.refused)
	}
	for range 2 {
		if _, err := b.job("ref", "refs/heads/x").join(); err == nil {
			t.Error("another branch gets in")
		}
	}
	b.job().mustJoin()
	if len(log.stored) != 6 || log.stored[3].Event != audit.Denied || log.stored[5].Event != audit.Join {
		t.Errorf("%d records: %+v", len(log.stored), log.stored)
	}
}

// TestNothingWithoutTheLog: while the log is away nobody gets in, no gateway is asked, and nothing is held.
func TestNothingWithoutTheLog(t *testing.T) {
	log := &auditor{away: true}
	b := newBench(t, Options{Audit: log})
	g := b.gateway("east")
	j := b.job()
	_, err := j.join()
	wantCode(t, err, problem.Unreachable)
	if n := len(got[wire.Offer](g, wire.FrameOffer)); n != 0 {
		t.Errorf("%d offers", n)
	}
	if len(log.noted) != 1 || log.noted[0].Event != audit.Unplaced {
		t.Errorf("%+v", log.noted)
	}
	denied := b.job("ref", "refs/heads/evil")
	_, err = denied.join()
	wantCode(t, err, problem.Unreachable) // not even a no is told
	log.mu.Lock()
	log.away = false
	log.mu.Unlock()
	j.mustJoin() // its key is free
}

// TestWhatIsCounted: tokens that are not believed are counted, those that are get a record each.
func TestWhatIsCounted(t *testing.T) {
	log := &auditor{}
	b := newBench(t, Options{Audit: log})
	j := b.job()
	req := j.request()
	req.Token += "x"
	_, err := b.m.Join(t.Context(), req)
	wantCode(t, err, problem.TokenInvalid)
	if len(log.refused) != 1 || len(log.stored) != 0 {
		t.Errorf("%d counted, %d stored", len(log.refused), len(log.stored))
	}
	_, err = j.join()
	wantCode(t, err, problem.NoGateway)
	if len(log.stored) != 1 || log.stored[0].Event != audit.Unplaced || log.stored[0].Code != "no-gateway" || log.stored[0].Unmapped.Job.Repository != "acme/shop" {
		t.Errorf("%+v", log.stored)
	}
}

// TestAnotherGateway: where the gateway that is asked first refuses, a second record says who took the session.
func TestAnotherGateway(t *testing.T) {
	log := &auditor{}
	b := newBench(t, Options{Audit: log})
	a, z := b.gateway("aaaa"), b.gateway("zzzz")
	first := a
	if b.store.Gateways("corp")[0].Name == "zzzz" {
		first = z
	}
	first.set(first.refuse(problem.GatewayRefused))
	b.job().mustJoin()
	if len(log.stored) != 1 || log.stored[0].Unmapped.Gateway != first.who.Name {
		t.Errorf("join: %+v", log.stored)
	}
	if len(log.noted) != 1 || log.noted[0].Event != audit.Placed || log.noted[0].Unmapped.Gateway == first.who.Name {
		t.Errorf("placed: %+v", log.noted)
	}
	for _, g := range []*gateway{a, z} {
		g.set(g.refuse(problem.GatewayRefused))
	}
	_, err := b.job().join()
	wantCode(t, err, problem.GatewayRefused)
	if last := log.stored[len(log.stored)-1]; last.Event != audit.Unplaced || last.Code != "gateway-refused" {
		t.Errorf("%+v", last)
	}
}

// TestEndedIsBounded: the memory of sessions that are over does not grow with their number.
func TestEndedIsBounded(t *testing.T) {
	b := newBench(t, Options{})
	l, err := b.store.Lease(t.Context(), func() string { b.gateway("east"); return b.job().mustJoin().ID }())
	if err != nil {
		t.Fatal(err)
	}
	for i := range maxEnded + 100 {
		l.Session = wire.Key{byte(i), byte(i >> 8), byte(i >> 16)}.SessionID()
		b.m.remember(l)
	}
	if len(b.m.ended) != maxEnded || len(b.m.endedOrder) != maxEnded {
		t.Errorf("%d in the index, %d in order", len(b.m.ended), len(b.m.endedOrder))
	}
	later := b.clock().Add(2 * endedFor)
	b.now.Store(&later)
	b.m.remember(l)
	if len(b.m.ended) != 0 && len(b.m.ended) != 1 {
		t.Errorf("%d are remembered after their time", len(b.m.ended))
	}
}

// TestLeaseRunsOut: a session that nobody renewed is on record as ended, with whose job it was.
func TestLeaseRunsOut(t *testing.T) {
	log := &auditor{}
	b := newBench(t, Options{Audit: log})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan struct{})
	go func() { b.m.Expire(ctx); close(done) }()
	_, err := b.store.CreateLease(t.Context(), state.Lease{Session: "s1", Network: "corp", Key: wire.Key{1}, Gateway: "east-1", GatewayName: "east",
		Claims: map[string]string{"repository": "acme/shop"}, Expires: time.Now().Add(time.Second)}, state.Pool{V4: netip.MustParsePrefix("198.18.0.0/24")})
	if err != nil {
		t.Fatal(err)
	}
	b.eventually("its end is on record", func() bool {
		log.mu.Lock()
		defer log.mu.Unlock()
		return len(log.stored) > 0
	})
	cancel()
	<-done
	if r := log.stored[0]; r.Event != audit.End || r.Session.Reason != endedByLease || r.Unmapped.Job.Repository != "acme/shop" || r.Unmapped.Gateway != "east" {
		t.Errorf("%+v", r)
	}
}

// TestFlowsOfSeveralSessions: a gateway adds up what too many sessions were denied in a record that names none. It is recorded, and so is what
// came with it.
func TestFlowsOfSeveralSessions(t *testing.T) {
	log := &auditor{}
	b := newBench(t, Options{Audit: log})
	g := b.gateway("a")
	s := b.job().mustJoin()
	denied := func(session string) wire.FlowRecord {
		return wire.FlowRecord{Session: session, Proto: "tcp", Verdict: wire.FlowRefused, Reason: "several targets", Began: time.Now(), Count: 7}
	}
	if err := b.m.Flows(t.Context(), g.who, wire.Flows{Seq: 1, Records: []wire.FlowRecord{denied(""), denied(s.ID)}}); err != nil {
		t.Fatal(err)
	}
	of := map[string]uint64{}
	for _, r := range log.of(audit.Flows) {
		of[r.Session.UID] += r.Count
	}
	if len(of) != 2 || of[""] != 7 || of[s.ID] != 7 {
		t.Errorf("on record are %v", of)
	}
}
