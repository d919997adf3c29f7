package server

import (
	"testing"

	"github.com/culvertnet/culvert/coordinator/session"
)

// BenchmarkJoin is what one join costs coordinator and state, the test's gateway and its WebSocket included, HTTP and the
// issuer's signing left out.
func BenchmarkJoin(b *testing.B) {
	r := newRig(b, Options{})
	r.gateway()
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
