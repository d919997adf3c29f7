package audit

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/culvertnet/culvert/coordinator/state"
)

const (
	markEvery   = time.Second
	markTimeout = 2 * time.Second
)

// mark writes down how far the log reaches, at a place of its own. A log that has lost its end (a store that
// acknowledged what it did not keep, files put back from a copy) is known by it, and one that retention has emptied goes on with
// the numbers that it had. It gives what is marked now; failures wait for the next time.
func (l *Log) mark(ctx context.Context, marked uint64) uint64 {
	l.headMu.Lock()
	at := l.at
	l.headMu.Unlock()
	if at.seq <= marked {
		return marked
	}
	e := Ending{Last: at.seq, Head: at.hash, Time: l.opts.Now().UnixMilli()}
	e.Sig = sign(l.opts.Key, e.message())
	data, _ := json.Marshal(e) // strings and numbers alone: it always encodes
	for range 3 {
		there, revision, err := l.opts.Store.Mark(ctx)
		if err != nil {
			return marked
		}
		if old, ok := readMark(there, l.keys); ok && old.seq >= at.seq {
			return old.seq // another node's
		}
		err = l.opts.Store.SetMark(ctx, data, revision)
		if err == nil {
			return at.seq
		}
		if !errors.Is(err, state.ErrConflict) {
			break
		}
	}
	return marked
}

// readMark gives a mark that one of the keys has signed.
func readMark(data []byte, keys []ed25519.PublicKey) (head, bool) {
	var e Ending
	if json.Unmarshal(data, &e) != nil || e.First != 0 || !signed(keys, e.message(), e.Sig) {
		return head{}, false
	}
	return head{e.Last, e.Head}, true
}

// resume compares the end of the log with the mark. Numbers that the mark says were given are never given again, so that what
// is missing shows for as long as its neighbours are kept.
func (l *Log) resume(mark []byte, empty bool) []Record {
	marked, ok := readMark(mark, l.keys)
	if !ok || marked.seq <= l.at.seq {
		return nil
	}
	found := l.at
	l.at = marked
	if empty { // by age: nothing was written for so long
		return nil
	}
	l.opts.Logger.Error("the audit log has lost its end", "last", found.seq, "should_be", marked.seq)
	return []Record{{Event: Broken, Severity: High, Status: statusFailure,
		Message: fmt.Sprintf("records %d to %d were stored once and are gone", found.seq+1, marked.seq)}}
}
