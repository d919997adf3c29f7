package audit

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/culvertnet/culvert/coordinator/state"
)

// Bounds of the writer.
const (
	maxRecords = 512                   // in a block
	maxBlock   = 700 << 10             // bytes of a block, where the store takes that
	firstWait  = 20 * time.Millisecond // before a block is tried again
	lastWait   = time.Second
	maxForeign = 1000 // blocks at the log's end that are not ours before it is given up
)

// write stores blocks until the queue is closed and empty, or the log's life is over.
func (l *Log) write() {
	defer l.end() // of periodic
	for {
		var first *entry
		var ok bool
		select {
		case first, ok = <-l.queue:
		case <-l.life.Done():
			l.abandon()
			return
		}
		if !ok {
			return
		}
		if err := l.commit(l.gather(first)); err != nil {
			l.abandon()
			return
		}
	}
}

// abandon tells everybody who still waits that the log is closed.
func (l *Log) abandon() {
	for {
		select {
		case e, ok := <-l.queue:
			if !ok {
				return
			}
			l.drop(e, context.Canceled)
		default:
			return
		}
	}
}

// drop gives up an entry: who waits for it is told, and what nobody waits for is counted.
func (l *Log) drop(e *entry, err error) {
	if e.done == nil {
		l.miss()
	}
	e.finish(err)
}

func (e *entry) finish(err error) {
	if e.done != nil {
		e.done <- err
	}
}

// gather takes what is queued by now, up to a block's bounds.
func (l *Log) gather(first *entry) []*entry {
	batch := make([]*entry, 0, 16)
	size, limit := 0, min(maxBlock, l.opts.Store.MaxMessage()-MaxLine/4)
	add := func(e *entry) {
		if e.take() {
			batch = append(batch, e)
			size += len(e.body) + 256
		}
	}
	if n := l.takeLost(); n > 0 {
		body, _ := encode(Record{Event: Lost, Severity: High, Count: n, Message: "records of what nobody waited for found no room"}, l.opts.Now()) // of our own making: it encodes
		add(&entry{event: Lost, body: body})
	}
	add(first)
	for len(batch) < maxRecords && size < limit/2 {
		select {
		case e, ok := <-l.queue:
			if !ok {
				return batch
			}
			add(e)
		default:
			return batch
		}
	}
	return batch
}

// commit stores a batch as one block, again and again until it is stored or the log's life is over. Whoever waits for one of
// its records gives up by himself.
func (l *Log) commit(batch []*entry) error {
	if len(batch) == 0 {
		return nil
	}
	began, wait := time.Now(), firstWait
	block, next := l.build(batch)
	for {
		err := l.store(block, next)
		switch {
		case err == nil:
			l.stuck.Store(nil)
			l.opts.Metrics.committed(batch, len(block), time.Since(began))
			for _, e := range batch {
				e.finish(nil)
			}
			l.copy.write(block)
			return nil
		case errors.Is(err, state.ErrConflict):
			block, next = l.build(batch) // another node was first, and its blocks are taken in
			continue
		case l.life.Err() != nil:
			for _, e := range batch {
				l.drop(e, err)
			}
			return err
		}
		l.stuck.Store(&err)
		l.opts.Metrics.failed.Inc()
		l.opts.Logger.Error("audit records cannot be stored and are tried again", "records", len(batch), "err", err, "again_in", wait)
		select {
		case <-time.After(wait):
		case <-l.life.Done():
		}
		wait = min(wait*2, lastWait)
	}
}

// build links a batch to the chain's head.
func (l *Log) build(batch []*entry) ([]byte, head) {
	var block []byte
	next := l.at
	for _, e := range batch {
		block, next = link(block, next, e.event, l.node, e.body)
	}
	return seal(block, l.at.seq+1, next, l.opts.Node, l.opts.Now(), l.opts.Key), next
}

// store appends a block at the place that it was built for. ErrConflict: other blocks stand there, and the head is behind
// them now.
func (l *Log) store(block []byte, next head) error {
	seq, err := l.opts.Store.Append(l.life, block, l.after)
	if err == nil {
		l.move(next, seq)
		return nil
	}
	if !errors.Is(err, state.ErrConflict) {
		// It may have been stored all the same. If so, it stands right behind the block that it was to follow, and if another
		// one stands there it never will be.
		if l.life.Err() != nil {
			return err
		}
		there, gerr := l.opts.Store.Get(l.life, l.after+1)
		if gerr != nil {
			return err // not there yet, or the store is away: the same block is tried again at the same place
		}
		if string(there) == string(block) {
			l.move(next, l.after+1)
			return nil
		}
	}
	l.opts.Metrics.conflicts.Inc()
	return l.catchUp(block, next)
}

// move puts the head behind a block.
func (l *Log) move(at head, seq uint64) {
	l.headMu.Lock()
	defer l.headMu.Unlock()
	l.at, l.after = at, seq
}

// catchUp takes in the blocks that others have appended. ErrConflict, unless one of them is ours: an earlier try of this block
// whose acknowledgement was lost.
func (l *Log) catchUp(block []byte, next head) error {
	info, err := l.opts.Store.Info(l.life)
	if err != nil {
		return err
	}
	if info.Last <= l.after {
		return fmt.Errorf("the store refuses message %d and has none there", l.after+1)
	}
	for seq := l.after + 1; seq <= info.Last; seq++ {
		there, err := l.opts.Store.Get(l.life, seq)
		switch {
		case errors.Is(err, state.ErrNotFound): // dropped by age or size meanwhile, or taken out
			l.after = seq
		case err != nil:
			return err
		case string(there) == string(block):
			l.move(next, seq)
			return nil
		default:
			l.takeIn(seq, there)
		}
	}
	return state.ErrConflict
}

// takeIn moves the head behind a block that another node wrote. One that is not of this chain is left aside, and a record
// says so.
func (l *Log) takeIn(seq uint64, block []byte) {
	at, err := checkBlock(block, &l.at, l.keys)
	if err == nil {
		l.move(at, seq)
		return
	}
	l.after = seq
	l.opts.Logger.Error("something stands in the audit log that no coordinator wrote", "message", seq)
	l.Note(l.foreign(seq, block))
}

func (l *Log) foreign(seq uint64, block []byte) Record {
	return Record{Event: Broken, Severity: High, Status: statusFailure, Message: fmt.Sprintf("message %d of the log is not a coordinator's and is passed over", seq),
		Unmapped: Unmapped{Instead: hashOf(block)}}
}

// findHead goes back from the log's end to the last block that a coordinator wrote. What stands behind that is passed over; records
// for it are given.
func (l *Log) findHead(ctx context.Context) (broken []Record, err error) {
	mark, _, err := l.opts.Store.Mark(ctx) // before anything else: other nodes write meanwhile
	if err != nil {
		return nil, err
	}
	info, err := l.opts.Store.Info(ctx)
	if err != nil {
		return nil, err
	}
	l.after = info.Last
	for seq := info.Last; seq >= info.First && seq > 0; seq-- {
		block, err := l.opts.Store.Get(ctx, seq)
		if errors.Is(err, state.ErrNotFound) {
			broken = append(broken, Record{Event: Broken, Severity: High, Status: statusFailure,
				Message: fmt.Sprintf("message %d of the log is gone", seq)})
		} else if err != nil {
			return nil, err
		} else if l.at, err = checkBlock(block, nil, l.keys); err == nil {
			break
		} else {
			broken = append(broken, l.foreign(seq, block))
		}
		if len(broken) > maxForeign {
			return nil, errors.New("the end of the audit log was not written by a coordinator with its key")
		}
	}
	for _, r := range broken {
		l.opts.Logger.Error("the end of the audit log is not what a coordinator wrote", "found", r.Message)
	}
	return append(broken, l.resume(mark, info.Messages == 0)...), nil
}
