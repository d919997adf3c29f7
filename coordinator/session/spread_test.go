package session

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/coordinator/state"
)

// forget makes a manager know of no placements of its own.
func (p *placements) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.by = nil
}

// TestSpreadEvenly: jobs that join at once, before any presence could say so, are spread over all gateways.
func TestSpreadEvenly(t *testing.T) {
	for _, gateways := range []int{1, 2, 3, 10} {
		b := newBench(t, Options{})
		var list []state.Presence
		for i := range gateways {
			list = append(list, state.Presence{Instance: fmt.Sprint("gateway-", i)})
		}
		now := time.Now()
		b.now.Store(&now)
		got := map[string]int{}
		const each = 20
		for i := range each * gateways {
			first := b.m.spread(fmt.Sprint("session-", i), slices.Clone(list))[0]
			b.m.placed.note(first.Instance)(now)
			got[first.Instance]++
		}
		for _, g := range list {
			if n := got[g.Instance]; n < each*3/4 || n > each*5/4 || gateways < 3 && n != each {
				t.Errorf("of %d gateways %s got %d of %d jobs", gateways, g.Instance, n, each*gateways)
			}
		}
		later := now.Add(placedFor)
		b.now.Store(&later)
		b.m.spread("another", slices.Clone(list))
		if len(b.m.placed.by) != 0 {
			t.Errorf("placements of a while ago are kept: %v", b.m.placed.by)
		}
	}
}

// TestSpreadIsAnOrder: whatever the loads, every gateway comes once, the first is no heavier than the second, the rest are in order
// of their load, and the same question has the same answer.
func TestSpreadIsAnOrder(t *testing.T) {
	b := newBench(t, Options{MaxOffers: 6})
	few := newBench(t, Options{MaxOffers: 2})
	rapid.Check(t, func(t *rapid.T) {
		var list []state.Presence
		for i, n := range rapid.SliceOfN(rapid.IntRange(0, 5), 0, 6).Draw(t, "loads") {
			list = append(list, state.Presence{Instance: fmt.Sprint("gateway-", i), Sessions: n})
		}
		id := rapid.StringN(1, 22, 22).Draw(t, "session")
		got := b.m.spread(id, slices.Clone(list))
		if len(got) != len(list) {
			t.Fatalf("%d of %d", len(got), len(list))
		}
		for _, g := range list {
			if !slices.ContainsFunc(got, func(o state.Presence) bool { return o.Instance == g.Instance }) {
				t.Fatalf("%s is missing", g.Instance)
			}
		}
		if len(got) == 2 && got[0].Sessions > got[1].Sessions {
			t.Fatalf("the heavier of two comes first")
		}
		if len(got) > 2 && !slices.IsSortedFunc(got[1:], func(a, b state.Presence) int { return a.Sessions - b.Sessions }) {
			t.Fatalf("out of order: %v", got)
		}
		if len(got) > 2 && got[0].Sessions == 5 && slices.ContainsFunc(got, func(o state.Presence) bool { return o.Sessions < 5 }) {
			twice := 0
			for _, g := range got {
				if g.Sessions == 5 {
					twice++
				}
			}
			if twice < 2 {
				t.Fatalf("the heaviest of all comes first")
			}
		}
		again := b.m.spread(id, slices.Clone(list))
		if !slices.EqualFunc(got, again, func(a, b state.Presence) bool { return a.Instance == b.Instance }) {
			t.Fatalf("%v, then %v", got, again)
		}
		first := few.m.spread(id, slices.Clone(list))
		if !slices.EqualFunc(got[:min(len(got), 2)], first, func(a, b state.Presence) bool { return a.Instance == b.Instance }) {
			t.Fatalf("of %v as many as are asked are %v", got, first)
		}
	})
}

// TestPlacementsCountOnce: what a presence counts is not counted again; what is still being offered, or was answered after the presence
// was counted, is.
func TestPlacementsCountOnce(t *testing.T) {
	var p placements
	at := time.Unix(1_000_000, 0)
	g := state.Presence{Instance: "a", Counted: at}
	p.note("a")(at.Add(-time.Millisecond))
	p.note("a")(at.Add(time.Millisecond))
	open := p.note("a")
	p.note("b")
	if n := p.beyond(&g, at.Add(2*time.Millisecond)); n != 2 {
		t.Errorf("%d", n)
	}
	open(at.Add(3 * time.Millisecond))
	g.Counted = at.Add(4 * time.Millisecond)
	if n := p.beyond(&g, at.Add(5*time.Millisecond)); n != 0 {
		t.Errorf("%d that the presence counts", n)
	}
	g.Counted = time.Time{} // a clock that is far behind
	if n := p.beyond(&g, at.Add(placedFor+3*time.Millisecond)); n != 0 || p.by["a"] != nil {
		t.Errorf("%d of a while ago", n)
	}
}
