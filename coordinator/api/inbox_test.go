package api

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/culvertnet/culvert/coordinator/session"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

func said(t wire.FrameType, id string, n int) wire.Frame {
	body, _ := json.Marshal(map[string]any{"session": id, "token": fmt.Sprint(n)})
	return wire.Frame{Type: t, Body: body}
}

func inboxSession(n int) string { return fmt.Sprintf("%022d", n) }

// TestInboxKeepsOrder has any number of workers work off what a gateway says in any order of events: each session's messages come in their
// order, nobody works on a session that another one works on, nothing is left out but renewals that a later one has overtaken, and no worker
// goes home while there is something that nobody works on.
func TestInboxKeepsOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := newInbox(newLedger())
		type message struct {
			t wire.FrameType
			n int
		}
		put, got := map[string][]message{}, map[string][]message{}
		var at []string // the line that each worker is at
		work := func() {
			i := rapid.IntRange(0, len(at)-1).Draw(t, "worker")
			line := at[i]
			f := b.first(line)
			var of struct{ Session, Token string }
			if err := json.Unmarshal(f.Body, &of); err != nil {
				t.Fatal(err)
			}
			again := rapid.IntRange(0, 3).Draw(t, "again") == 0
			if !again {
				var n int
				_, _ = fmt.Sscan(of.Token, &n)
				got[of.Session] = append(got[of.Session], message{f.Type, n})
			}
			next, more := b.done(line, again)
			if at = slices.Delete(at, i, i+1); more {
				at = append(at, next)
			}
		}
		for n := range rapid.IntRange(1, 200).Draw(t, "messages") {
			for len(at) > 0 && rapid.Bool().Draw(t, "work") {
				work()
			}
			id := inboxSession(rapid.IntRange(0, 80).Draw(t, "session"))
			kind := rapid.SampledFrom([]wire.FrameType{wire.FrameRenewed, wire.FrameRenewed, wire.FrameTaken, wire.FrameEnd, wire.FrameFlows, wire.FrameCandidates}).Draw(t, "type")
			taken, line, starts := b.put(said(kind, id, n))
			if !taken {
				t.Fatal("no room")
			}
			if put[id] = append(put[id], message{kind, n}); starts {
				at = append(at, line)
			}
			seen := map[string]bool{}
			for _, l := range at {
				if seen[l] {
					t.Fatalf("two work on %q", l)
				}
				seen[l] = true
			}
			if len(seen) > maxAtOnce+2 {
				t.Fatalf("%d work", len(seen))
			}
		}
		for len(at) > 0 {
			work()
		}
		if b.own.backlog.Load() != 0 || b.size != 0 || len(b.lines) != 0 || b.working != 0 {
			t.Fatalf("left: %d bytes, %d lines, %d working", b.size, len(b.lines), b.working)
		}
		ofSession := func(m message) bool { return asserted(wire.Frame{Type: m.t}) }
		for id := range maps.Keys(put) {
			for _, pick := range []func(message) bool{ofSession, func(m message) bool { return m.t == wire.FrameFlows }, func(m message) bool { return m.t == wire.FrameCandidates }} {
				others := func(m message) bool { return !pick(m) }
				want, have := slices.DeleteFunc(slices.Clone(put[id]), others), slices.DeleteFunc(slices.Clone(got[id]), others)
				for i, m := range want {
					if len(have) > 0 && have[0] == m {
						have = have[1:]
					} else if m.t != wire.FrameRenewed || i+1 == len(want) || want[i+1].t != wire.FrameRenewed {
						t.Fatalf("%s: of %v came %v", id, put[id], got[id])
					}
				}
				if len(have) > 0 {
					t.Fatalf("%s: of %v came %v", id, put[id], got[id])
				}
			}
		}
	})
}

// slowSessions take renewals when they are let.
type slowSessions struct {
	Sessions
	open chan struct{}
	fail func(r wire.Renewed) error

	mu     sync.Mutex
	tokens map[string]string
	tries  int
}

func (s *slowSessions) Renewed(ctx context.Context, _ session.Gateway, r wire.Renewed) error {
	select {
	case <-s.open:
	case <-ctx.Done():
		return problem.New(problem.Unreachable, "the state is away", "try again")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tries++
	if err := s.fail(r); err != nil {
		return err
	}
	s.tokens[r.Session] = r.Token.Reveal()
	return nil
}

func (s *slowSessions) Flows(context.Context, session.Gateway, wire.Flows) error {
	return problem.New(problem.Unreachable, "the log is away", "try again")
}

// TestReaderNeverWaitsForRenewals: while the state takes none, a gateway's reader goes on, behind which are answers to offers. What was said
// last of each session is done when the state is back, whatever has failed meanwhile, and the stream stays.
func TestReaderNeverWaitsForRenewals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed := map[string]bool{}
		slow := &slowSessions{open: make(chan struct{}), tokens: map[string]string{}, fail: func(r wire.Renewed) error {
			if !failed[r.Session] {
				failed[r.Session] = true
				return problem.New(problem.Unreachable, "the state is away", "try again")
			}
			return nil
		}}
		s := &stream{api: &API{opts: Options{Sessions: slow}}, log: slog.New(slog.DiscardHandler), inbox: newInbox(newLedger()), over: make(chan struct{})}
		const sessions, rounds = 500, 20
		if !s.take(t.Context(), wire.Frame{Type: wire.FrameFlows, Body: []byte(`{"seq":1}`)}) {
			t.Fatal("not taken")
		}
		for n := range rounds {
			for id := range sessions {
				if !s.take(t.Context(), said(wire.FrameRenewed, inboxSession(id), n)) {
					t.Fatal("not taken")
				}
			}
		}
		close(slow.open)
		time.Sleep(time.Minute) // of the bubble's clock, for those who try again
		select {
		case <-s.over:
			t.Errorf("the stream is over: %v", s.why)
		default:
		}
		s.end(goingAway)
		s.workers.Wait()
		for id := range sessions {
			if got := slow.tokens[inboxSession(id)]; got != fmt.Sprint(rounds-1) {
				t.Fatalf("session %d ends with token %q", id, got)
			}
		}
		if slow.tries > 4*sessions {
			t.Errorf("%d tries for %d sessions", slow.tries, sessions)
		}
	})
}
