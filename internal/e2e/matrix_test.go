//go:build linux

package e2e

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// Environment variables of `make matrix`.
const (
	matrixEnv = "CULVERT_E2E_MATRIX" // try all pairs, and write the tables to this file
)

// pair is a runner's network and a gateway's.
type pair struct{ runner, gateway lab.Kind }

func (p pair) String() string { return p.runner.String() + " to " + p.gateway.String() }

// mapsHard reports a NAT that gives every destination another port.
func mapsHard(k lab.Kind) bool { return k.Is(lab.Hard) || k.Is(lab.CarrierGrade) }

// direct reports whether the path has to be direct: UDP passes on both sides, and where one of them is hard the other lets in
// from every port of an address. Theory allows hard with easy as well, by the birthday method, which is not built yet.
func (p pair) direct() bool {
	if !p.runner.UDP() || !p.gateway.UDP() {
		return false
	}
	filters := func(k lab.Kind) bool { return mapsHard(k) || k.Is(lab.Easy) }
	return !(mapsHard(p.runner) && filters(p.gateway)) && !(filters(p.runner) && mapsHard(p.gateway))
}

// outcome is what became of a pair.
type outcome struct {
	first     path          // the path that carried the first byte
	last      path          // the one that stayed
	firstByte time.Duration // from the start of `culvert up`, median
	direct    time.Duration // from then until the path was direct; 0 where it stays relayed
}

// Limits on a pair.
const (
	directLimit = time.Minute
	pairTries   = 3 // to the first byte; the median counts
)

// connect tries one pair with all programs real.
func (p pair) connect(t testing.TB, link lab.Link, tries int) outcome {
	t.Helper()
	if p.runner.Is(lab.OnlyProxy) || p.gateway.Is(lab.OnlyProxy) {
		program(t, stage.ProxyProgram)
	}
	s := setup(t, stage.Options{Link: link, Runner: lab.NATOptions{Kind: p.runner}, Gateway: lab.NATOptions{Kind: p.gateway}})
	var o outcome
	var times []time.Duration
	for range tries - 1 {
		took, _ := firstByte(t, s, "tun")
		times = append(times, took)
	}
	job := newJob(t, s, stage.JobOptions{})
	began := time.Now()
	up(t, job, "tun", "--timeout", "60s")
	touch(t, s)
	times = append(times, time.Since(began))
	o.firstByte = median(times)
	o.first = currentPath(t, job)
	if o.last = o.first; p.direct() {
		o.last, _ = waitPath(t, job, directLimit, path.direct)
		o.direct = time.Since(began)
	}
	touch(t, s)
	culvert(t, job, 0, "down")
	return o
}

// touch fetches the first byte of the private service's answer.
func touch(t testing.TB, s *stage.Stage) {
	t.Helper()
	if got, err := get(t, s, "http://"+s.Target(stage.PortHTTP)); err != nil || got != stage.Greeting {
		t.Fatalf("through the tunnel: %q, %v", got, err)
	}
}

func (p pair) check(t testing.TB, o outcome) {
	t.Helper()
	t.Logf("%v: %v, then %v; first byte after %v, direct after %v", p, o.first, o.last,
		o.firstByte.Round(time.Millisecond), o.direct.Round(time.Millisecond))
	if p.direct() && !o.last.direct() {
		t.Errorf("%v stays on %v, though there is a direct way", p, o.last)
	}
}

// covering gives pairs in which each kind stands at least twice on each side: with its neighbours in the list, so hard with
// easy both ways, and the three that no direct way leads out of with themselves.
func covering() []pair {
	kinds := lab.Kinds()
	var pairs []pair
	for i, k := range kinds {
		next := kinds[(i+1)%len(kinds)]
		pairs = append(pairs, pair{k, next}, pair{next, k})
	}
	for _, k := range []lab.Kind{lab.Hard, lab.OnlyProxy} {
		pairs = append(pairs, pair{k, k})
	}
	return pairs
}

func TestCoveringHasEachKindTwiceOnEachSide(t *testing.T) {
	for _, k := range lab.Kinds() {
		var left, right int
		for _, p := range covering() {
			if p.runner.Is(k) {
				left++
			}
			if p.gateway.Is(k) {
				right++
			}
		}
		if left < 2 || right < 2 {
			t.Errorf("%v is a runner's %d times and a gateway's %d times", k, left, right)
		}
	}
}

// Every pair of networks connects, and directly wherever theory allows. Most of the time is spent waiting, so several pairs are
// tried at once.
func TestEveryNetworkConnects(t *testing.T) {
	const atOnce = 4
	slots := make(chan struct{}, atOnce)
	var wait sync.WaitGroup
	for _, p := range covering() {
		slots <- struct{}{}
		wait.Go(func() {
			defer func() { <-slots }()
			t.Run(p.String(), func(t *testing.T) { p.check(t, p.connect(t, lab.Link{}, 1)) })
		})
	}
	wait.Wait()
}

// TestMatrix tries all pairs one after the other, on links with delay, and writes tables of what became of them.
func TestMatrix(t *testing.T) {
	file := os.Getenv(matrixEnv)
	if file == "" {
		t.Skip("all 81 pairs take minutes: make matrix")
	}
	program(t, stage.ProxyProgram)
	outcomes := map[string]outcome{}
	for _, runner := range lab.Kinds() {
		for _, gateway := range lab.Kinds() {
			p := pair{runner, gateway}
			t.Run(p.String(), func(t *testing.T) {
				o := p.connect(t, lab.Link{Delay: 20 * time.Millisecond}, pairTries)
				p.check(t, o)
				outcomes[p.String()] = o
			})
		}
	}
	if t.Failed() {
		t.Fatal("the tables are not written, because not every pair did as it should")
	}
	must(t, os.WriteFile(file, []byte(tables(outcomes)), 0o644))
}

// tables writes what became of the pairs as Markdown.
func tables(outcomes map[string]outcome) string {
	open := outcomes[pair{lab.Open, lab.Open}.String()].firstByte
	var b strings.Builder
	table := func(title string, cell func(outcome) string) {
		fmt.Fprintf(&b, "\n%s\n\n| runner ↓ gateway → |", title)
		for _, k := range lab.Kinds() {
			fmt.Fprintf(&b, " %v |", k)
		}
		b.WriteString("\n|---" + strings.Repeat("|---", len(lab.Kinds())) + "|\n")
		for _, runner := range lab.Kinds() {
			fmt.Fprintf(&b, "| %v |", runner)
			for _, gateway := range lab.Kinds() {
				fmt.Fprintf(&b, " %s |", cell(outcomes[pair{runner, gateway}.String()]))
			}
			b.WriteString("\n")
		}
	}
	table("The path that stays:", func(o outcome) string { return o.last.String() })
	table(fmt.Sprintf("Time to the first byte, as a multiple of the open pair's %d ms:", open.Milliseconds()),
		func(o outcome) string { return fmt.Sprintf("%.2f", float64(o.firstByte)/float64(open)) })
	table("Seconds from the start of `culvert up` until the path is direct:", func(o outcome) string {
		if o.direct == 0 {
			return "–"
		}
		return fmt.Sprintf("%.1f", o.direct.Seconds())
	})
	return b.String()
}
