//go:build linux

package agent

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// BenchmarkActiveSessions has many sessions carry all they can at once, each over a tunnel of its own, and compares with one. The
// clients and the service are in a process of their own. In "greedy", one session has 64 transfers where the others have one each.
func BenchmarkActiveSessions(b *testing.B) {
	for _, c := range []struct {
		name     string
		kind     byte
		sessions int
		greedy   int
	}{
		{"down-1", 'd', 1, 1},
		{"down-100", 'd', 100, 1}, {"up-100", 'u', 100, 1}, {"down-greedy", 'd', 20, 64}, {"up-greedy", 'u', 20, 64},
		{"down-1000", 'd', 1000, 1}, {"up-1000", 'u', 1000, 1},
	} {
		b.Run(c.name, func(b *testing.B) {
			for range b.N {
				share(b, c.kind, c.sessions, c.greedy)
			}
		})
	}
}

// share reports what sessions get that all want all.
func share(b *testing.B, kind byte, sessions, greedy int) {
	const settle, window = 2 * time.Second, 4 * time.Second
	crowd := gather(b)
	w := newWorld(b, func(o *Options) {
		o.PolicyFile = writeFile(b, strings.NewReplacer("OWNER", ownerID, "SERVICE", crowd.service.String()).Replace(
			"rules:\n  - {name: own, match: {repository_owner_id: OWNER}, allow: [\"tcp SERVICE\"]}\n"))
	})
	w.coord.hello()
	grants := []wire.Grant{{Rule: "deploy", Allow: "tcp " + crowd.service.String()}}
	for i := range sessions {
		crowd.join(w, i, grants)
	}
	crowd.ask(crowdOrder{Go: &crowdGo{To: 1, Streams: greedy, Kind: kind}})
	crowd.ask(crowdOrder{Measure: settle})
	used := processorTime()
	alone := crowd.ask(crowdOrder{Measure: window})
	one, _ := shares(alone)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(one, "one-Mbit/s")
	if one > 0 {
		b.ReportMetric((processorTime()-used).Seconds()/alone.Took.Seconds()/one*1000, "one-core-s/Gbit")
	}
	if sessions == 1 {
		return
	}
	begun := crowd.ask(crowdOrder{Go: &crowdGo{From: 1, To: sessions, Streams: 1, Kind: kind}})
	b.ReportMetric(begun.Took.Seconds(), "all-connected-s")
	crowd.ask(crowdOrder{Measure: settle + time.Duration(sessions)*4*time.Millisecond}) // those that came first give back
	used = processorTime()
	together := crowd.ask(crowdOrder{Measure: window})
	all, jain := shares(together)
	b.ReportMetric((processorTime()-used).Seconds()/together.Took.Seconds()/all*1000, "core-s/Gbit")
	b.ReportMetric(all, "all-Mbit/s")
	b.ReportMetric(all/one, "ratio")
	b.ReportMetric(jain, "jain")
	b.ReportMetric(resident(b), "RSS-MB")
	b.ReportMetric(float64(together.Bytes[0])*8/1e6/together.Took.Seconds(), "first-Mbit/s")
}

// join admits the i-th session and has the crowd play it.
func (a *audience) join(w *world, i int, grants []wire.Grant) {
	a.tb.Helper()
	key, err := wire.NewPrivateKey()
	if err != nil {
		a.tb.Fatal(err)
	}
	answer, err := w.coord.ask(wire.FrameOffer, wire.Offer{
		Session: key.Public().SessionID(), Key: key.Public(), Token: w.token(key.Public()), Addresses: overlayOf(i), Grants: grants,
		Lease: wire.Duration(time.Hour),
	})
	if err != nil {
		a.tb.Fatal(err)
	}
	a.ask(crowdOrder{Join: &crowdClient{
		Private: key.Bytes(), Gateway: answer.Gateway.Key, Inside: answer.Gateway.Addresses[0], Port: w.gateway.Port(), Addrs: overlayOf(i),
	}})
}

// shares gives the sum of what sessions got in Mbit/s and Jain's index of how equal that was.
func shares(a crowdAnswer) (mbit, jain float64) {
	var sum, squares float64
	for _, n := range a.Bytes {
		sum += float64(n)
		squares += float64(n) * float64(n)
	}
	if squares > 0 {
		jain = sum * sum / (float64(len(a.Bytes)) * squares)
	}
	return sum * 8 / 1e6 / a.Took.Seconds(), jain
}

// processorTime is what this process has used.
func processorTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
