package state

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"pgregory.net/rapid"
)

// memberRequest is a member's request for votes.
func memberRequest(term uint64, who string) []byte {
	return append(append(binary.LittleEndian.AppendUint64(nil, term), make([]byte, 16)...), who...)
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
			s.heard(memberRequest(7, string(rune('a'+i))+"1234567"))
			s.heard(memberRequest(7, string(rune('a'+i))+"1234567")) // sent again
		}
		s.heard(voteRequest(7))
		s.heard(voteRequest(0))
		if term, torn := s.torn(7, c.members, c.living); torn != c.want || c.stand > 0 && term != 7 {
			t.Errorf("%d of %d living stand, of %d: %t in term %d", c.stand, c.living, c.members, torn, term)
		}
		if _, torn := s.torn(8, c.members, c.living); torn {
			t.Error("an election of an earlier term is torn")
		}
		if s.heard(memberRequest(6, "late5678")); s.term > 7 {
			t.Error("the term falls back")
		}
		s.heard(voteRequest(8))
		if _, torn := s.torn(7, c.members, c.living); torn {
			t.Error("an election in whose place another one was asked for is torn")
		}
	}
}

// TestTornMeansNobodyWins holds the verdict against every way in which those who do not stand can vote.
func TestTornMeansNobodyWins(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		members := rapid.IntRange(3, 7).Draw(t, "members")
		living := rapid.IntRange(1, members).Draw(t, "living")
		stand := rapid.IntRange(0, living).Draw(t, "stand")
		var s standing
		for i := range stand {
			s.heard(memberRequest(1, string(rune('a'+i))+"1234567"))
		}
		can := stand > 0 && 1+living-stand > members/2 // all the others vote for the same
		if _, torn := s.torn(1, members, living); torn && can || stand > 1 && !can && !torn {
			t.Fatalf("torn %t, and somebody can win %t", torn, can)
		}
	})
}

// TestAsksAgainAtOnce: where both members that are left stand in the same term, the next election is asked for without waiting for the end of that one.
func TestAsksAgainAtOnce(t *testing.T) {
	system := server.NewAccount("$SYS") // in no other may clients publish there
	srv := must(server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true,
		Accounts: []*server.Account{system}, SystemAccount: "$SYS", Users: []*server.User{{Username: "system", Password: "system", Account: system}}, NoAuthUser: "system"}))
	srv.Start()
	defer srv.WaitForShutdown()
	defer srv.Shutdown()
	if !srv.ReadyForConnections(10 * time.Second) {
		t.Fatal("the nats server does not start")
	}
	conn := must(nats.Connect(srv.ClientURL()))
	defer conn.Close()
	member := must(nats.Connect(srv.ClientURL()))
	defer member.Close()
	e := &election{conn: conn, votes: conn, log: quiet, group: "g", members: 3, term: 4}
	e.listen()
	asked, leads := make(chan uint64, 8), make(chan struct{})
	must(member.Subscribe(votesSubject+"g", func(m *nats.Msg) {
		term, who, ok := parseVoteRequest(m.Data)
		if !ok || who != candidate {
			return
		}
		asked <- term
		switch term {
		case 5: // both stand
			_ = member.Publish(votesSubject+"g", memberRequest(6, "member-1"))
			_ = member.Publish(votesSubject+"g", memberRequest(6, "member-2"))
		case 7:
			_ = member.Publish(votesSubject+"g", memberRequest(8, "member-1"))
			close(leads)
		}
	}))
	if err := errors.Join(member.Flush(), conn.Flush()); err != nil {
		t.Fatal(err)
	}
	e.info = func(context.Context) (*jetstream.StreamInfo, error) {
		select {
		case <-leads:
			return &jetstream.StreamInfo{Cluster: &jetstream.ClusterInfo{Leader: "n1"}}, nil
		default:
			return nil, nats.ErrNoResponders
		}
	}
	if !e.elect(t.Context(), finding{term: 4, answered: 2}) {
		t.Error("nobody is elected")
	}
	if a, b := <-asked, <-asked; a != 5 || b != 7 || len(asked) > 0 || e.term != 7 {
		t.Errorf("asked in %d and %d, and %d times more; at %d", a, b, len(asked), e.term)
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
	f.Add(voteRequest(3))
	f.Add(memberRequest(1<<63, "fjFyEjc1"))
	f.Add([]byte("\x07\x00\x00\x00\x00\x00\x00\x00fjFyEjc1\x02"))
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
		if name, _, ok := parseServer(b); ok && name == "" {
			t.Error("a server without a name")
		}
	})
}

// standing reports whether anybody does.
func (s *standing) standing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.who) > 0
}
