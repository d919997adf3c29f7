package state

import (
	"testing"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

func instances(s *Store, network string) (out []string) {
	for _, p := range s.Gateways(network) {
		out = append(out, p.Instance)
	}
	return out
}

func TestPresence(t *testing.T) {
	c := newClock()
	s := open(t, Options{now: c.now})
	put := func(p Presence, ttl time.Duration) {
		t.Helper()
		p.Key = wire.Key{1}
		if err := s.PutPresence(t.Context(), p, ttl); err != nil {
			t.Fatal(err)
		}
	}
	put(Presence{Instance: "busy", Network: "corp", Sessions: 9}, time.Minute)
	put(Presence{Instance: "idle", Network: "corp", Sessions: 1, Candidates: []wire.Candidate{{Kind: wire.Host}}}, time.Minute)
	put(Presence{Instance: "short", Network: "corp", Sessions: 5}, time.Second)
	put(Presence{Instance: "also idle", Network: "corp", Sessions: 1}, time.Minute)
	put(Presence{Instance: "leaving", Network: "corp", Leaving: true}, time.Minute)
	put(Presence{Instance: "lab.1", Network: "lab"}, time.Minute)

	expect := func(network string, want ...string) {
		t.Helper()
		got := instances(s, network)
		if len(got) != len(want) {
			t.Fatalf("%s has %q, want %q", network, got, want)
		}
		for i := range want {
			if got[i] != want[i] {
				t.Fatalf("%s has %q, want %q", network, got, want)
			}
		}
	}
	expect("corp", "also idle", "idle", "short", "busy")
	expect("lab", "lab.1")
	expect("none")

	s.Gateways("corp")[1].Name = "mine"
	if s.Gateways("corp")[1].Name == "mine" {
		t.Error("a caller changed what is stored")
	}
	c.turn(time.Second)
	expect("corp", "also idle", "idle", "busy")
	put(Presence{Instance: "busy", Network: "corp", Sessions: 0}, time.Minute)
	expect("corp", "busy", "also idle", "idle")
	for range 2 {
		if err := s.DropPresence(t.Context(), "busy"); err != nil {
			t.Fatal(err)
		}
	}
	expect("corp", "also idle", "idle")
	for name, p := range map[string]Presence{
		"no instance": {Key: wire.Key{1}},
		"no key":      {Instance: "x"},
	} {
		if s.PutPresence(t.Context(), p, time.Minute) == nil {
			t.Errorf("took a presence with %s", name)
		}
	}
	if s.PutPresence(t.Context(), Presence{Instance: "x", Key: wire.Key{1}}, 0) == nil {
		t.Error("took a presence without a time")
	}
}
