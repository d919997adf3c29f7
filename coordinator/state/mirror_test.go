package state

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// change is one revision of the bucket.
type change struct {
	id       string
	record   record // nil for a removal
	revision uint64
}

// TestMirrorEndsWhereTheBucketDoes has the watch bring a random history in order while this node's own writes, some of
// the same history, arrive at random moments, also between the watch's look and its taking a value.
func TestMirrorEndsWhereTheBucketDoes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newMirror()
		m.begin()
		m.settle()
		var history []change
		want := map[string]uint64{}
		for i := range rapid.IntRange(1, 20).Draw(t, "length") {
			c := change{fmt.Sprint(rapid.IntRange(0, 2).Draw(t, "key")), presence{}, uint64(i + 1)}
			want[c.id] = c.revision
			if rapid.Bool().Draw(t, "removal") {
				c.record = nil
				delete(want, c.id)
			}
			history = append(history, c)
		}
		var own []change
		for _, c := range history {
			if rapid.Bool().Draw(t, "own") {
				own = append(own, c)
			}
		}
		write := func() { // any number of this node's writes, in their order, and each visible from then on
			for len(own) > 0 && rapid.Bool().Draw(t, "now") {
				c := own[0]
				own = own[1:]
				m.wrote(gatewayKind, c.id, c.record, c.revision)
				if _, revision := m.get(gatewayKind, c.id); c.record != nil && revision < c.revision && m.seen < c.revision {
					t.Fatalf("wrote revision %d of %s and reads %d", c.revision, c.id, revision)
				}
			}
		}
		for _, c := range history {
			write()
			if c.record == nil {
				m.watched(gatewayKind, c.id, nil, c.revision)
			} else if !m.knows(gatewayKind, c.id, c.revision) {
				write()
				m.watched(gatewayKind, c.id, c.record, c.revision)
			}
		}
		for len(own) > 0 {
			write()
		}
		for id := range 3 {
			id := fmt.Sprint(id)
			r, revision := m.get(gatewayKind, id)
			if revision != want[id] || (r != nil) != (want[id] != 0) {
				t.Fatalf("%s is at %d, want %d", id, revision, want[id])
			}
		}
		if got := len(m.entries[gatewayKind]); got != len(want) {
			t.Fatalf("%d entries, want %d", got, len(want))
		}
	})
}

func TestMirrorReadsItsOwnWrites(t *testing.T) {
	m := newMirror()
	m.begin()
	p := presence{Expires: time.Now().Add(time.Hour)}
	if m.knows(gatewayKind, "gw", 1) {
		t.Error("knows what it never saw")
	}
	m.wrote(gatewayKind, "gw", p, 1) // acknowledged while the watch decodes the same revision
	if len(m.all(gatewayKind, time.Now())) != 1 {
		t.Error("does not read its own write")
	}
	m.watched(gatewayKind, "gw", p, 1)
	m.wrote(gatewayKind, "gw", nil, 2)
	if len(m.all(gatewayKind, time.Now())) != 0 {
		t.Error("reads what it removed")
	}
	m.watched(gatewayKind, "gw", nil, 2)
	m.wrote(gatewayKind, "gw", p, 1) // late
	if len(m.all(gatewayKind, time.Now())) != 0 {
		t.Error("a late write brings back what is gone")
	}
}

func TestMirrorStartsOver(t *testing.T) {
	m := newMirror()
	m.begin()
	m.watched(gatewayKind, "gone", presence{}, 1)
	m.watched(gatewayKind, "stays", presence{}, 2)
	m.settle()
	<-m.ready
	m.begin()
	if !m.knows(gatewayKind, "stays", 2) {
		t.Error("does not know what stayed")
	}
	m.wrote(gatewayKind, "new", presence{}, 9)
	m.settle()
	for id, want := range map[string]bool{"gone": false, "stays": true, "new": true} {
		if r, _ := m.get(gatewayKind, id); (r != nil) != want {
			t.Errorf("%s: there %v, want %v", id, r != nil, want)
		}
	}
}

// TestMirrorBehind: what the watch has not brought of our own is told, and gateways are not gone for that.
func TestMirrorBehind(t *testing.T) {
	m := newMirror()
	m.begin()
	m.settle()
	later := func() time.Time { return time.Now().Add(time.Minute) }
	m.watched(gatewayKind, "a", presence{}, 4)
	m.wrote(gatewayKind, "a", presence{}, 3)
	if d := m.behind(later()); d != 0 {
		t.Errorf("behind by %v with what came already", d)
	}
	m.wrote(gatewayKind, "a", presence{}, 7)
	m.wrote(gatewayKind, "b", presence{}, 9)
	m.watched(gatewayKind, "c", presence{}, 6)
	if d := m.behind(later()); d < 50*time.Second {
		t.Errorf("behind by %v without the first", d)
	}
	now := time.Now()
	m.stall(now)
	m.goesOn() // with what that server has
	if at := m.asOf(now.Add(10 * time.Second)); !at.Equal(now) {
		t.Errorf("shows %v", at.Sub(now))
	}
	if at := m.asOf(now.Add(stallFor + time.Second)); at.Equal(now) {
		t.Error("stalls for ever")
	}
	if !m.knows(gatewayKind, "b", 9) || m.behind(later()) != 0 {
		t.Error("behind with all that there is")
	}
	m.goesOn()
	if at := m.asOf(now.Add(10 * time.Second)); at.Equal(now) {
		t.Error("stalled with all that there is")
	}
}
