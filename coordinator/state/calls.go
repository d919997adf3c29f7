package state

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// How long calls to JetStream are waited for. A stream whose leader has died elects another one after 4 to 9 s, and what was
// asked meanwhile is never answered: a call is therefore given up soon, and made again.
const (
	firstTry = time.Second // one call; twice that for each that follows, so that a slow server is not asked faster and faster
	lastTry  = 4 * time.Second

	// escapeAfter is how long a server may be without a leader of our streams before another one is asked: longer than an election
	// takes, because then it is the server that is cut off from the others.
	escapeAfter = 10 * time.Second
	escapeAgain = 2 * time.Second // where it is seen before that that it is cut off, but not more often

	brokenLong = time.Second // without a connection to any server: whoever asks is to ask another node

	callPatience  = 12 * time.Second // all tries of a call, where its caller has less time to spare: a server's death, noticed late, and an election
	startPatience = time.Minute      // at the start: for a cluster that was started together with us, or has just lost a server

	firstAgain = 10 * time.Millisecond // between tries
	lastAgain  = 250 * time.Millisecond
)

// tries makes a call again and again while JetStream has no leader, or the connection is broken: f, each time with a time of its
// own. What f does must bear being done twice. It ends with f's last error when ctx does, or after patience.
func tries(ctx context.Context, patience time.Duration, f func(ctx context.Context) error) error {
	deadline := time.Now().Add(patience)
	for try, again := firstTry, firstAgain; ; try, again = min(2*try, lastTry), min(2*again, lastAgain) {
		err := once(ctx, try, f)
		if err == nil || !leaderless(err) || ctx.Err() != nil || time.Now().After(deadline) {
			return err
		}
		select {
		case <-time.After(again/2 + rand.N(again)): // apart from others that wait for the same
		case <-ctx.Done():
			return err
		}
	}
}

func once(ctx context.Context, limit time.Duration, f func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return f(ctx)
}

// escape leaves a server that has no leader of our streams for long, though the connection to it is in order: it is cut off from the
// other servers, and they may have one.
type escape struct {
	leave     func() error
	connected func() bool
	election  *election // nil where there is no cluster

	mu    sync.Mutex
	since time.Time // the first failure after the last call that worked; zero: none
	left  time.Time // when a server was left that was cut off
}

// tries is the function of that name, for calls that a leader answers.
func (e *escape) tries(ctx context.Context, f func(ctx context.Context) error) error {
	return tries(ctx, callPatience, func(ctx context.Context) error { return e.orBroken(e.call(ctx, f)) })
}

// orBroken gives err, or [ErrNoConnection] where it comes from that.
func (e *escape) orBroken(err error) error {
	if err != nil && leaderless(err) && e.broken(time.Now()) {
		return fmt.Errorf("%w: %v", ErrNoConnection, err)
	}
	return err
}

// broken reports whether there is no connection to any server, and has not been for a while.
func (e *escape) broken(now time.Time) bool {
	if e.connected == nil || e.connected() {
		return false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return !e.since.IsZero() && now.Sub(e.since) >= brokenLong
}

// call makes one call that a leader answers.
func (e *escape) call(ctx context.Context, f func(ctx context.Context) error) error {
	return e.note(e.election.during(ctx, f))
}

// cutOff leaves a server that most of the others are lost to.
func (e *escape) cutOff() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if now := time.Now(); e.leave != nil && now.Sub(e.left) >= escapeAgain {
		e.left = now
		_ = e.leave() // as in failed
	}
}

// note takes how a call to a leader ended, and gives it back.
func (e *escape) note(err error) error {
	switch {
	case errors.Is(err, errNewLeader), errors.Is(err, context.Canceled): // by whoever asked: it tells nothing
	case leaderless(err) && !errors.Is(err, errComing):
		e.failed(time.Now())
	default:
		e.worked()
	}
	return err
}

func (e *escape) worked() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.since = time.Time{}
}

func (e *escape) failed(now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.since.IsZero() {
		e.since = now
	}
	if now.Sub(e.since) < escapeAfter || e.leave == nil {
		return
	}
	e.since = now // the next server has as long
	_ = e.leave() // an error says that the connection is broken or closed anyway
}

// Patiently does f again, for a minute, while JetStream has no leader.
func Patiently(ctx context.Context, log *slog.Logger, f func() error) error {
	warned := false
	for deadline := time.Now().Add(startPatience); ; {
		err := f()
		if err == nil || !leaderless(err) || ctx.Err() != nil || time.Now().After(deadline) {
			return err
		}
		if !warned {
			log.Warn("nats is not ready yet", "err", err)
			warned = true
		}
		select {
		case <-time.After(lastAgain):
		case <-ctx.Done():
			return err
		}
	}
}

// leaderless reports whether an error is what JetStream says, or keeps silent with, while it elects a leader.
func leaderless(err error) bool {
	if apiErr, ok := errors.AsType[*jetstream.APIError](err); ok {
		return apiErr.Code == http.StatusServiceUnavailable
	}
	for _, passing := range []error{errComing, errNewLeader, errCutOff, context.DeadlineExceeded, nats.ErrTimeout, nats.ErrNoResponders, nats.ErrDisconnected, nats.ErrConnectionReconnecting,
		nats.ErrStaleConnection, nats.ErrReconnectBufExceeded, jetstream.ErrNoStreamResponse} {
		if errors.Is(err, passing) {
			return true
		}
	}
	return false
}

// atOnce leaves it to tries when to try again.
var atOnce = jetstream.WithRetryAttempts(0)

// store publishes a message, and gives its sequence. A try that nobody has answered may have been stored all the same; what stands
// under the subject then tells. [ErrConflict] where something else than expect does.
func (b *bucket) store(ctx context.Context, msg *nats.Msg, expect uint64, opts ...jetstream.PublishOpt) (sequence uint64, err error) {
	unsure := false
	err = b.escape.tries(ctx, func(ctx context.Context) error {
		ack, err := b.js.PublishMsg(ctx, msg, append(opts, atOnce)...)
		switch {
		case err == nil:
			sequence = ack.Sequence
		case wrongRevision(err):
			sequence, err = b.settled(ctx, msg, expect, unsure)
		default:
			unsure = true
		}
		return err
	})
	if err != nil && !errors.Is(err, ErrConflict) {
		err = fmt.Errorf("write to the state's bucket: %w", err)
	}
	return sequence, err
}

// errComing says that a message was refused because of another one that is being stored just now: a cluster's leader knows of that
// before it can be read, and it may come to nothing.
var errComing = errors.New("another change is on its way")

// settled says what became of a message that was refused: [ErrConflict] where something else stands in its place, its sequence where
// that is itself, stored by an earlier try that nobody answered.
func (b *bucket) settled(ctx context.Context, msg *nats.Msg, expect uint64, unsure bool) (uint64, error) {
	there, err := b.stream.GetLastMsgForSubject(ctx, msg.Subject)
	removal := msg.Header.Get(operationHeader) != ""
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound) && expect == 0:
		return 0, errComing
	case errors.Is(err, jetstream.ErrMsgNotFound) && unsure && removal:
		return expect, nil // and its marker is gone as well
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return 0, ErrConflict
	case err != nil:
		return 0, err
	case there.Sequence == expect:
		return 0, errComing
	case unsure && removal && gone(there), unsure && !removal && !gone(there) && string(there.Data) == string(msg.Data):
		return there.Sequence, nil
	}
	return 0, ErrConflict
}

// last gives the last message under a subject, nil where there is none.
func (b *bucket) last(ctx context.Context, subject string) (msg *jetstream.RawStreamMsg, err error) {
	err = b.escape.tries(ctx, func(ctx context.Context) (err error) {
		msg, err = b.stream.GetLastMsgForSubject(ctx, subject)
		return err
	})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read from the state's bucket: %w", err)
	}
	return msg, nil
}

// gone reports whether a message says that what was under its subject is gone.
func gone(msg *jetstream.RawStreamMsg) bool {
	return msg.Header.Get(operationHeader) != "" || msg.Header.Get(jetstream.MarkerReasonHeader) != ""
}
