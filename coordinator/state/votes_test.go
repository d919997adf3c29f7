package state

import (
	"context"
	"encoding/binary"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"pgregory.net/rapid"
)

// memberRequest is a member's request for votes.
func memberRequest(term uint64, who string) []byte {
	return append(append(binary.LittleEndian.AppendUint64(nil, term), make([]byte, 16)...), who...)
}

func member(i int) string { return string(rune('a'+i)) + "1234567" }

// members are the first n.
func members(n int) map[string]bool {
	out := map[string]bool{}
	for i := range n {
		out[member(i)] = true
	}
	return out
}

// TestTorn: an election is given up where nobody can win it, however the votes fall, and never where somebody can.
func TestTorn(t *testing.T) {
	for _, c := range []struct {
		stand, members, living int
		want                   bool
	}{
		{0, 3, 2, false}, {1, 3, 2, false}, {2, 3, 2, true}, {2, 3, 3, false}, {3, 3, 3, true},
		{2, 5, 3, true}, {2, 5, 4, false}, {3, 5, 5, false}, {4, 5, 5, true},
	} {
		var s standing
		for i := range c.stand {
			s.heard(memberRequest(7, member(i)))
			s.heard(memberRequest(7, member(i))) // sent again
		}
		s.heard(memberRequest(7, "cut-off1"))
		s.heard(voteRequest(7, place{}))
		s.heard(voteRequest(0, place{}))
		if term, torn := s.torn(c.members, members(c.living)); torn != c.want || term != 7 {
			t.Errorf("%d of %d living stand, of %d: %t in term %d", c.stand, c.living, c.members, torn, term)
		}
		if s.heard(memberRequest(6, "late5678")); s.term > 7 {
			t.Error("the term falls back")
		}
		s.heard(voteRequest(8, place{}))
		if _, torn := s.torn(c.members, members(c.living)); torn {
			t.Error("an election in whose place another one was asked for is torn")
		}
	}
}

// TestTornMeansNobodyWins holds the verdict against every way in which those who do not stand can vote.
func TestTornMeansNobodyWins(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := rapid.IntRange(3, 7).Draw(t, "members")
		living := rapid.IntRange(1, all).Draw(t, "living")
		stand := rapid.IntRange(0, living).Draw(t, "stand")
		var s standing
		for i := range stand {
			s.heard(memberRequest(1, member(i)))
		}
		can := stand > 0 && 1+living-stand > all/2 // all the others vote for the same
		if _, torn := s.torn(all, members(living)); torn && can || stand > 1 && !can && !torn {
			t.Fatalf("torn %t, and somebody can win %t", torn, can)
		}
	})
}

// group is an election of a group whose members the test plays, over a server of its own.
func group(t *testing.T, stand func(asked uint64) (who []string, led bool)) (e *election, asked chan uint64) {
	t.Helper()
	p, _ := panelOf(t, "n1")
	part := must(nats.Connect(p.seats[0].conn.ConnectedUrl()))
	t.Cleanup(part.Close)
	e = newElection(p, quiet, p.seats[0].conn, nil, func() {})
	e.group, e.members = "g", map[string]bool{member(0): true, member(1): true, peerOf("n1"): true}
	e.listen()
	asked = make(chan uint64, 64)
	var leads atomic.Bool
	must(part.Subscribe(votesSubject+"g", func(m *nats.Msg) {
		term, who, ok := parseVoteRequest(m.Data)
		if !ok || who != candidate {
			return
		}
		asked <- term
		all, led := stand(term)
		for _, who := range all {
			_ = part.Publish(votesSubject+"g", memberRequest(term+1, who))
		}
		leads.Store(led)
	}))
	e.info = func(context.Context) (*jetstream.StreamInfo, error) {
		if leads.Load() {
			return &jetstream.StreamInfo{Cluster: &jetstream.ClusterInfo{Leader: "n1"}}, nil
		}
		return nil, nats.ErrNoResponders
	}
	if err := errors.Join(part.Flush(), e.conn.Flush()); err != nil {
		t.Fatal(err)
	}
	e.stand.over(4)
	e.stand.wait = time.Minute
	return e, asked
}

// TestAsksAgainAtOnce: where both members that are left stand in the same term, the next election is asked for without waiting for the end of that one. Whoever
// is cut off and stands as well is not counted.
func TestAsksAgainAtOnce(t *testing.T) {
	e, asked := group(t, func(asked uint64) ([]string, bool) {
		if asked == 5 {
			return []string{member(0), peerOf("n1")}, false
		}
		return []string{member(0), member(1)}, true
	})
	if !e.elect(t.Context(), finding{term: 4, reached: map[string]bool{member(0): true, peerOf("n1"): true}}) {
		t.Error("nobody is elected")
	}
	if a, b := <-asked, <-asked; a != 5 || b != 7 || len(asked) > 0 {
		t.Errorf("asked in %d and %d, and %d times more", a, b, len(asked))
	}
}

// TestAsksNoMore: where one election after the other comes to nothing, which is so where disks are slower than members' patience, they are left to hold
// one by themselves for a while.
func TestAsksNoMore(t *testing.T) {
	e, asked := group(t, func(uint64) ([]string, bool) { return []string{member(0), peerOf("n1")}, false })
	f := finding{term: 4, reached: map[string]bool{member(0): true, peerOf("n1"): true}}
	if e.elect(t.Context(), f) {
		t.Error("somebody is elected")
	}
	for i := range uint64(maxElections + 1) {
		if term := <-asked; term != 5+2*i {
			t.Errorf("asked in term %d", term)
		}
	}
	e.stand.over(1 << 20)
	if e.elect(t.Context(), f) {
		t.Error("somebody is elected, whom nobody asked")
	}
	e.panel.publish(votesSubject+"g", voteRequest(1<<30, place{}), all)
	if term := <-asked; term != 1<<30 {
		t.Errorf("asked again, in term %d", term)
	}
}

// TestOneElectionAtATime: while others' election may still give a leader, none is asked for; each new term has as long.
func TestOneElectionAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s standing
		if s.saw(7); s.comingTo() != electionWait {
			t.Error("a term that has moved is no election")
		}
		s.over(7)
		if s.saw(7); s.comingTo() != 0 {
			t.Error("an election after its end")
		}
		s.heard(voteRequest(8, place{}))
		time.Sleep(electionWait - 1)
		if s.comingTo() != 1 {
			t.Error("given up")
		}
		s.heard(memberRequest(9, member(0)))
		time.Sleep(electionWait - 1)
		if s.heard(memberRequest(9, member(0))); s.comingTo() != 1 {
			t.Error("the same again, and has longer")
		}
		if s.next(8) || s.comingTo() != 1 {
			t.Error("asked for one in a term that has been")
		}
		if !s.next(9) || s.comingTo() != electionWait || s.latest() != 10 {
			t.Error("what we ask for is none")
		}
	})
}

// TestCutOffIsLeftAlone: what is asked of members goes by servers that are not cut off from most.
func TestCutOffIsLeftAlone(t *testing.T) {
	p, _ := panelOf(t, "a", "b")
	heard := make(chan string, 8)
	for _, s := range p.seats {
		name := s.conn.ConnectedServerName()
		must(s.conn.Subscribe(votesSubject+"g", func(*nats.Msg) { heard <- name }))
	}
	f := finding{reached: map[string]bool{peerOf("b"): true, peerOf("c"): true}, direct: map[string]bool{peerOf("a"): true}}
	p.publish(votesSubject+"g", nil, f.cutOff)
	for _, s := range p.seats {
		if err := s.conn.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if name := <-heard; name != "b" {
		t.Error("who is cut off is asked")
	}
	for _, s := range p.seats {
		if err := s.conn.Flush(); err != nil || len(heard) > 0 {
			t.Errorf("%d more are asked: %v", len(heard), err)
		}
	}
}

// TestServersSaySync: who does not sync before it acknowledges is named.
func TestServersSaySync(t *testing.T) {
	for text, want := range map[string]struct {
		name       string
		always, ok bool
	}{
		`{"server":{"name":"n1"},"data":{"config":{"max_memory":1,"sync_always":true}}}`:           {"n1", true, true},
		`{"server":{"name":"n1"},"data":{"config":{"max_memory":1,"sync_interval":120000000000}}}`: {"n1", false, true},
		`{"server":{"name":"n1"},"data":{"disabled":true}}`:                                        {},
		`{"server":{"name":"n1"},"data":`:                                                          {},
		`{}`:                                                                                       {},
		``:                                                                                         {},
	} {
		if name, always, ok := parseServer([]byte(text)); name != want.name || always != want.always || ok != want.ok {
			t.Errorf("%s: %q %t %t", text, name, always, ok)
		}
	}
}

// FuzzMembers reads what members and servers of a cluster say.
func FuzzMembers(f *testing.F) {
	f.Add(voteRequest(3, place{}))
	f.Add(memberRequest(1<<63, "fjFyEjc1"))
	f.Add([]byte("\x07\x00\x00\x00\x00\x00\x00\x00fjFyEjc1\x02"))
	f.Add([]byte(`{"data":{"account":"A","A":{"g":{"id":"fjFyEjc1","state":"LEADER","committed":6,"pterm":7,"pindex":8}}}}`))
	f.Add([]byte(`{"server":{"name":"n1"},"data":{"config":{"sync_always":true}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s standing
		s.heard(b)
		if term, _, ok := parseVoteRequest(b); ok && s.term != term {
			t.Errorf("heard %d, of %d", s.term, term)
		}
		if _, peer, ok := parseVote(b); ok && len(peer) != peerLength {
			t.Errorf("a peer %q", peer)
		}
		if p, ok := parsePlace(b, "A", "g"); ok && p.Peer == "" {
			t.Error("a place of nobody")
		}
		_ = parseAccount(b)
		if name, _, ok := parseServer(b); ok && name == "" {
			t.Error("a server without a name")
		}
	})
}
