//go:build linux

package agent

import (
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

// BenchmarkActiveSessions has many sessions carry all they can at once, each over a tunnel of its own, and compares with one. The
// clients and the service are in a process of their own. In "greedy", one session has 64 transfers where the others have one each. In
// "light", clients are [lights].
func BenchmarkActiveSessions(b *testing.B) {
	for _, c := range []struct {
		name     string
		kind     byte
		sessions int
		greedy   int
		light    bool
	}{
		{"down-1", 'd', 1, 1, false},
		{"down-100", 'd', 100, 1, false}, {"up-100", 'u', 100, 1, false},
		{"down-greedy", 'd', 20, 64, false}, {"up-greedy", 'u', 20, 64, false},
		{"down-1000", 'd', 1000, 1, false}, {"up-1000", 'u', 1000, 1, false},
		{"light-down-100", 'd', 100, 1, true}, {"light-up-100", 'u', 100, 1, true},
		{"light-down-1000", 'd', 1000, 1, true}, {"light-up-1000", 'u', 1000, 1, true},
	} {
		b.Run(c.name, func(b *testing.B) {
			for range b.N {
				share(b, c.kind, c.sessions, c.greedy, c.light)
			}
		})
	}
}

// share reports what sessions get that all want all.
func share(b *testing.B, kind byte, sessions, greedy int, light bool) {
	const settle, window = 2 * time.Second, 4 * time.Second
	crowd := gather(b)
	crowd.light = light
	w := newWorld(b, func(o *Options) {
		o.PolicyFile = writeFile(b, strings.NewReplacer("OWNER", ownerID, "SERVICE", crowd.service.String()).Replace(
			"rules:\n  - {name: own, match: {repository_owner_id: OWNER}, allow: [\"tcp SERVICE\", \"tcp 10.20.0.5:5432\"]}\n"))
	})
	w.coord.hello()
	grants := []wire.Grant{
		{Rule: "deploy", Allow: "tcp " + crowd.service.String()},
		{Rule: "deploy", Allow: "tcp 10.20.0.5:5432"}, // a session of loopback alone is refused: no route leads there
	}
	for i := range sessions {
		crowd.join(w, i, grants)
	}
	crowd.ask(crowdOrder{Go: &crowdGo{To: 1, Streams: greedy, Kind: kind}})
	crowd.ask(crowdOrder{Measure: settle})
	before := take(w.gateway)
	alone := crowd.ask(crowdOrder{Measure: window})
	one, _ := shares(alone)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(one, "one-Mbit/s")
	take(w.gateway).report(b, before, alone, "one-")
	if sessions == 1 {
		return
	}
	begun := crowd.ask(crowdOrder{Go: &crowdGo{From: 1, To: sessions, Streams: 1, Kind: kind}})
	b.ReportMetric(begun.Took.Seconds(), "all-connected-s")
	crowd.ask(crowdOrder{Measure: settle + time.Duration(sessions)*4*time.Millisecond}) // those that came first give back
	before = take(w.gateway)
	together := crowd.ask(crowdOrder{Measure: window})
	take(w.gateway).report(b, before, together, "")
	all, jain := shares(together)
	b.ReportMetric(all, "all-Mbit/s")
	b.ReportMetric(all/one, "ratio")
	b.ReportMetric(jain, "jain")
	b.ReportMetric(resident(b), "RSS-MB")
	b.ReportMetric(float64(together.Bytes[0])*8/1e6/together.Took.Seconds(), "first-Mbit/s")
}

// state is what has been used and lost up to a moment.
type state struct {
	used  time.Duration // processor time of this process
	idle  time.Duration // of all processors together, see proc(5)
	lost  uint64        // datagrams, or runs of them, that the kernel's sockets had no room for
	drops uint64        // packets that the gateway dropped for their session's sake
}

func take(g *Gateway) state {
	s := state{used: processorTime(), drops: g.plane.tunnel.Stats().OverTurn + g.plane.device.Stats().Overflow}
	if f := procFields("/proc/stat", "cpu"); len(f) > 4 {
		ticks, _ := strconv.Atoi(f[4])
		s.idle = time.Duration(ticks) * 10 * time.Millisecond
	}
	if f := procFields("/proc/net/snmp", "Udp:"); len(f) > 5 {
		s.lost, _ = strconv.ParseUint(f[5], 10, 64)
	}
	return s
}

// procFields gives the last line of a file that begins with a word.
func procFields(name, word string) (fields []string) {
	data, _ := os.ReadFile(name) // a figure that is missing is 0
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 0 && f[0] == word {
			fields = f
		}
	}
	return fields
}

// report tells what a Gbit took of processors since before, by the gateway and by the crowd, so that it shows which of them is what the
// total is bounded by, how much of the machine was idle, and what was lost.
func (s state) report(b *testing.B, before state, a crowdAnswer, prefix string) {
	mbit, _ := shares(a)
	if gbit := mbit / 1000 * a.Took.Seconds(); gbit > 0 {
		b.ReportMetric((s.used-before.used).Seconds()/gbit, prefix+"core-s/Gbit")
		b.ReportMetric(a.Used.Seconds()/gbit, prefix+"crowd-core-s/Gbit")
	}
	b.ReportMetric(100*(s.idle-before.idle).Seconds()/a.Took.Seconds()/float64(runtime.NumCPU()), prefix+"idle-%")
	b.ReportMetric(float64(s.lost-before.lost), prefix+"kernel-drops")
	b.ReportMetric(float64(s.drops-before.drops), prefix+"drops")
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
	a.ask(crowdOrder{Light: a.light, Join: &crowdClient{
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
