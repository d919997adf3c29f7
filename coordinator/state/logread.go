package state

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// readAhead bounds what a reader of the log holds in memory, in bytes.
const readAhead = 2 << 20

// Message is one message of a [Log].
type Message struct {
	Sequence uint64
	Time     time.Time // when the server stored it
	Data     []byte
}

// Read calls yield for every message from sequence from on, or from the first that is left, until yield says false. With
// follow it waits for more until ctx ends, which is no error then; else it ends with the last message there is.
func (l *Log) Read(ctx context.Context, from uint64, follow bool, yield func(Message) bool) error {
	config := jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: max(from, 1)}
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
		if !yield(Message{meta.Sequence.Stream, meta.Timestamp, msg.Data()}) || (!follow && meta.NumPending == 0) {
			return nil
		}
	}
}
