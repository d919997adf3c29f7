package session

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/culvertnet/culvert/coordinator/audit"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

const (
	// maxEnded and endedFor bound the memory of sessions that are over: their last flows are reported after their end.
	maxEnded = 16 << 10
	endedFor = 10 * time.Minute

	flowsPerRecord = 128 // of one session
)

// ended is a session that is over, as far as its last flows need it.
type ended struct {
	record   audit.Record // without an event
	instance string
	network  string
	at       time.Time
}

// remember keeps who a session was, for the flows that are still to be reported.
func (m *Manager) remember(l state.Lease) {
	r := recordOf("", l)
	now := m.opts.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(m.endedOrder) > 0 {
		oldest := m.endedOrder[0]
		if len(m.endedOrder) < maxEnded && now.Sub(m.ended[oldest].at) < endedFor {
			break
		}
		delete(m.ended, oldest)
		m.endedOrder = m.endedOrder[1:]
	}
	if _, known := m.ended[l.Session]; !known {
		m.endedOrder = append(m.endedOrder, l.Session)
		m.ended[l.Session] = ended{r, l.Gateway, l.Network, now}
	}
}

// Flows puts a gateway's batch of flow records on record: one for each session that it speaks of, with whose job that is.
// It returns once all are stored. A gateway is believed about sessions that it holds or held a while ago; what it says of
// others' is left out, and a session that nobody here knows gets a record that names no job.
func (m *Manager) Flows(ctx context.Context, g Gateway, f wire.Flows) error {
	if err := checkFlows(f); err != nil {
		return err
	}
	var storing errgroup.Group
	storing.SetLimit(64)
	for _, id := range sessionsOf(f.Records) {
		r, err := m.flowsOf(ctx, g, id)
		if errors.Is(err, errNotIts) {
			m.log.Warn("flow records of a session that is not the gateway's are left out", "session", id, "gateway", g.Name)
			continue
		}
		if err != nil {
			return err
		}
		own := slices.DeleteFunc(slices.Clone(f.Records), func(one wire.FlowRecord) bool { return one.Session != id })
		for part := range slices.Chunk(own, flowsPerRecord) {
			r.Unmapped.Batch, r.Unmapped.Flows, r.Count = f.Seq, part, count(part)
			storing.Go(func() error { return m.opts.Audit.Record(ctx, r) })
		}
	}
	return storing.Wait()
}

func checkFlows(f wire.Flows) error {
	if len(f.Records) > wire.MaxFlowRecords {
		return problem.New(problem.TooLarge, fmt.Sprintf("more than %d flow records in a batch", wire.MaxFlowRecords), "update the gateway")
	}
	for _, r := range f.Records {
		if r.Session != "" && !sessionID.MatchString(r.Session) || len(r.Name) > wire.MaxFlowName || len(r.Rule) > wire.MaxFlowText ||
			len(r.Reason) > wire.MaxFlowText || len(r.Proto) > 8 || len(r.Verdict) > 16 || len(r.Cause) > 32 {
			return problem.New(problem.BadRequest, "a flow record is not one, or too long", "update the gateway")
		}
	}
	return nil
}

// sessionsOf lists the sessions of a batch, each once.
func sessionsOf(list []wire.FlowRecord) []string {
	var out []string
	seen := map[string]bool{}
	for _, r := range list {
		if !seen[r.Session] {
			seen[r.Session] = true
			out = append(out, r.Session)
		}
	}
	return out
}

func count(list []wire.FlowRecord) (n uint64) {
	for _, r := range list {
		n += max(r.Count, 1)
	}
	return n
}

// errNotIts says that a gateway speaks of another one's session.
var errNotIts = errors.New("another gateway holds the session")

// flowsOf begins the record of a session's flows.
func (m *Manager) flowsOf(ctx context.Context, g Gateway, id string) (audit.Record, error) {
	l, err := m.opts.Store.Lease(ctx, id)
	if err != nil && !errors.Is(err, state.ErrNotFound) {
		return audit.Record{}, storeAway(err)
	}
	r := audit.Record{Session: &audit.Session{UID: id}}
	switch {
	case err == nil && (l.Network != g.Network || l.Gateway != g.Instance && l.Standby != g.Instance && !slices.Contains(l.Former, g.Instance)):
		return r, errNotIts
	case err == nil:
		r = recordOf("", l)
	default:
		m.mu.Lock()
		past, known := m.ended[id]
		m.mu.Unlock()
		if known && (past.instance != g.Instance || past.network != g.Network) {
			return r, errNotIts
		}
		if known {
			r = past.record
		}
	}
	r.Event, r.Status = audit.Flows, 1
	r.Unmapped.Network, r.Unmapped.Gateway, r.Unmapped.Instance, r.Unmapped.By = g.Network, g.Name, g.Instance, byGateway
	return r, nil
}
