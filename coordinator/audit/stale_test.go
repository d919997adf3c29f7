package audit

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvertnet/culvert/coordinator/audit/audittest"
	"github.com/culvertnet/culvert/coordinator/state"
)

// twoLeaders is a cluster in the moment after an election, for as long as the former leader has not heard of it: some reads are
// answered by that one, which has not got the last messages. Writes it cannot acknowledge.
type twoLeaders struct {
	*audittest.Store
	lacks uint64 // how many of the last messages
}

func (s twoLeaders) Get(ctx context.Context, seq uint64) ([]byte, error) {
	time.Sleep(time.Millisecond)
	info, err := s.Info(ctx)
	if err != nil {
		return nil, err
	}
	if seq+s.lacks > info.Last && rand.IntN(2) == 0 {
		return nil, state.ErrNotFound
	}
	return s.Store.Get(ctx, seq)
}

// TestReadsOfAFormerLeader: nodes that read from a server that leads no longer leave nothing out, and there is one chain.
func TestReadsOfAFormerLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := twoLeaders{audittest.New(), 3}
		var wg sync.WaitGroup
		const callers, each = 4, 20
		for node := range 3 {
			l := open(t, store, func(o *Options) { o.Node, o.Rivals = fmt.Sprint("n", node), true })
			for w := range callers {
				wg.Go(func() {
					for n := range each {
						if err := l.Record(t.Context(), joined(node*1_000_000+w*1000+n)); err != nil {
							t.Error(err)
						}
						time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
					}
				})
			}
		}
		wg.Wait()
		if rep := sound(t, store.Store); rep.Records != 3*callers*each {
			t.Errorf("%d records", rep.Records)
		}
	})
}

// TestGoesOnBehindWhatItMissed: a node that has lost sight of a message goes on from what others wrote behind it, instead of holding every
// block of theirs for a stranger's for ever.
func TestGoesOnBehindWhatItMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := audittest.New()
		a := open(t, store, func(o *Options) { o.Node, o.Rivals = "a", true })
		b := open(t, store, func(o *Options) { o.Node, o.Rivals = "b", true })
		record := func(l *Log, n int) {
			t.Helper()
			if err := l.Record(t.Context(), joined(n)); err != nil {
				t.Fatal(err)
			}
		}
		record(a, 1)
		record(b, 2)
		record(a, 3)
		synctest.Wait()
		b.after++ // as if it had taken in what a wrote
		record(a, 4)
		record(b, 5)
		for n := range 10 {
			record(a, 10+n)
			record(b, 20+n)
		}
		synctest.Wait()
		messages := store.Messages()
		last := messages[len(messages)-11:]
		at, err := checkBlock(last[0].Data, nil, a.keys)
		for _, m := range last[1:] {
			if err == nil {
				at, err = checkBlock(m.Data, &at, a.keys)
			}
		}
		if err != nil {
			t.Error("there are two chains")
		}
	})
}
