package state

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

const (
	// readAhead bounds what a reader of the log holds in memory, in bytes.
	readAhead = 2 << 20

	// missingLong is how long a message that ought to be there is asked for again: a server that leads no longer, and does not know yet, may not have it.
	missingLong = 3 * time.Second
)

// Message is one message of a [Log].
type Message struct {
	Sequence uint64
	Time     time.Time // when the server stored it
	Data     []byte
}

// Read calls yield for every message from sequence from on, or from the first that is left, until yield says false. With
// follow it waits for more until ctx ends, which is no error then; else it ends with the last message that there was when it began.
func (l *Log) Read(ctx context.Context, from uint64, follow bool, yield func(Message) bool) error {
	from = max(from, 1)
	if follow || !l.clustered() {
		return l.consume(ctx, from, follow, yield)
	}
	info, err := l.Info(ctx)
	if err != nil {
		return err
	}
	next, enough := from, false
	err = l.consume(ctx, from, false, func(m Message) bool {
		next = m.Sequence + 1
		enough = !yield(m)
		return !enough && m.Sequence < info.Last
	})
	if err != nil || enough {
		return err
	}
	return l.rest(ctx, max(next, info.First), info.Last, missingLong, yield)
}

// consume reads by a consumer, which is on any of a cluster's servers that have the log, also on one that was cut off and is behind.
func (l *Log) consume(ctx context.Context, from uint64, follow bool, yield func(Message) bool) error {
	config := jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: from}
	var consumer jetstream.Consumer
	err := Patiently(ctx, l.log, func() (err error) {
		consumer, err = l.stream.OrderedConsumer(ctx, config)
		return err
	})
	if err != nil {
		return fmt.Errorf("read the audit log: %w", err)
	}
	if info := consumer.CachedInfo(); !follow && info != nil && info.NumPending == 0 {
		return nil
	}
	messages, err := consumer.Messages(jetstream.PullMaxBytes(readAhead))
	if err != nil {
		return fmt.Errorf("read the audit log: %w", err)
	}
	defer messages.Stop()
	for {
		msg, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			if follow && ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("read the audit log: %w", errors.Join(err, ctx.Err()))
		}
		meta, err := msg.Metadata()
		if err != nil {
			return fmt.Errorf("read the audit log: %w", err)
		}
		if meta.Sequence.Stream < from { // of a server that has nothing from there on yet
			if !follow && meta.NumPending == 0 {
				return nil
			}
			continue
		}
		if !yield(Message{meta.Sequence.Stream, meta.Timestamp, msg.Data()}) || (!follow && meta.NumPending == 0) {
			return nil
		}
	}
}

// rest asks the leader for what a consumer's server has not got, message by message. What is not there is left out, once it
// has been waited for, all such messages together, for as long as there is patience.
func (l *Log) rest(ctx context.Context, from, last uint64, patience time.Duration, yield func(Message) bool) error {
	for seq := from; seq <= last; seq++ {
		m, err := l.message(ctx, seq)
		for errors.Is(err, ErrNotFound) && patience > 0 {
			patience -= lastAgain
			select {
			case <-time.After(lastAgain):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			m, err = l.message(ctx, seq)
		}
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil || !yield(m) {
			return err
		}
	}
	return nil
}
