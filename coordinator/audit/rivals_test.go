package audit

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvertnet/culvert/coordinator/audit/audittest"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/problem"
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
					l := open(t, store, func(o *Options) { o.Node, o.Rivals = fmt.Sprint("n", node), true })
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

// brokenStore fails to read one message once.
type brokenStore struct {
	*audittest.Store
	broken atomic.Uint64 // sequence; 0 for none
}

func (s *brokenStore) Get(ctx context.Context, seq uint64) ([]byte, error) {
	if s.broken.CompareAndSwap(seq, 0) {
		return nil, errors.New("no leader")
	}
	return s.Store.Get(ctx, seq)
}

// TestFailedReadBetweenRivals: reading what another node has written fails in the middle. What was made for the end that the log had
// before must not go behind what was read.
func TestFailedReadBetweenRivals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &brokenStore{Store: audittest.New()}
		late := open(t, store, func(o *Options) { o.Node, o.Rivals = "late", true })
		early := open(t, store, func(o *Options) { o.Node, o.Rivals = "early", true })
		synctest.Wait()
		for n := range 2 {
			if err := early.Record(t.Context(), joined(n)); err != nil {
				t.Fatal(err)
			}
		}
		info, err := store.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		store.broken.Store(info.Last + 1)
		if err := late.Record(t.Context(), joined(3)); err != nil {
			t.Fatal(err)
		}
		if store.broken.Load() != 0 {
			t.Fatal("nothing was read beyond the end")
		}
		if rep := sound(t, store); rep.Records != 3 {
			t.Errorf("%d records", rep.Records)
		}
	})
}

// leakyStore loses every kind of word now and then: a message on its way in, the answer that it was stored, what was read.
type leakyStore struct {
	slowStore
	chance func() bool
}

var errLost = errors.New("lost on the way")

func (s *leakyStore) Append(ctx context.Context, data []byte, after uint64) (uint64, error) {
	if s.chance() {
		return 0, errLost
	}
	seq, err := s.slowStore.Append(ctx, data, after)
	if s.chance() {
		return 0, errLost
	}
	return seq, err
}

func (s *leakyStore) Get(ctx context.Context, seq uint64) ([]byte, error) {
	if s.chance() {
		return nil, errLost
	}
	return s.slowStore.Get(ctx, seq)
}

func (s *leakyStore) Info(ctx context.Context) (state.LogInfo, error) {
	if s.chance() {
		return state.LogInfo{}, errLost
	}
	return s.slowStore.Info(ctx)
}

// TestRivalsOnALeakyStore: whatever gets lost between three nodes and their store, the chain is whole, and each record is in it once.
func TestRivalsOnALeakyStore(t *testing.T) {
	for seed := range uint64(12) {
		percent := 5 + int(seed)%3*10
		synctest.Test(t, func(t *testing.T) {
			var mu sync.Mutex
			random := rand.New(rand.NewPCG(seed, 0))
			var leaky atomic.Bool
			store := &leakyStore{slowStore{Store: audittest.New(), takes: 4 * time.Millisecond}, func() bool {
				mu.Lock()
				defer mu.Unlock()
				return leaky.Load() && random.IntN(100) < percent
			}}
			const nodes, callers, each = 3, 5, 4
			var logs [nodes]*Log
			for node := range logs {
				logs[node] = open(t, store, func(o *Options) { o.Node, o.Rivals, o.Wait = fmt.Sprint("n", node), true, time.Hour })
			}
			leaky.Store(true)
			var wg sync.WaitGroup
			for node, l := range logs {
				for w := range callers {
					wg.Go(func() {
						for n := range each {
							if err := l.Record(t.Context(), joined(node*1000+w*100+n)); err != nil {
								t.Error(err)
							}
						}
					})
				}
			}
			wg.Wait()
			leaky.Store(false)
			if rep := sound(t, store); rep.Records != nodes*callers*each {
				t.Errorf("%d records with seed %d, %d %%", rep.Records, seed, percent)
			}
		})
	}
}

// TestNobodyStarvesOnASlowStore: where storing a block takes long, a node whose callers always wait leaves the log's end to the others as well,
// although it hears nothing of them before they have had it once.
func TestNobodyStarvesOnASlowStore(t *testing.T) {
	for _, takes := range []time.Duration{time.Millisecond, 40 * time.Millisecond, 150 * time.Millisecond} {
		t.Run(takes.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { rivals(t, &slowStore{Store: audittest.New(), takes: takes}, 2, 25) })
		})
	}
}

// cutOffStore takes nothing while it has no connection.
type cutOffStore struct {
	*audittest.Store
	off atomic.Bool
}

func (s *cutOffStore) Append(ctx context.Context, data []byte, after uint64) (uint64, error) {
	if s.off.Load() {
		return 0, fmt.Errorf("append: %w", state.ErrNoConnection)
	}
	return s.Store.Append(ctx, data, after)
}

// TestNobodyWaitsForNoConnection: while a node has no connection to the store, whoever wants a record stored is told at once and may ask
// another node. What was on its way then is stored later.
func TestNobodyWaitsForNoConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &cutOffStore{Store: audittest.New()}
		l := open(t, store)
		store.off.Store(true)
		began := time.Now()
		for n := range 2 { // one that waits when the connection is lost, and one that comes later
			if err := l.Record(t.Context(), joined(n)); problem.CodeOf(err) != problem.Unreachable || time.Since(began) > 0 {
				t.Errorf("%v after %s", err, time.Since(began))
			}
		}
		store.off.Store(false)
		time.Sleep(2 * lastWait)
		if err := l.Record(t.Context(), joined(3)); err != nil {
			t.Error(err)
		}
		if rep := sound(t, store); rep.Records != 2 {
			t.Errorf("%d records", rep.Records)
		}
	})
}
