//go:build linux

package scale

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// trial is a cluster under load.
type trial struct {
	*cluster
	g    *generator
	file string        // of the ids of the sessions that were joined
	most time.Duration // that joins may stand still for; 0 is not looked at
	stop func()        // ends the watch
}

func newTrial(t testing.TB, args ...string) *trial {
	t.Helper()
	c := newCluster(t)
	t.Cleanup(func() {
		if dir := os.Getenv(keepEnv); dir != "" {
			c.keep(dir)
		} else if t.Failed() {
			c.tell()
		}
	})
	tr := &trial{cluster: c, file: filepath.Join(t.TempDir(), "ids")}
	args = append(args, "--gateways", "6", "--sessions", "50", "--renew-every", "6s", "--retry", "--timeout", "60s", "--ids", tr.file)
	tr.g = play(t, c.jobs, c.nodes, c.url, args...)
	tr.stop = sync.OnceFunc(tr.watch())
	t.Cleanup(tr.stop)
	return tr
}

// joins counts the joins that ended well so far.
func (tr *trial) joins() int {
	info, err := os.Stat(tr.file)
	if err != nil {
		return 0
	}
	return int(info.Size()) / len("0123456789012345678901\n")
}

// standstill is a time without a join that is worth a line.
const standstill = time.Second

// watch tells of each standstill until the function that it gives is called: goOn looks only at the joins right after a fault and right after its end.
func (tr *trial) watch() (stop func()) {
	over, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		look := time.NewTicker(5 * time.Millisecond)
		defer look.Stop()
		for had, last := 0, time.Now(); ; {
			select {
			case <-over:
				return
			case <-look.C:
			}
			if now := tr.joins(); now > had {
				if d := time.Since(last); d > standstill && had > settled {
					tr.t.Logf("no join for %s until %s", d.Round(10*time.Millisecond), time.Now().UTC().Format("15:04:05.000"))
				}
				had, last = now, time.Now()
			}
		}
	}()
	return func() { close(over); <-ended }
}

// goOn waits for so many more joins, and gives the longest time without one.
func (tr *trial) goOn(more int) (longest time.Duration) {
	tr.t.Helper()
	had := tr.joins()
	wanted, last := had+more, time.Now()
	for deadline := time.Now().Add(time.Minute); had < wanted; time.Sleep(5 * time.Millisecond) {
		now := tr.joins()
		if now > had {
			longest, last = max(longest, time.Since(last)), time.Now()
			had = now
		}
		if time.Now().After(deadline) {
			tr.t.Fatalf("joins stand still at %d, for %s", had, time.Since(last).Round(time.Second))
		}
	}
	return longest
}

// fault is something that goes wrong while joins go on, and what mends it.
type fault struct {
	name   string
	strike func(*trial) (mend func())
}

var coordinatorDies = fault{"a coordinator is killed", func(tr *trial) func() {
	n := tr.nodes[0]
	n.kill()
	return func() { n.serve(); n.ready() }
}}

var coordinatorIsCutOff = fault{"a coordinator is cut off from the nats-servers", func(tr *trial) func() {
	return tr.cut(tr.nodes[1].host, tr.hosts...)
}}

var serverDies = fault{"a nats-server that leads neither leases nor log is killed", func(tr *trial) func() {
	i := tr.bystander()
	tr.nats[i].kill()
	return func() { tr.startNATS(i); tr.awaitNATS(i) }
}}

var leaderDies = fault{"the nats-server that leads the leases is killed", func(tr *trial) func() {
	i := tr.leader()
	tr.nats[i].kill()
	return func() { tr.startNATS(i); tr.awaitNATS(i) }
}}

var leaderFreezes = fault{"the nats-server that leads the leases is frozen", func(tr *trial) func() {
	i := tr.leader()
	tr.nats[i].signal(syscall.SIGSTOP)
	return func() { tr.nats[i].signal(syscall.SIGCONT) }
}}

var serverIsCutOff = fault{"a nats-server that leads neither is cut off from everybody", func(tr *trial) func() {
	return tr.cut(tr.hosts[tr.bystander()], tr.everybody()...)
}}

var leaderIsCutOff = fault{"the nats-server that leads the leases is cut off from everybody", func(tr *trial) func() {
	return tr.cut(tr.hosts[tr.leader()], tr.everybody()...)
}}

var leaderIsCutOffFromServers = fault{"the nats-server that leads the leases is cut off from the other servers", func(tr *trial) func() {
	return tr.cut(tr.hosts[tr.leader()], tr.hosts...)
}}

var leaderRetires = fault{"the nats-server that leads the leases is told to retire, and then killed", func(tr *trial) func() {
	i := tr.leader()
	tr.nats[i].signal(syscall.SIGUSR2)
	return func() { tr.nats[i].kill(); tr.startNATS(i); tr.awaitNATS(i) }
}}

// settled is how many sessions there are before joins come at the rate.
const settled = 51

// suffer lets one fault after the other happen, each to a cluster that is whole.
func (tr *trial) suffer(joins int, faults ...fault) {
	tr.t.Helper()
	tr.goOn(settled + joins)
	for _, f := range faults {
		tr.leader()
		mend := f.strike(tr)
		at := time.Now()
		struck := tr.goOn(joins)
		if tr.most > 0 && struck > tr.most {
			tr.t.Errorf("%s: no join for %s", f.name, struck)
		}
		mend()
		mended := tr.goOn(joins)
		tr.t.Logf("%s at %s: longest time without a join %s, and %s when it comes back", f.name, at.UTC().Format("15:04:05.000"), struck.Round(10*time.Millisecond), mended.Round(10*time.Millisecond))
	}
}

// verdict ends the load and looks whether anything was lost.
func (tr *trial) verdict() {
	t := tr.t
	t.Helper()
	tr.stop()
	_ = tr.g.proc.Signal(syscall.SIGINT) // it is enough; an error says that it has ended
	r := tr.g.report()
	r.clean(t)
	p := r.Phases[len(r.Phases)-1]
	t.Logf("%d joins, p50 %.0f ms, p99 %.0f ms, longest gap %.0f ms, %d renewals, %d sessions", p.Joins, p.P50, p.P99, p.Gap, r.Renewals, r.Sessions)
	if tr.most > 0 && p.Max > 10_000 {
		t.Errorf("a join took %.0f ms", p.Max)
	}
	if r.Renewals == 0 {
		t.Error("nothing was renewed")
	}
	recorded := tr.joined(tr.nodes[1])
	data, err := os.ReadFile(tr.file)
	if err != nil {
		t.Fatal(err)
	}
	for id := range strings.FieldsSeq(string(data)) {
		if !recorded[id] {
			t.Errorf("the join of %s was acknowledged and is not on record", id)
		}
	}
	tr.run(tr.nodes[1], "audit", "verify")
	tr.agree(r.Sessions)
}

// clusterEnv asks for these tests, which take a quarter of an hour and a machine of their own: make cluster.
const clusterEnv = "CULVERT_E2E_CLUSTER"

// TestClusterSurvives is the short form of [TestClusterLosesNothing].
func TestClusterSurvives(t *testing.T) {
	if os.Getenv(clusterEnv) == "" {
		t.Skip("make cluster runs this")
	}
	tr := newTrial(t, "--rate", "20", "--duration", "1m")
	tr.suffer(20, coordinatorDies, coordinatorIsCutOff, leaderDies)
	tr.verdict()
}

// TestClusterLosesNothing: under load coordinators and nats-servers are killed, frozen and cut off, one after the other, and come
// back. No session is lost, no address given twice, no acknowledged record missing, and joins go on.
func TestClusterLosesNothing(t *testing.T) {
	if os.Getenv(clusterEnv) == "" {
		t.Skip("make cluster runs this")
	}
	tr := newTrial(t, "--rate", "40", "--duration", "3m")
	tr.suffer(60, coordinatorDies, coordinatorIsCutOff, serverDies, serverIsCutOff, leaderDies, leaderFreezes, leaderIsCutOff, leaderIsCutOffFromServers, leaderRetires)
	tr.verdict()
}

// TestClusterLeadersDie kills and cuts off whichever server leads the leases, again and again, and tells how long joins stood still. Coordinators
// have an election held; the servers by themselves would take four seconds and more for one.
func TestClusterLeadersDie(t *testing.T) {
	if os.Getenv(clusterEnv) == "" {
		t.Skip("make cluster runs this")
	}
	times := 2
	if n, err := strconv.Atoi(os.Getenv("CULVERT_E2E_KILLS")); err == nil {
		times = n
	}
	for _, f := range []fault{leaderDies, serverDies, leaderIsCutOff, leaderIsCutOffFromServers, leaderFreezes} {
		t.Run(f.name, func(t *testing.T) {
			tr := newTrial(t, "--rate", "40", "--duration", "5m")
			tr.most = 4 * time.Second // the servers by themselves take that at least
			for range times {
				tr.suffer(60, f)
			}
			tr.verdict()
		})
	}
}
