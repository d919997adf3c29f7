package state

import (
	"context"
	"encoding/binary"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// plays has a member answer what is asked at a seat's server, as long as it is willing.
func plays(t *testing.T, s *seat, peer string, willing func() bool) {
	t.Helper()
	part := must(nats.Connect(s.conn.ConnectedUrl()))
	t.Cleanup(part.Close)
	must(part.Subscribe(votesSubject+"g", func(m *nats.Msg) {
		if willing() {
			_ = m.Respond(append(append(binary.LittleEndian.AppendUint64(nil, 7), peer...), 0))
		}
	}))
	if err := part.Flush(); err != nil {
		t.Fatal(err)
	}
}

// TestWhoReachesWhom: a leader that answers through its own server, again and again, and through no other one is cut off from the others; one that answers once, and
// then waits for its disk, is not known to be.
func TestWhoReachesWhom(t *testing.T) {
	p, _ := panelOf(t, "a", "b")
	a, b, c := peerOf("a"), peerOf("b"), peerOf("c")
	e := newElection(p, quiet, p.seats[0].conn, nil, func() {})
	e.group, e.members, e.leading = "g", map[string]bool{a: true, b: true, c: true}, a
	e.info = func(context.Context) (*jetstream.StreamInfo, error) { return nil, nats.ErrTimeout }
	var asked, patience atomic.Int32
	patience.Store(1 << 30)
	plays(t, p.seats[0], a, func() bool { return asked.Add(1) <= patience.Load() })
	plays(t, p.seats[1], b, func() bool { return true })
	plays(t, p.seats[1], c, func() bool { return true })
	eventually(t, "it is seen that the leader is cut off", func() bool {
		f := e.inquire(t.Context())
		return f.term == 7 && len(f.reached) == 2 && f.reached[b] && f.reached[c] && f.cutOff(a) && !f.cutOff(b) && f.verdict(3, callSlow) == lost
	})
	eventually(t, "that it answers once more tells nothing", func() bool {
		asked.Store(0)
		patience.Store(1)
		f := e.inquire(t.Context())
		if f.cutOff(a) {
			t.Fatal("cut off, as it seems")
		}
		return asked.Load() == 2 && f.verdict(3, callSlow) == late
	})
	p.seats[0].note(false)
	eventually(t, "its server is dead", func() bool { return e.inquire(t.Context()).cutOff(a) })
}
