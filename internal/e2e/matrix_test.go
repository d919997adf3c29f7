//go:build linux

package e2e

import (
	"sync"
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/lab"
	"github.com/culvertnet/culvert/internal/stage"
)

// pair is a runner's network and a gateway's.
type pair struct{ runner, gateway lab.Kind }

func (p pair) String() string { return p.runner.String() + " to " + p.gateway.String() }

// mapsHard reports a NAT that gives every destination another port.
func mapsHard(k lab.Kind) bool { return k.Is(lab.Hard) || k.Is(lab.CarrierGrade) }

// direct reports whether the path has to be direct: UDP passes on both sides, and not both map hard, unless each to so few ports
// that guesses of both sides meet.
func (p pair) direct() bool {
	if !p.runner.UDP() || !p.gateway.UDP() {
		return false
	}
	return !(mapsHard(p.runner) && mapsHard(p.gateway)) || p.lucky()
}

// lucky reports whether guesses of both sides have to meet, which they do in 97 of 100 sessions.
func (p pair) lucky() bool { return p.runner.Is(lab.CarrierGrade) && p.gateway.Is(lab.CarrierGrade) }

// outcome is what became of a pair.
type outcome struct {
	First     string        `json:"first"`      // the path that carried the first byte
	Last      string        `json:"last"`       // the one that stayed
	FirstByte time.Duration `json:"first_byte"` // from the start of `culvert up`, median
	Direct    time.Duration `json:"direct"`     // from then until the path was direct; 0 where it stays relayed
	Sessions  int           `json:"sessions"`   // until one was direct
}

// Limits on a pair.
const (
	directLimit   = time.Minute
	pairTries     = 3 // to the first byte; the median counts
	luckySessions = 3 // of a pair that needs luck
)

// connect tries one pair with all programs real.
func (p pair) connect(t testing.TB, link lab.Link, tries int) outcome {
	t.Helper()
	s := p.stage(t, link)
	var o outcome
	var times []time.Duration
	for range tries - 1 {
		took, _ := firstByte(t, s, "tun")
		times = append(times, took)
	}
	for o.Sessions = 1; ; o.Sessions++ {
		job := newJob(t, s, stage.JobOptions{})
		began := time.Now()
		up(t, job, "tun", "--timeout", "60s")
		touch(t, s)
		times = append(times, time.Since(began))
		first := currentPath(t, job)
		last := first
		if p.direct() {
			last, _ = waitPath(t, job, directLimit, path.direct)
			o.Direct = time.Since(began)
		}
		touch(t, s)
		culvert(t, job, 0, "down")
		o.First, o.Last = first.String(), last.String()
		if last.direct() || !p.lucky() || o.Sessions == luckySessions {
			break
		}
	}
	o.FirstByte = median(times)
	return o
}

// stage sets the pair up.
func (p pair) stage(t testing.TB, link lab.Link) *stage.Stage {
	t.Helper()
	if p.runner.Is(lab.OnlyProxy) || p.gateway.Is(lab.OnlyProxy) {
		program(t, stage.ProxyProgram)
	}
	return setup(t, stage.Options{Link: link, Runner: lab.NATOptions{Kind: p.runner}, Gateway: lab.NATOptions{Kind: p.gateway}})
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
	t.Logf("%v: %v, then %v; first byte after %v, direct after %v", p, o.First, o.Last,
		o.FirstByte.Round(time.Millisecond), o.Direct.Round(time.Millisecond))
	if p.direct() && o.Last != "direct" {
		t.Errorf("%v stays on %v, though there is a direct way", p, o.Last)
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
