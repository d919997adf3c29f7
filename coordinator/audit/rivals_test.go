package audit

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvertnet/culvert/coordinator/audit/audittest"
	"github.com/culvertnet/culvert/coordinator/state"
)

// slowStore is a replicated store as a cluster has one: a message takes a while until it can be read, and meanwhile its place is
// refused to others already. Some answers are lost on their way.
type slowStore struct {
	*audittest.Store
	takes time.Duration
	lose  int // every so many answers; 0 none

	mu     sync.Mutex
	coming uint64 // sequence of the message that is being stored; 0 for none
	tries  int
}

func (s *slowStore) Append(ctx context.Context, data []byte, after uint64) (uint64, error) {
	time.Sleep(s.takes / 8) // to the leader
	s.mu.Lock()
	if s.coming != 0 {
		s.mu.Unlock()
		return 0, state.ErrConflict
	}
	s.coming = after + 1
	s.tries++
	lost := s.lose > 0 && s.tries%s.lose == 0
	s.mu.Unlock()
	time.Sleep(s.takes)
	s.mu.Lock()
	seq, err := s.Store.Append(ctx, data, after)
	s.coming = 0
	s.mu.Unlock()
	if lost {
		return 0, errors.New("no answer")
	}
	return seq, err
}

func (s *slowStore) Get(ctx context.Context, seq uint64) ([]byte, error) {
	time.Sleep(s.takes / 8)
	return s.Store.Get(ctx, seq)
}

// TestRivalsStoreManyRecordsAtOnce: three nodes with a hundred callers each share a store that takes 8 ms for a block. One record
// in a block would be 110 a second, and callers who try again would only make it worse: everybody has to be served in time, and no
// node at another one's cost.
func TestRivalsStoreManyRecordsAtOnce(t *testing.T) {
	for _, lose := range []int{0, 7} {
		t.Run(fmt.Sprint("every answer lost of ", lose), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &slowStore{Store: audittest.New(), takes: 8 * time.Millisecond, lose: lose}
				var wg sync.WaitGroup
				var longest atomic.Int64
				const callers, each = 100, 6
				for node := range 3 {
					l := open(t, store, func(o *Options) { o.Node = fmt.Sprint("n", node) })
					for w := range callers {
						wg.Go(func() {
							for n := range each {
								began := time.Now()
								if err := l.Record(t.Context(), joined(node*1_000_000+w*1000+n)); err != nil {
									t.Error(err)
								}
								for took := int64(time.Since(began)); ; {
									if old := longest.Load(); took <= old || longest.CompareAndSwap(old, took) {
										break
									}
								}
							}
						})
					}
				}
				wg.Wait()
				if got := time.Duration(longest.Load()); got > time.Second {
					t.Errorf("a record waited for %s", got)
				}
				if rep := sound(t, store); rep.Records != 3*callers*each {
					t.Errorf("%d records", rep.Records)
				}
			})
		})
	}
}
