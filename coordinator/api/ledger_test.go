package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// TestStreamsOfOneEnrolment: whoever has one credential gets no more streams by calling himself many instances, and nobody else fewer.
func TestStreamsOfOneEnrolment(t *testing.T) {
	var l ledgers
	one, other := config.Enrolment{SecretSHA256: [32]byte{1}}, config.Enrolment{SecretSHA256: [32]byte{2}}
	var leaves []func()
	enter := func(network string, e config.Enrolment) (*ledger, error) {
		own, leave, err := l.enter(network, e)
		if err == nil {
			leaves = append(leaves, leave)
		}
		return own, err
	}
	first, _ := enter("corp", one)
	for range maxStreams - 1 {
		if own, err := enter("corp", one); err != nil || own != first {
			t.Fatalf("one of as many as may be: %v", err)
		}
	}
	if _, err := enter("corp", one); problem.CodeOf(err) != problem.RateLimited {
		t.Errorf("one more: %v", err)
	}
	for _, c := range []struct {
		network string
		e       config.Enrolment
	}{{"corp", other}, {"lab", one}} {
		if own, err := enter(c.network, c.e); err != nil || own == first {
			t.Errorf("another enrolment shares what there is: %v", err)
		}
	}
	leaves[0]()
	if _, err := enter("corp", one); err != nil {
		t.Errorf("after one has left: %v", err)
	}
	for _, leave := range leaves[1:] {
		leave()
	}
	if len(l.of) != 0 {
		t.Errorf("%d are remembered without streams", len(l.of))
	}
}

// TestInboxesOfOneEnrolment: what waits in the inboxes of one credential's streams is bounded together, and a reader that waits for that goes on once
// another stream is over.
func TestInboxesOfOneEnrolment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		own := newLedger()
		large := wire.Frame{Type: wire.FrameCandidates, Body: json.RawMessage(strings.Repeat(" ", 1<<20))}
		var full []*inbox
		for own.backlog.Load() < maxBacklog {
			b := newInbox(own)
			for taken := true; taken; {
				taken, _, _ = b.put(large)
			}
			full = append(full, b)
		}
		if n := own.backlog.Load(); n > maxBacklog+2<<20 || len(full) != maxBacklog/maxWaiting {
			t.Fatalf("%d bytes wait in %d inboxes", n, len(full))
		}
		s := &stream{api: &API{}, inbox: newInbox(own), over: make(chan struct{}), kick: make(chan struct{}, 1)}
		took := make(chan bool)
		go func() {
			took <- s.take(t.Context(), wire.Frame{Type: wire.FrameCandidates, Body: []byte(`{}`)})
		}()
		time.Sleep(time.Minute) // of the bubble's clock
		select {
		case <-took:
			t.Fatal("more was taken than may wait")
		default:
		}
		full[0].close()
		if !<-took {
			t.Error("not taken once there was room")
		}
		s.workers.Wait()
		for _, b := range full[1:] {
			b.close()
		}
		if n := own.backlog.Load(); n != 0 {
			t.Errorf("%d bytes are still counted", n)
		}
	})
}

// TestHellosOfOneEnrolment: large hellos wait for room that gateways of one credential share, small ones never; the room comes back.
func TestHellosOfOneEnrolment(t *testing.T) {
	hello := func(own *ledger, timeout time.Duration, size int) (h wire.Hello, kept int64, err error) {
		a, through := &API{opts: Options{HelloTimeout: timeout}}, make(chan struct{})
		web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			defer close(through)
			conn, aerr := websocket.Accept(w, r, nil)
			if aerr != nil {
				t.Error(aerr)
				return
			}
			s := newStream(a, conn, "corp", enrolment{}, own, "")
			h, err = s.hello(r.Context())
			kept = s.hellos
			s.forgetHello()
			_ = conn.CloseNow()
		}))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		conn, _, derr := websocket.Dial(ctx, web.URL, nil)
		if derr != nil {
			t.Fatal(derr)
		}
		body, _ := json.Marshal(wire.Hello{Version: wire.Version, Instance: "0123456789abcdef", Name: "east", Key: wire.Key{1}})
		f, _ := json.Marshal(wire.Frame{Type: wire.FrameHello, Body: body})
		_ = conn.Write(ctx, websocket.MessageText, append(f, strings.Repeat(" ", size)...)) // it may be gone before all is read
		<-through
		_ = conn.CloseNow()
		web.Close()
		return h, kept, err
	}
	own := newLedger()
	if h, kept, err := hello(own, time.Minute, 1<<20); err != nil || h.Name != "east" || kept < 1<<20 || kept > 2<<20 {
		t.Errorf("a large one: %v, %d bytes", err, kept)
	}
	if !own.hellos.TryAcquire(maxHellos) {
		t.Fatal("the room has not come back")
	}
	if h, kept, err := hello(own, time.Minute, 0); err != nil || h.Name != "east" || kept != 0 {
		t.Errorf("a small one without room: %v, %d bytes", err, kept)
	}
	if _, _, err := hello(own, 50*time.Millisecond, 1<<20); err == nil {
		t.Error("a large one without room was read")
	}
	own.hellos.Release(maxHellos)
	if !own.hellos.TryAcquire(maxHellos) {
		t.Error("the one that waited in vain has room")
	}
}

// TestLastWord: the record of a gateway that closed in good order has its reason, and not the library's words about it.
func TestLastWord(t *testing.T) {
	closed := fmt.Errorf("read from the gateway: %w", websocket.CloseError{Code: websocket.StatusNormalClosure, Reason: "the gateway stops"})
	for want, why := range map[string]error{"the gateway stops": closed, "read from the gateway: EOF": errors.New("read from the gateway: EOF")} {
		if got := lastWord(why); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
