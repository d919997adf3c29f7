package claims

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
)

// remoteKeys is the key set of an issuer that is asked over HTTP.
//
//	         token with unknown key, Prefetch                    fetched
//	no keys ─────────────────────────────────► fetching (one) ────────────► keys ──┐ FreshFor, or an unknown
//	   ▲                                           │   ▲                           │ key after RefetchEvery
//	   └────── failed: again in 1 s, 2 s, 4 s … ───┘   └───────────────────────────┘ (failed: the old keys stay)
//
// There is never more than one fetch under way, and none starts within RefetchEvery of the one before once there are
// keys: whoever sends tokens with made-up key ids cannot make us fetch more often. A token whose key is known never waits.
// Fetching goes on in the background without any traffic, so that a key that the issuer withdraws is dropped here too.
type remoteKeys struct {
	issuer string
	http   *fetcher
	every  time.Duration // between two fetches
	fresh  time.Duration // until the next one, if nothing asks for it earlier
	now    func() time.Time
	log    *slog.Logger

	ctx    context.Context // of background fetches; ended by close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu       sync.Mutex
	ring     keyring       // nil until a fetch has succeeded
	err      error         // of the last fetch
	failures int           // in a row
	tried    time.Time     // when the last fetch began
	flight   chan struct{} // closed when the fetch under way ends; nil if none is
	next     *time.Timer   // for the next fetch
	closed   bool
}

func newRemoteKeys(issuer string, http *fetcher, opts Options) *remoteKeys {
	ctx, cancel := context.WithCancel(context.Background())
	return &remoteKeys{
		issuer: issuer, http: http, every: opts.RefetchEvery, fresh: opts.FreshFor,
		now: opts.Now, log: opts.Logger, ctx: ctx, cancel: cancel,
	}
}

// find implements [source]. It waits for at most one fetch.
func (s *remoteKeys) find(ctx context.Context, kid string) (keys, error) {
	for waited := false; ; waited = true {
		s.mu.Lock()
		if found, ok := s.ring.find(kid); ok {
			s.mu.Unlock()
			return found, nil
		}
		flight := s.flight
		if flight == nil && !waited && s.due() {
			flight = s.start()
		}
		err := s.refusal(kid)
		s.mu.Unlock()
		if waited || flight == nil {
			return nil, err
		}
		select {
		case <-flight:
		case <-ctx.Done():
			return nil, gaveUp(s.issuer, ctx.Err())
		}
	}
}

// prefetch implements [source].
func (s *remoteKeys) prefetch(ctx context.Context) error {
	s.mu.Lock()
	flight := s.flight
	if flight == nil && s.ring == nil && s.due() {
		flight = s.start()
	}
	s.mu.Unlock()
	if flight != nil {
		select {
		case <-flight:
		case <-ctx.Done():
			return gaveUp(s.issuer, ctx.Err())
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ring == nil {
		return away(s.issuer, s.err)
	}
	return nil
}

// refusal says why there is no such key. While the issuer is away the key may well exist, so that trying again helps.
func (s *remoteKeys) refusal(kid string) error {
	if s.ring == nil || s.err != nil {
		return away(s.issuer, s.err)
	}
	if kid == "" {
		return invalid(nil, "the token does not say which of the issuer's keys signed it")
	}
	return unknownKey(s.issuer, kid)
}

// due reports whether a fetch may start; mu is held.
func (s *remoteKeys) due() bool {
	return !s.closed && (s.tried.IsZero() || s.now().Sub(s.tried) >= s.cooldown())
}

// cooldown is the least time between two fetches; mu is held. As long as there are no keys at all every token is refused,
// so that the first tries follow faster, at 1 s, 2 s, 4 s and so on.
func (s *remoteKeys) cooldown() time.Duration {
	if s.ring != nil || s.failures == 0 || s.failures > 16 {
		return s.every
	}
	return min(time.Second<<(s.failures-1), s.every)
}

// start begins a fetch; mu is held and no other fetch is under way.
func (s *remoteKeys) start() chan struct{} {
	if s.next != nil {
		s.next.Stop()
	}
	s.tried = s.now()
	s.flight = make(chan struct{})
	s.wg.Go(s.fetch)
	return s.flight
}

func (s *remoteKeys) fetch() {
	ring, err := s.http.keys(s.ctx, s.issuer)
	s.mu.Lock()
	defer s.mu.Unlock()
	delay := s.fresh
	if err == nil {
		s.ring, s.err, s.failures = ring, nil, 0
		s.log.Debug("fetched an issuer's keys", "issuer", s.issuer, "keys", len(ring))
	} else {
		s.err = err
		s.failures++
		delay = s.cooldown()
	}
	if err != nil && !s.closed {
		s.log.Warn("an issuer's keys cannot be fetched", "issuer", s.issuer, "code", problem.IssuerAway, "err", err,
			"cached", s.ring != nil, "again_in", delay)
	}
	close(s.flight)
	s.flight = nil
	if !s.closed {
		s.next = time.AfterFunc(delay+rand.N(delay/10+1), s.again)
	}
}

// again is the timer's fetch.
func (s *remoteKeys) again() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed && s.flight == nil {
		s.start()
	}
}

// close implements [source].
func (s *remoteKeys) close() {
	s.mu.Lock()
	s.closed = true
	if s.next != nil {
		s.next.Stop()
	}
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()
}
