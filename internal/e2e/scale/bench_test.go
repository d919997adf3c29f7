//go:build linux

package scale

import (
	"fmt"
	"os"
	"testing"
)

// howLong is the time that a rate is held for, as the generator takes it.
func howLong() string {
	if d := os.Getenv("CULVERT_E2E_LOAD"); d != "" {
		return d
	}
	return "60s"
}

// BenchmarkJoins holds one coordinator with embedded state to 1,000 joins a second; generator and 20 gateways run on the same
// machine. Coordinator and gateway each verify every token, and its record is synced to the disk. Tokens are signed before.
func BenchmarkJoins(b *testing.B) {
	n := alone(b)
	began := n.processor()
	r := play(b, n.host, []*node{n}, "", "--rate", "1010", "--duration", howLong(), "--renew-every", "5m").report()
	r.clean(b)
	tell(b, n, r, began)
}

// BenchmarkJoinBurst has 1,000 jobs join at once.
func BenchmarkJoinBurst(b *testing.B) {
	n := alone(b)
	r := play(b, n.host, []*node{n}, "", "--rate", "0", "--burst", "1000").report()
	r.clean(b)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(r.Phases[0].Max, "all-served-ms")
}

// BenchmarkJoinsBesideSessions is [BenchmarkJoins] beside sessions that live and renew.
func BenchmarkJoinsBesideSessions(b *testing.B) {
	for _, sessions := range []int{1_000, 100_000} {
		b.Run(fmt.Sprint(sessions), func(b *testing.B) {
			n := alone(b)
			idle := n.memory("VmRSS")
			r := play(b, n.host, []*node{n}, "", "--rate", "1010", "--duration", howLong(), "--sessions", fmt.Sprint(sessions), "--renew-every", "5m").report()
			r.clean(b)
			tell(b, n, r, 0)
			b.ReportMetric(float64(r.Renewals), "renewals")
			b.ReportMetric((n.memory("VmRSS")-idle)/float64(r.Sessions), "RSS-B/session")
		})
	}
}

func alone(b *testing.B) *node {
	b.Helper()
	h := machine(b)
	n := newNode(b, h, "http://"+freeAddr(b, h), "", "state: {dir: state}\n")
	n.serve()
	n.ready()
	return n
}

func tell(b *testing.B, n *node, r report, began float64) {
	b.Helper()
	p := r.Phases[len(r.Phases)-1]
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(p.Rate, "joins/s")
	b.ReportMetric(p.P50, "p50-ms")
	b.ReportMetric(p.P99, "p99-ms")
	b.ReportMetric(p.Max, "max-ms")
	b.ReportMetric(n.memory("VmHWM")/1e6, "peak-RSS-MB")
	if began > 0 {
		b.ReportMetric((n.processor()-began)/float64(p.Joins)*1000, "cpu-ms/join")
	}
}
