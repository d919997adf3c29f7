package audit

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/culvertnet/culvert/coordinator/state"
)

// Bounds of the writer.
const (
	maxRecords = 512                   // in a block
	maxBlock   = 700 << 10             // bytes of a block, where the store takes that
	firstWait  = 20 * time.Millisecond // before a block is tried again
	lastWait   = 250 * time.Millisecond
	comingWait = 2 * time.Millisecond   // for a block that another node is storing just now
	comingLong = 2 * time.Second        // and when that is no longer an ordinary wait
	maxAhead   = 64                     // blocks that are read at a time
	maxYield   = 500 * time.Millisecond // to other nodes, after a block
	goneLong   = 3 * time.Second        // for a message that ought to be there: a server that leads no longer, and does not know yet, has not got it
	maxForeign = 1000                   // blocks at the log's end that are not ours before it is given up
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
		if err := l.commit(l.gather([]*entry{}, first)); err != nil {
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

// gather adds to a batch what is queued by now, up to a block's bounds: first, where there is one, before anything else.
func (l *Log) gather(batch []*entry, first *entry) []*entry {
	size, limit := 0, min(maxBlock, l.opts.Store.MaxMessage()-MaxLine/4)
	for _, e := range batch {
		size += len(e.body) + 256
	}
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
	if first != nil {
		add(first)
	}
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
//
// A block that lost its place to another node's is made anew, with all that has been queued meanwhile: nodes that compete for the
// log's end then store fewer and larger blocks, and not one record at a time while thousands wait. The same block is tried until it
// is certain that it was not stored.
func (l *Log) commit(batch []*entry) error {
	if len(batch) == 0 {
		return nil
	}
	began, wait, ahead := time.Now(), firstWait, 1
	coming := began // since when the same block is awaited
	block, next := l.build(batch)
	for {
		tried := time.Now()
		err := l.store(block, next, ahead)
		switch {
		case err == nil:
			l.stored(batch, block, began)
			l.yield(time.Since(tried))
			return nil
		case errors.Is(err, state.ErrConflict): // another node was first, and its blocks are taken in
			batch = l.gather(batch, nil)
			block, next = l.build(batch)
			ahead = min(2*ahead, maxAhead)
			wait, coming = firstWait, time.Now()
			continue
		case l.life.Err() != nil:
			for _, e := range batch {
				l.drop(e, err)
			}
			return err
		case errors.Is(err, errComing) && time.Since(coming) < comingLong:
			l.sleep(comingWait)
			continue
		}
		if l.stuck.Store(&err); errors.Is(err, state.ErrNoConnection) {
			l.away()
		}
		l.opts.Metrics.failed.Inc()
		l.failures.Do(func() {
			l.opts.Logger.Error("audit records cannot be stored and are tried again", "records", len(batch), "waiting", len(l.queue), "err", err, "again_in", wait)
		})
		l.sleep(wait)
		wait = min(wait*2, lastWait)
	}
}

// stored tells everybody who waits for a batch.
func (l *Log) stored(batch []*entry, block []byte, began time.Time) {
	l.stuck.Store(nil)
	l.found()
	l.opts.Metrics.committed(batch, len(block), time.Since(began))
	for _, e := range batch {
		e.finish(nil)
	}
	l.copy.write(block)
}

// away tells everybody who waits that the node has no connection to the store; found has them wait again.
func (l *Log) away() {
	alone := *l.alone.Load()
	select {
	case <-alone:
	default:
		close(alone)
	}
}

func (l *Log) found() {
	if last := l.alone.Load(); last != nil {
		select {
		case <-*last:
		default:
			return
		}
	}
	fresh := make(lapse)
	l.alone.Store(&fresh)
}

// yield lets other nodes have their turn at the log's end, for about as long as storing a block has taken: they have to read ours
// first, and would lose again and again against a node that need not. They are not heard of before they have won.
func (l *Log) yield(took time.Duration) {
	if l.opts.Rivals {
		took = min(took, maxYield)
		l.sleep(took/2 + rand.N(took+1))
	}
}

// sleep waits, unless the log's life ends.
func (l *Log) sleep(d time.Duration) {
	select {
	case <-time.After(d):
	case <-l.life.Done():
	}
}

// lineRoom is above what a line of a block has besides its record, in bytes.
const lineRoom = 320

// build links a batch to the chain's head.
func (l *Log) build(batch []*entry) ([]byte, head) {
	room := lineRoom // for the seal
	for _, e := range batch {
		room += len(e.body) + len(e.event) + len(l.node) + lineRoom
	}
	block := make([]byte, 0, room)
	next := l.at
	for _, e := range batch {
		block, next = link(block, next, e.event, l.node, e.body)
	}
	return seal(block, l.at.seq+1, next, l.opts.Node, l.opts.Now(), l.opts.Key), next
}

// errComing says that the place of a block is taken by one that is being stored just now, and cannot be read yet.
var errComing = errors.New("another message is on its way into the log")

// store appends a block at the place that it was built for. ErrConflict: other blocks stand there, and the head is behind
// them now; at most ahead of them are read at first. After any other error it may have been stored all the same, or may yet be: the
// same block must be tried again, and is then found where it stands.
func (l *Log) store(block []byte, next head, ahead int) error {
	seq, err := l.opts.Store.Append(l.life, block, l.after)
	if err == nil {
		l.move(next, seq)
		return nil
	}
	if !errors.Is(err, state.ErrConflict) {
		return err
	}
	l.opts.Metrics.conflicts.Inc()
	return l.catchUp(block, next, ahead)
}

// move puts the head behind a block.
func (l *Log) move(at head, seq uint64) {
	l.headMu.Lock()
	defer l.headMu.Unlock()
	l.at, l.after = at, seq
}

// catchUp takes in the blocks that others have appended. ErrConflict, unless one of them is ours: an earlier try of this block
// whose acknowledgement was lost.
func (l *Log) catchUp(block []byte, next head, ahead int) error {
	took := false
	for {
		found, err := l.readAhead(ahead)
		for _, there := range found {
			took = true
			if string(there) == string(block) {
				l.move(next, l.after+1)
				return nil
			}
			l.takeIn(l.after+1, there)
		}
		switch {
		case err != nil && took: // the block's place is another's now: it must not be tried behind what was taken in
			return state.ErrConflict
		case err != nil:
			return err
		case len(found) == ahead && ahead > 1: // there may be many more
			ahead = min(2*ahead, maxAhead)
		case took:
			return state.ErrConflict
		default:
			return l.skip()
		}
	}
}

// readAhead gives the messages behind the head, up to n and to the first one that is not there.
func (l *Log) readAhead(n int) ([][]byte, error) {
	found := make([][]byte, n)
	reading, ctx := errgroup.WithContext(l.life)
	for i := range found {
		reading.Go(func() (err error) {
			found[i], err = l.opts.Store.Get(ctx, l.after+1+uint64(i))
			if errors.Is(err, state.ErrNotFound) {
				return nil
			}
			return err
		})
	}
	err := reading.Wait()
	if end := slices.IndexFunc(found, func(b []byte) bool { return b == nil }); end >= 0 {
		found = found[:end]
	}
	return found, err
}

// skip goes over messages that were dropped by age or size meanwhile, and, after a while, over one that was taken out. Where there is
// none at all behind the head yet, one is coming. That a message is not there is not believed at once: two servers of a cluster can both take
// themselves for the leader for a moment, and whoever goes by the one that is behind would leave out what was stored and make a chain of its own.
func (l *Log) skip() error {
	info, err := l.opts.Store.Info(l.life)
	switch {
	case err != nil:
		return err
	case info.First > l.after+1:
		l.after = info.First - 1
		return state.ErrConflict // the next try takes in what follows
	case info.Last <= l.after:
		return errComing
	case l.gone.seq != l.after+1:
		l.gone.seq, l.gone.since = l.after+1, time.Now()
	}
	_, err = l.opts.Store.Get(l.life, l.after+1)
	switch {
	case err == nil:
		return state.ErrConflict
	case !errors.Is(err, state.ErrNotFound):
		return err
	case time.Since(l.gone.since) < goneLong:
		return errComing
	}
	l.after++
	return state.ErrConflict
}

// takeIn moves the head behind a block that another node wrote. One that is not of this chain is left aside, and a record
// says so. Where a coordinator wrote it, and it is ahead of us, we have missed something, and go on from there.
func (l *Log) takeIn(seq uint64, block []byte) {
	at, err := checkBlock(block, &l.at, l.keys)
	if err == nil {
		l.move(at, seq)
		return
	}
	if at, err = checkBlock(block, nil, l.keys); err == nil && at.seq > l.at.seq {
		l.opts.Logger.Error("the audit log goes on behind something that this coordinator has not seen", "message", seq, "missed", at.seq-l.at.seq)
		l.move(at, seq)
		l.Note(l.foreign(seq, block))
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

// patientGet reads a message that ought to be there, and believes only after a while that it is not: see skip.
func (l *Log) patientGet(ctx context.Context, seq uint64, patience *time.Duration) ([]byte, error) {
	for {
		block, err := l.opts.Store.Get(ctx, seq)
		if !errors.Is(err, state.ErrNotFound) || *patience <= 0 {
			return block, err
		}
		*patience -= lastWait
		select {
		case <-time.After(lastWait):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
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
	patience := goneLong
	for seq := info.Last; seq >= info.First && seq > 0; seq-- {
		block, err := l.patientGet(ctx, seq, &patience)
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
