package api

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/semaphore"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/wire"
)

// Bounds of what the gateways of one enrolment have at this node together. A gateway may call itself by any number of instances, so that bounds
// of one stream alone are none.
const (
	maxStreams = 1024
	maxHellos  = 4 * wire.MaxState // bytes of hellos that are being read, or held against the state
	maxBacklog = 4 * maxWaiting    // bytes that wait in their inboxes
	smallHello = 128 << 10         // bytes of a hello that nobody has to wait for, some hundred sessions
)

// ledger adds up what the gateways of one enrolment have.
type ledger struct {
	hellos  *semaphore.Weighted // bytes
	backlog atomic.Int64        // bytes

	streams int // guarded by ledgers.mu
}

// ledgers are those of all enrolments by which there are streams. The zero value is ready.
type ledgers struct {
	mu sync.Mutex
	of map[ledgerKey]*ledger
}

type ledgerKey struct {
	network   string
	enrolment config.Enrolment
}

func newLedger() *ledger { return &ledger{hellos: semaphore.NewWeighted(maxHellos)} }

// enter counts a stream in, unless there are as many by its enrolment as may be. leave has to be called when it is over.
func (l *ledgers) enter(network string, e config.Enrolment) (own *ledger, leave func(), err error) {
	key := ledgerKey{network, e}
	l.mu.Lock()
	defer l.mu.Unlock()
	own = l.of[key]
	switch {
	case own == nil:
		own = newLedger()
		if l.of == nil {
			l.of = map[ledgerKey]*ledger{}
		}
		l.of[key] = own
	case own.streams >= maxStreams:
		return nil, nil, problem.New(problem.RateLimited, "as many gateways as may be are connected with this credential",
			"give further gateways of the network another enrolment, or connect them to another node")
	}
	own.streams++
	return own, func() { l.leave(key, own) }, nil
}

func (l *ledgers) leave(key ledgerKey, own *ledger) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if own.streams--; own.streams == 0 {
		delete(l.of, key)
	}
}

// readHello reads a hello. A large one waits for room, so that what gateways of one enrolment say at once is bounded whatever their number.
func (s *stream) readHello(ctx context.Context) (f wire.Frame, err error) {
	kind, r, err := s.conn.Reader(ctx)
	if err != nil {
		return f, fmt.Errorf("read from the gateway: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(r, smallHello))
	if err == nil && len(data) == smallHello {
		if err = s.own.hellos.Acquire(ctx, wire.MaxState); err != nil {
			return f, fmt.Errorf("wait for room for the gateway's hello: %w", err)
		}
		s.hellos = wire.MaxState
		var rest []byte
		rest, err = io.ReadAll(r)
		data = append(data, rest...)
		s.keepHello(int64(len(data)))
	}
	if err != nil {
		return f, fmt.Errorf("read from the gateway: %w", err)
	}
	return parseFrame(kind, data)
}

// keepHello gives back the room that a hello does not take, now that its length is known.
func (s *stream) keepHello(size int64) {
	if more := s.hellos - size; more > 0 {
		s.hellos = size
		s.own.hellos.Release(more)
	}
}

// forgetHello gives back the rest, once what the hello says has been held against the state.
func (s *stream) forgetHello() { s.keepHello(0) }
