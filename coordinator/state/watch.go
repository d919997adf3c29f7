package state

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A watch is a consumer on one of the cluster's servers, in its memory: it dies with that server, without a word to whoever is
// connected to another one. Its heartbeats say that it lives. Then a new one goes on where it ended, so that the mirror is behind for
// seconds and not for as long as gateways' presence lasts.
const (
	heartbeat    = time.Second // two missed ones end a watch
	watchIdle    = 30 * time.Second
	watchQueue   = 256
	rewatchDelay = 100 * time.Millisecond
	openWatch    = 3 * time.Second

	// laggard is how long a write that the stream's leader has acknowledged may stay unseen before another consumer is made. A consumer is on any
	// of the servers that have the stream, also on one that was cut off and takes a minute or two to catch up, and its heartbeats do not tell.
	// Where the next one is behind as well, it gets twice as long.
	laggard     = 3 * time.Second
	lastLaggard = 24 * time.Second
	lookForLate = 500 * time.Millisecond

	// resumable is how long after its last word a watch may be gone on with: markers of what is gone last longer, see markerTTL.
	resumable = markerTTL / 2
)

var (
	errGap  = errors.New("the watch has a gap")
	errLate = errors.New("the server that has the watch is behind")
)

// watcher is where a watch has got to.
type watcher struct {
	from     uint64        // sequence to go on from; 0: from the start
	heard    time.Time     // when that was
	settled  bool          // everything that was there at the start has come
	patience time.Duration // with a server that is behind; 0: laggard
}

// follow keeps the mirror true until ctx ends.
func (b *bucket) follow(ctx context.Context, reconnected <-chan struct{}) {
	var w watcher
	for ctx.Err() == nil {
		err := b.watch(ctx, &w, reconnected)
		if err == nil || ctx.Err() != nil {
			continue
		}
		b.mirror.stall(b.now().Add(-laggard))
		b.log.Warn("watching the state's bucket broke", "err", err)
		select {
		case <-ctx.Done():
		case <-reconnected:
		case <-time.After(rewatchDelay):
		}
	}
}

// watch feeds the mirror until ctx ends, the connection comes back after a break, or the watch breaks, which is an error.
func (b *bucket) watch(ctx context.Context, w *watcher, reconnected <-chan struct{}) error {
	if w.from == 0 || time.Since(w.heard) > b.resumable || b.shrunk(ctx, w.from) {
		w.from, w.settled = 0, false
		b.mirror.begin()
	}
	consumer, err := b.consumer(ctx, w.from)
	if err != nil {
		return err
	}
	defer b.forget(ctx, consumer.CachedInfo().Name)
	if consumer.CachedInfo().NumPending == 0 {
		b.current(w)
	}
	messages, broke, over := make(chan jetstream.Msg, watchQueue), make(chan error, 1), make(chan struct{})
	running, err := consumer.Consume(func(m jetstream.Msg) {
		select {
		case messages <- m:
		case <-over:
		}
	}, jetstream.ConsumeErrHandler(func(_ jetstream.ConsumeContext, err error) {
		select {
		case broke <- err:
		default:
		}
	}))
	if err != nil {
		return err
	}
	defer running.Stop()
	defer close(over)
	w.heard = time.Now()
	looks := time.NewTicker(lookForLate)
	defer looks.Stop()
	began, delivered, patience := w.heard, uint64(0), max(w.patience, laggard)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-reconnected:
			return nil
		case err := <-broke:
			return err
		case now := <-looks.C:
			behind := b.mirror.behind(now)
			if behind == 0 {
				w.patience = 0
			} else if w.settled && min(behind, now.Sub(began)) > patience {
				w.patience = min(2*patience, lastLaggard)
				return fmt.Errorf("%w, at %d", errLate, w.from)
			}
		case m := <-messages:
			delivered++
			if err := b.deliver(w, m, delivered); err != nil {
				return err
			}
		}
	}
}

// shrunk reports whether the bucket has lost what was watched already, as one that was restored from a backup has.
func (b *bucket) shrunk(ctx context.Context, from uint64) bool {
	ctx, cancel := context.WithTimeout(ctx, openWatch)
	defer cancel()
	info, err := b.stream.Info(ctx)
	return err == nil && info.State.LastSeq+1 < from
}

// consumer makes one for a watch from a sequence on, or from the start.
func (b *bucket) consumer(ctx context.Context, from uint64) (jetstream.PushConsumer, error) {
	config := jetstream.ConsumerConfig{
		FilterSubject:     subjects + ">",
		DeliverSubject:    nats.NewInbox(),
		DeliverPolicy:     jetstream.DeliverLastPerSubjectPolicy,
		AckPolicy:         jetstream.AckNonePolicy,
		MaxDeliver:        1,
		IdleHeartbeat:     heartbeat,
		FlowControl:       true,
		InactiveThreshold: watchIdle,
		MemoryStorage:     true,
		Replicas:          1,
	}
	if from > 0 {
		config.DeliverPolicy, config.OptStartSeq = jetstream.DeliverByStartSequencePolicy, from
	}
	ctx, cancel := context.WithTimeout(ctx, openWatch)
	defer cancel()
	consumer, err := b.stream.CreatePushConsumer(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("make a consumer: %w", err)
	}
	return consumer, nil
}

// forget removes a consumer, if its server can be asked; else that does so when it has been idle for long enough.
func (b *bucket) forget(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rewatchDelay)
	defer cancel()
	_ = b.stream.DeleteConsumer(ctx, name)
}

// deliver takes the n-th message of a consumer.
func (b *bucket) deliver(w *watcher, m jetstream.Msg, n uint64) error {
	meta, err := m.Metadata()
	if err != nil {
		return err
	}
	if meta.Sequence.Consumer != n {
		return errGap
	}
	removed := m.Headers().Get(operationHeader) != "" || m.Headers().Get(jetstream.MarkerReasonHeader) != ""
	b.take(strings.TrimPrefix(m.Subject(), subjects), m.Data(), meta.Sequence.Stream, removed)
	w.from, w.heard = meta.Sequence.Stream+1, time.Now()
	if meta.NumPending == 0 {
		b.current(w)
	}
	return nil
}

// current notes that a watch has brought all that there is, which at first ends its first part.
func (b *bucket) current(w *watcher) {
	if w.settled {
		b.mirror.goesOn()
		return
	}
	w.settled = true
	for _, r := range b.mirror.settle() {
		b.vanished(r)
	}
}

// take brings one change into the mirror.
func (b *bucket) take(key string, data []byte, revision uint64, removed bool) {
	for k, prefix := range prefixes {
		id, ok := strings.CutPrefix(key, prefix)
		if !ok {
			continue
		}
		k := kind(k)
		if removed {
			b.vanished(b.mirror.watched(k, id, nil, revision))
			return
		}
		if b.mirror.knows(k, id, revision) {
			return
		}
		r, err := revised(b.ours(key, data), revision), error(nil)
		if r == nil {
			r, err = packed(k, data, revision)
		}
		if err != nil {
			b.log.Warn("a value in the state's bucket does not decode", "err", err)
			return
		}
		b.mirror.watched(k, id, r, revision)
		return
	}
}
