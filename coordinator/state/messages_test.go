package state

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"
)

// bothWays tests messages within the process, as they go where the state is embedded, and by way of NATS.
func bothWays(t *testing.T, test func(*testing.T, *Store)) {
	t.Run("embedded", func(t *testing.T) { test(t, open(t, Options{})) })
	t.Run("nats", func(t *testing.T) { test(t, open(t, Options{NATS: []string{natsServer(t).ClientURL()}})) })
}

func TestAsk(t *testing.T) { bothWays(t, tryAsk) }

func tryAsk(t *testing.T, s *Store) {
	if _, err := s.Ask(t.Context(), "gw.1", []byte("x")); !errors.Is(err, ErrAway) {
		t.Errorf("nobody serves: %v", err)
	}
	stop := must(s.Serve("gw.1", func(_ context.Context, msg []byte) []byte { return append([]byte("re: "), msg...) }))
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			answer, err := s.Ask(t.Context(), "gw.1", fmt.Append(nil, i))
			if err != nil || string(answer) != fmt.Sprint("re: ", i) {
				t.Errorf("%d: %q, %v", i, answer, err)
			}
		})
	}
	wg.Wait()
	if _, err := s.Ask(t.Context(), "gw.2", []byte("x")); !errors.Is(err, ErrAway) {
		t.Errorf("another gateway: %v", err)
	}
	stop()
	stop()
	if _, err := s.Ask(t.Context(), "gw.1", []byte("x")); !errors.Is(err, ErrAway) {
		t.Errorf("after stop: %v", err)
	}
}

func TestAnswerThatTheGatewayIsLost(t *testing.T) { bothWays(t, tryAnswerThatTheGatewayIsLost) }

func tryAnswerThatTheGatewayIsLost(t *testing.T, s *Store) {
	defer must(s.Serve("lost", func(context.Context, []byte) []byte { return nil }))()
	defer must(s.Serve("empty", func(context.Context, []byte) []byte { return []byte{} }))()
	if _, err := s.Ask(t.Context(), "lost", nil); !errors.Is(err, ErrAway) {
		t.Errorf("a nil answer: %v", err)
	}
	if answer, err := s.Ask(t.Context(), "empty", nil); err != nil || len(answer) != 0 {
		t.Errorf("an empty answer: %q, %v", answer, err)
	}
}

func TestAskersPatienceBoundsTheHandler(t *testing.T) { bothWays(t, tryAskersPatienceBoundsTheHandler) }

func tryAskersPatienceBoundsTheHandler(t *testing.T, s *Store) {
	ended := make(chan error, 1)
	stop := must(s.Serve("slow", func(ctx context.Context, _ []byte) []byte {
		<-ctx.Done()
		ended <- ctx.Err()
		return nil
	}))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Ask(ctx, "slow", nil); err == nil {
		t.Error("answered")
	}
	if err := <-ended; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the handler's context ended with %v", err)
	}
	stop()
}

func TestStopWaitsForCalls(t *testing.T) { bothWays(t, tryStopWaitsForCalls) }

func tryStopWaitsForCalls(t *testing.T, s *Store) {
	entered, finish := make(chan struct{}), make(chan struct{})
	stop := must(s.Serve("gw", func(_ context.Context, msg []byte) []byte {
		if string(msg) == "wait" {
			close(entered)
			<-finish
		}
		return []byte("done")
	}))
	answer := make(chan string, 1)
	go func() { answer <- string(must(s.Ask(context.Background(), "gw", []byte("wait")))) }()
	<-entered
	stopped := make(chan struct{})
	go func() {
		stop()
		close(stopped)
	}()
	eventually(t, "no new calls", func() bool {
		_, err := s.Ask(t.Context(), "gw", nil)
		return errors.Is(err, ErrAway)
	})
	select {
	case <-stopped:
		t.Error("stop did not wait")
	default:
	}
	close(finish)
	<-stopped
	if got := <-answer; got != "done" {
		t.Errorf("answer %q", got)
	}
}

func TestCloseEndsCalls(t *testing.T) { bothWays(t, tryCloseEndsCalls) }

func tryCloseEndsCalls(t *testing.T, s *Store) {
	entered := make(chan struct{})
	must(s.Serve("gw", func(ctx context.Context, _ []byte) []byte {
		close(entered)
		<-ctx.Done()
		return nil
	}))
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		_, _ = s.Ask(context.Background(), "gw", nil) // whatever it gives, it returns
	}()
	<-entered
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	<-asked
}
