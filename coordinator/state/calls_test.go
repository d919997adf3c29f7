package state

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// TestTries: what passes is tried again while there is patience, each time with a time of its own; what does not pass is an answer.
func TestTries(t *testing.T) {
	final := errors.New("no")
	for _, c := range []struct {
		name  string
		fails []error // of the first calls; then all is well
		want  error
		calls int
	}{
		{"at once", nil, nil, 1},
		{"a leader is elected", []error{jetstream.ErrNoStreamResponse, nats.ErrNoResponders, &jetstream.APIError{Code: 503}}, nil, 4},
		{"a connection breaks", []error{nats.ErrDisconnected, nats.ErrConnectionReconnecting}, nil, 3},
		{"a refusal", []error{final}, final, 1},
		{"a refusal by the server", []error{&jetstream.APIError{Code: 400, ErrorCode: 10071}}, &jetstream.APIError{Code: 400, ErrorCode: 10071}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				calls := 0
				err := tries(t.Context(), callPatience, func(ctx context.Context) error {
					if at, ok := ctx.Deadline(); !ok || time.Until(at) > lastTry {
						t.Errorf("call %d may last until %v", calls, at)
					}
					calls++
					if calls <= len(c.fails) {
						return fmt.Errorf("wrapped: %w", c.fails[calls-1])
					}
					return nil
				})
				if calls != c.calls || (err == nil) != (c.want == nil) {
					t.Errorf("%d calls, %v", calls, err)
				}
			})
		})
	}
}

// TestTriesEnd: a server that never answers is given up after the caller's time, or after patience.
func TestTriesEnd(t *testing.T) {
	silent := func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	}
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		if err := tries(t.Context(), callPatience, silent); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > callPatience+lastTry {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		began = time.Now()
		if err := tries(ctx, callPatience, silent); err == nil || time.Since(began) != 3*time.Second {
			t.Errorf("%v after %s", err, time.Since(began))
		}
	})
}

// TestEscape: a server without a leader is left once it has been so for longer than an election takes, and the next one has as long.
func TestEscape(t *testing.T) {
	left, now := 0, time.Now()
	e := escape{leave: func() error { left++; return nil }}
	fail := func(after time.Duration) {
		now = now.Add(after)
		e.failed(now)
	}
	fail(0)
	fail(escapeAfter - 1)
	e.worked()
	fail(time.Second)
	fail(escapeAfter - 1)
	if left != 0 {
		t.Fatal("left during an election")
	}
	fail(1)
	fail(escapeAfter - 1)
	if left != 1 {
		t.Fatalf("left %d times", left)
	}
	fail(1)
	if left != 2 {
		t.Errorf("left %d times, when the next server has no leader either", left)
	}
}

// TestNoConnection: a call gives up once there has been no connection to any server for a while, and not because one server that is connected has no
// leader.
func TestNoConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		connected := false
		e := escape{leave: func() error { return nil }, connected: func() bool { return connected }}
		unsent := func(context.Context) error { return nats.ErrReconnectBufExceeded }
		began := time.Now()
		if err := e.tries(t.Context(), unsent); !errors.Is(err, ErrNoConnection) || time.Since(began) < brokenLong || time.Since(began) > brokenLong+2*lastAgain {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		began = time.Now()
		if err := e.tries(t.Context(), unsent); !errors.Is(err, ErrNoConnection) || time.Since(began) > 0 {
			t.Errorf("the next one: %v after %s", err, time.Since(began))
		}
		connected = true
		if err := e.tries(t.Context(), func(context.Context) error { return nats.ErrNoResponders }); errors.Is(err, ErrNoConnection) || time.Since(began) < callPatience {
			t.Errorf("without a leader: %v after %s", err, time.Since(began))
		}
	})
}

// TestSettled: what stands under a subject tells what became of a message whose acknowledgement was lost.
func TestSettled(t *testing.T) {
	b := open(t, Options{}).bucket
	ctx := t.Context()
	put := func(key, data string, expect uint64) (*nats.Msg, uint64) {
		msg := &nats.Msg{Subject: subjects + "session." + key, Data: []byte(data)}
		return msg, must(b.store(ctx, msg, expect, jetstream.WithExpectLastSequencePerSubject(expect)))
	}
	ours, first := put("a", `"ours"`, 0)
	if got, err := b.settled(ctx, ours, 0, true); err != nil || got != first {
		t.Errorf("our own: %d, %v; want %d", got, err, first)
	}
	if _, err := b.settled(ctx, ours, 0, false); !errors.Is(err, ErrConflict) {
		t.Errorf("another's that says the same, when ours was never sent: %v", err)
	}
	theirs, _ := put("a", `"theirs"`, first)
	if _, err := b.settled(ctx, ours, 0, true); !errors.Is(err, ErrConflict) {
		t.Errorf("another's: %v", err)
	}
	if _, err := b.settled(ctx, theirs, 99, true); err != nil {
		t.Errorf("the last: %v", err)
	}
	none := &nats.Msg{Subject: subjects + "session.b", Data: []byte(`"x"`)}
	if _, err := b.settled(ctx, none, 0, true); !errors.Is(err, errComing) {
		t.Errorf("nothing where nothing was expected: %v", err)
	}
	if _, err := b.settled(ctx, none, 7, true); !errors.Is(err, ErrConflict) {
		t.Errorf("nothing where something was expected: %v", err)
	}
	removal := &nats.Msg{Subject: subjects + "session.b", Header: nats.Header{operationHeader: {operationPurge}}}
	if got, err := b.settled(ctx, removal, 7, true); err != nil || got != 7 {
		t.Errorf("removed, and its marker gone: %d, %v", got, err)
	}
}

// TestWatchGoesOn: a watch whose consumer dies with its server, without a word, goes on where it was.
func TestWatchGoesOn(t *testing.T) {
	url := natsServer(t).ClientURL()
	a, b := open(t, Options{NATS: []string{url}}), open(t, Options{NATS: []string{url}})
	must(a.CreateLease(t.Context(), testLease("s1", time.Now()), testPool))
	eventually(t, "b has the first", func() bool { return len(leases(b)) == 1 })
	for name := range b.bucket.stream.ConsumerNames(t.Context()).Name() {
		if err := b.bucket.stream.DeleteConsumer(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	must(a.CreateLease(t.Context(), testLease("s2", time.Now()), testPool))
	if err := a.EndLease(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "b has what it missed", func() bool { l := leases(b); return len(l) == 1 && l[0] == "s2" })
}

func TestNamedSecrets(t *testing.T) {
	s := open(t, Options{})
	ctx, name := t.Context(), "acme/culvert.example.com+token"
	if _, err := s.Secret(ctx, name); !errors.Is(err, ErrNotFound) {
		t.Errorf("before: %v", err)
	}
	for _, data := range []string{"one", "two"} {
		if err := s.PutSecret(ctx, name, []byte(data)); err != nil {
			t.Fatal(err)
		}
		if got := must(s.Secret(ctx, name)); string(got) != data {
			t.Errorf("got %q", got)
		}
	}
	for range 2 {
		if err := s.DropSecret(ctx, name); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Secret(ctx, name); !errors.Is(err, ErrNotFound) {
			t.Errorf("after: %v", err)
		}
	}
}
