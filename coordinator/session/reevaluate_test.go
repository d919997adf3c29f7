package session

import (
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/policy"
)

// manyLeases is a store that lists leases and can do nothing else.
type manyLeases struct {
	Store
	leases []state.Lease
}

func (m manyLeases) Leases(yield func(state.Lease) bool) {
	for _, l := range m.leases {
		if !yield(l) {
			return
		}
	}
}

// BenchmarkReevaluate is what a changed policy costs that ends nothing, a session: 500 rules, 10,000 sessions.
func BenchmarkReevaluate(b *testing.B) {
	const rules, sessions = 500, 10000
	var list []policy.Rule
	for i := range rules {
		list = append(list, policy.Rule{
			Name:  fmt.Sprint("rule-", i),
			Match: map[string]policy.Values{"repository_owner_id": {"9919"}, "repository": {fmt.Sprint("acme/repo-", i)}, "ref": {"refs/heads/main", "refs/tags/v*"}},
			Allow: []string{"tcp db.internal:5432", "tcp *.svc.corp:443", fmt.Sprintf("tcp 10.0.%d.%d:443", i/256, i%256)},
		})
	}
	p, err := policy.Compile(list, policy.Options{})
	if err != nil {
		b.Fatal(err)
	}
	now := time.Now()
	store := manyLeases{}
	for i := range sessions {
		claims := map[string]string{
			"iss": policy.GitHub, "repository_owner_id": "9919", "repository": fmt.Sprint("acme/repo-", i%rules), "ref": "refs/heads/main", "event_name": "push",
		}
		store.leases = append(store.leases, state.Lease{
			Session: fmt.Sprint(i), Network: "corp", Claims: claims, Grants: p.Evaluate(now, "corp", remembered(claims)).Grants,
			Created: now, Expires: now.Add(time.Hour), Ends: now.Add(time.Hour),
		})
	}
	m := &Manager{opts: Options{Store: store, Now: func() time.Time { return now }}, log: slog.New(slog.DiscardHandler)}
	m.rules.Store(&Rules{Config: &config.Config{Policy: p, Networks: map[string]config.Network{"corp": {}}}})
	b.ReportAllocs()
	for b.Loop() {
		m.Reevaluate(b.Context())
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/sessions, "ns/session")
}
