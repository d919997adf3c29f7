package state

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go"
	"pgregory.net/rapid"
)

// TestSitsOut: those that are behind the best are asked for their vote with a log that they grant it to, and the best are not.
func TestSitsOut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		places := map[string]place{}
		for i := range rapid.IntRange(0, 5).Draw(t, "members") {
			places[member(i)] = place{Term: rapid.Uint64Range(1, 3).Draw(t, "term"), Index: rapid.Uint64Range(1, 3).Draw(t, "index")}
		}
		log := sitsOut(places)
		stand := 0
		for _, p := range places {
			best := true
			for _, other := range places {
				best = best && !p.behind(other)
			}
			if stands := log.behind(p); stands != best { // as Raft has it: a vote is granted to a log that is not behind one's own
				t.Fatalf("%v: with %v, %v stands: %t", places, log, p, stands)
			}
			if best {
				stand++
			}
		}
		if len(places) > 0 && stand == 0 {
			t.Fatalf("%v: nobody stands", places)
		}
	})
}

// TestWaits: who has won and waits for its heartbeat is told from who waits for others to write what it has written, and from who leads.
func TestWaits(t *testing.T) {
	for name, c := range map[string]struct {
		a, b place
		want bool
	}{
		"it waits":                    {place{State: "LEADER", Term: 7, Index: 9, Committed: 8}, place{State: "FOLLOWER", Term: 7, Index: 9, Committed: 7}, true},
		"it leads":                    {place{State: "LEADER", Term: 7, Index: 9, Committed: 9}, place{State: "FOLLOWER", Term: 7, Index: 9, Committed: 8}, false},
		"the other has not caught up": {place{State: "LEADER", Term: 7, Index: 9, Committed: 7}, place{State: "FOLLOWER", Term: 6, Index: 8, Committed: 7}, false},
		"nobody has won":              {place{State: "CANDIDATE", Term: 7, Index: 9, Committed: 7}, place{State: "FOLLOWER", Term: 7, Index: 9, Committed: 7}, false},
	} {
		if got := waits(map[string]place{"a": c.a, "b": c.b}, 2); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
	if waits(map[string]place{"a": {State: "LEADER", Index: 9}}, 2) {
		t.Error("the other has not been heard")
	}
}

// told answers for servers that are asked how far their members are.
func told(t *testing.T, e *election, says func() map[string]string) {
	t.Helper()
	part := must(nats.Connect(e.conn.ConnectedUrl()))
	t.Cleanup(part.Close)
	must(part.Subscribe(placesSubject, func(m *nats.Msg) {
		for peer, place := range says() {
			_ = m.Respond(fmt.Appendf(nil, `{"server":{"name":"x"},"data":{"A":{"g":{"id":%q,%s}}}}`, peer, place))
		}
	}))
	if err := part.Flush(); err != nil {
		t.Fatal(err)
	}
	e.account = "A"
}

// TestWhoIsBehindSitsOut: where one of the members that are left is behind, the vote is asked for with its log.
func TestWhoIsBehindSitsOut(t *testing.T) {
	e, asked := group(t, func(uint64) ([]string, bool) { return []string{member(0)}, true })
	told(t, e, func() map[string]string {
		return map[string]string{member(0): `"state":"FOLLOWER","pterm":3,"pindex":933`, peerOf("n1"): `"state":"FOLLOWER","pterm":3,"pindex":932`, member(1): `"pterm":3,"pindex":940`}
	})
	logs := make(chan []byte, 8)
	must(e.conn.Subscribe(votesSubject+"g", func(m *nats.Msg) {
		if slices.Equal(m.Data[24:], []byte(candidate)) {
			logs <- m.Data
		}
	}))
	if !e.elect(t.Context(), finding{term: 4, reached: map[string]bool{member(0): true, peerOf("n1"): true}}) || <-asked != 5 {
		t.Error("nobody is elected")
	}
	if log := <-logs; binary.LittleEndian.Uint64(log[8:]) != 3 || binary.LittleEndian.Uint64(log[16:]) != 932 {
		t.Errorf("asked with %x", log)
	}
}

// TestAsksAgainWhereTheWinnerWaits: who has won, and would not lead for a second, is not waited for; but that is looked for once somebody stands.
func TestAsksAgainWhereTheWinnerWaits(t *testing.T) {
	var terms atomic.Uint64
	e, asked := group(t, func(term uint64) ([]string, bool) {
		terms.Store(term)
		return []string{member(0)}, term == 7
	})
	told(t, e, func() map[string]string {
		if terms.Load() != 5 {
			return map[string]string{member(0): `"state":"FOLLOWER","pterm":3,"pindex":9`, peerOf("n1"): `"state":"FOLLOWER","pterm":3,"pindex":9`}
		}
		return map[string]string{member(0): `"state":"LEADER","pterm":6,"pindex":10,"committed":9`, peerOf("n1"): `"state":"FOLLOWER","pterm":6,"pindex":10,"committed":9`}
	})
	if !e.elect(t.Context(), finding{term: 4, reached: map[string]bool{member(0): true, peerOf("n1"): true}}) {
		t.Error("nobody is elected")
	}
	if a, b := <-asked, <-asked; a != 5 || b != 7 || len(asked) > 0 {
		t.Errorf("asked in %d and %d, and %d times more", a, b, len(asked))
	}
}

// TestParsePlace: what is not about the group, or is none, is no place.
func TestParsePlace(t *testing.T) {
	text := `{"server":{"name":"n1"},"data":{"A":{"g":{"id":"fjFyEjc1","state":"LEADER","committed":6,"pterm":7,"pindex":8}}}}`
	if p, ok := parsePlace([]byte(text), "A", "g"); !ok || p != (place{Peer: "fjFyEjc1", State: "LEADER", Committed: 6, Term: 7, Index: 8}) {
		t.Errorf("%+v %t", p, ok)
	}
	for _, c := range [][3]string{{text, "B", "g"}, {text, "A", "h"}, {`{"error":{"code":403}}`, "A", "g"}, {``, "", ""}, {text[:60], "A", "g"}} {
		if p, ok := parsePlace([]byte(c[0]), c[1], c[2]); ok {
			t.Errorf("%q: %+v", c[0], p)
		}
	}
	if got := parseAccount([]byte(`{"server":{},"data":{"user":"u","account":"CULVERT"}}`)); got != "CULVERT" {
		t.Errorf("account %q", got)
	}
}
