package server

import (
	"context"
	"crypto/rand"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/coordinator/session"
	"github.com/culvertnet/culvert/coordinator/state"
)

// BenchmarkJoin is what one join costs coordinator and state, the test's gateway and its WebSocket included, HTTP and the
// issuer's signing left out.
func BenchmarkJoin(b *testing.B) {
	r := newRig(b, Options{})
	r.gateway()
	r.joins(b)
}

// joins makes b.N of them, one after the other.
func (r *rig) joins(b *testing.B) {
	b.Helper()
	jobs := make([]session.Join, b.N)
	for i := range jobs {
		jobs[i] = session.Join{JoinRequest: r.job().request()}
	}
	b.ResetTimer()
	for _, j := range jobs {
		j.Network = "corp"
		if _, err := r.server.sessions.Join(b.Context(), j); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
}

// BenchmarkJoinBesideLeases is [BenchmarkJoin] beside live sessions whose leases are renewed every five minutes, as far as the state is
// concerned. They are put into the state as joins do, without the jobs.
func BenchmarkJoinBesideLeases(b *testing.B) {
	for _, n := range []int{1_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			r := newRigOf(b, Options{}, func(doc string) string {
				return strings.Replace(doc, "    gateways:", "    sessions: 10.64.0.0/12\n    gateways:", 1)
			})
			r.gateway()
			before := live()
			sessions := r.fill(b, n)
			held := live() - before
			ctx, stop := context.WithCancel(b.Context())
			var renewing sync.WaitGroup
			renewing.Go(func() { r.renewAll(ctx, sessions) })
			r.joins(b)
			stop()
			renewing.Wait()
			b.ReportMetric(held/float64(n), "heap-B/session")
		})
	}
}

// live is the heap without garbage, in bytes.
func live() float64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}

// fill puts leases into the state that are like that of a job, and gives their sessions.
func (r *rig) fill(b *testing.B, n int) []string {
	b.Helper()
	s := r.job().mustJoin()
	store := r.server.store
	like, err := store.Lease(b.Context(), s.ID)
	if err != nil {
		b.Fatal(err)
	}
	room := state.Pool{V4: r.server.config.Networks["corp"].Sessions, Hold: time.Hour}
	sessions := make([]string, n)
	var wg sync.WaitGroup
	const writers = 32
	for w := range writers {
		wg.Go(func() {
			for i := w; i < n; i += writers {
				l := like
				l.Claims = map[string]string{}
				for name, value := range like.Claims {
					l.Claims[name] = value
				}
				l.Claims["run_id"] = fmt.Sprint(100_000 + i)
				_, _ = rand.Read(l.Key[:])
				l.Session, l.Expires = l.Key.SessionID(), time.Now().Add(time.Hour)
				if _, err := store.CreateLease(b.Context(), l, room); err != nil {
					b.Error(err)
					return
				}
				sessions[i] = l.Session
			}
		})
	}
	wg.Wait()
	return sessions
}

// renewAll renews every lease once in five minutes.
func (r *rig) renewAll(ctx context.Context, sessions []string) {
	tick := time.NewTicker(5 * time.Minute / time.Duration(len(sessions)))
	defer tick.Stop()
	for i := 0; ; i = (i + 1) % len(sessions) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if l, err := r.server.store.Lease(ctx, sessions[i]); err == nil {
			l.Expires = time.Now().Add(time.Hour)
			_, _ = r.server.store.UpdateLease(ctx, l) // an error says that the benchmark ends
		}
	}
}
