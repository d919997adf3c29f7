// Package audittest is the audit log's store in memory, for tests: it can be away, slow, forgetful and tampered with.
package audittest

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/culvertnet/culvert/coordinator/state"
)

// ErrAway is what a store that is away answers.
var ErrAway = errors.New("the store is away")

// Store keeps messages in memory. It is safe for concurrent use.
type Store struct {
	// Before, where set, is asked before a message is stored. With an error the message is not stored; keep stores it all
	// the same and loses the answer.
	Before func(data []byte) (keep bool, err error)

	mu       sync.Mutex
	first    uint64
	messages []state.Message // of sequences first, first+1 …; nil Data where one was taken out
	mark     []byte
	revision uint64
	away     bool
	grown    chan struct{} // closed when something is appended
	limits   state.LogInfo
}

// New makes an empty store.
func New() *Store { return &Store{first: 1, grown: make(chan struct{})} }

// SetAway makes every call fail, or work again.
func (s *Store) SetAway(away bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = away
}

// SetLimits says what Info tells about retention; nothing is dropped by it.
func (s *Store) SetLimits(age time.Duration, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limits.MaxAge, s.limits.MaxBytes = age, size
}

// Append implements audit.Store.
func (s *Store) Append(_ context.Context, data []byte, after uint64) (uint64, error) {
	var lost error
	if s.Before != nil {
		keep, err := s.Before(data)
		if err != nil && !keep {
			return 0, err
		}
		lost = err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.first + uint64(len(s.messages)) - 1
	switch {
	case s.away:
		return 0, ErrAway
	case after != last:
		return 0, state.ErrConflict
	}
	s.messages = append(s.messages, state.Message{Sequence: last + 1, Time: time.Now(), Data: append([]byte{}, data...)})
	close(s.grown)
	s.grown = make(chan struct{})
	return last + 1, lost
}

// Get implements audit.Store.
func (s *Store) Get(_ context.Context, seq uint64) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away {
		return nil, ErrAway
	}
	if seq < s.first || seq >= s.first+uint64(len(s.messages)) || s.messages[seq-s.first].Data == nil {
		return nil, state.ErrNotFound
	}
	return s.messages[seq-s.first].Data, nil
}

// Info implements audit.Store.
func (s *Store) Info(context.Context) (state.LogInfo, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away {
		return state.LogInfo{}, ErrAway
	}
	info := s.limits
	info.First, info.Last = s.first, s.first+uint64(len(s.messages))-1
	for _, m := range s.messages {
		if m.Data != nil {
			info.Messages++
			info.Bytes += uint64(len(m.Data))
		}
	}
	return info, nil
}

// Read implements audit.Store.
func (s *Store) Read(ctx context.Context, from uint64, follow bool, yield func(state.Message) bool) error {
	for next := from; ; {
		s.mu.Lock()
		next = max(next, s.first)
		var m state.Message
		there := next < s.first+uint64(len(s.messages))
		if there {
			m = s.messages[next-s.first]
		}
		grown, away := s.grown, s.away
		s.mu.Unlock()
		switch {
		case away:
			return ErrAway
		case there:
			next++
			if m.Data != nil && !yield(m) {
				return nil
			}
			continue
		case !follow:
			return nil
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return nil
		}
	}
}

// Mark implements audit.Store.
func (s *Store) Mark(context.Context) ([]byte, uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away {
		return nil, 0, ErrAway
	}
	return s.mark, s.revision, nil
}

// SetMark implements audit.Store.
func (s *Store) SetMark(_ context.Context, data []byte, revision uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.away:
		return ErrAway
	case revision != s.revision:
		return state.ErrConflict
	}
	s.mark = data
	s.revision++
	return nil
}

// MaxMessage implements audit.Store.
func (s *Store) MaxMessage() int { return 1 << 20 }

// Messages gives what is stored.
func (s *Store) Messages() []state.Message {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]state.Message{}, s.messages...)
}

// Tamper changes what is stored, as somebody with the files in hand could. A message whose Data is set to nil is gone.
func (s *Store) Tamper(f func(list []state.Message) []state.Message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.messages = f(s.messages)
}

// Drop forgets the oldest messages, as retention does.
func (s *Store) Drop(count int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.messages = s.messages[count:]
	s.first += uint64(count)
}
