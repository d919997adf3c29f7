// Package audit keeps the record of every decision: append-only, hash-chained, signed, on the disk before a job hears of
// what was decided.
//
// All nodes write one chain. Each gathers the records that come in while its last block is being stored, links them to
// the chain's head, signs the block and appends it right after the block that it believes to be the last; if another node
// was first, it takes that block in and links its own again, with what has come in meanwhile. One chain, because then nothing can be missing from it: a
// chain for each node would need somebody to remember which nodes there ever were, and a whole one could vanish.
// The price is that blocks of all nodes follow one after the other; how many records a block holds has no such bound.
//
// What is refused before a token was verified costs a stranger nothing, so it is counted instead, and what he may have signed for a repository
// of his own costs him little, so it is counted where there is much: see [Tally].
package audit

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/problem"
)

// Store is what the log is kept in: a [state.Log].
type Store interface {
	Append(ctx context.Context, data []byte, after uint64) (uint64, error)
	Get(ctx context.Context, seq uint64) ([]byte, error)
	Info(ctx context.Context) (state.LogInfo, error)
	Read(ctx context.Context, from uint64, follow bool, yield func(state.Message) bool) error
	Mark(ctx context.Context) (data []byte, revision uint64, err error)
	SetMark(ctx context.Context, data []byte, revision uint64) error
	MaxMessage() int
}

// Options configure a [Log].
type Options struct {
	Store  Store
	Key    ed25519.PrivateKey  // signs; all nodes have the same
	Former []ed25519.PublicKey // keys that signed before
	Node   string              // this node's name in its seals
	Rivals bool                // other nodes write to the store, too
	Copy   io.Writer           // every record of this node goes here too once it is stored; nil for nowhere
	Logger *slog.Logger

	Queue   int              // records that may wait; default 8192
	Wait    time.Duration    // how long a caller waits for its record to be stored; default 5 s
	Metrics *Metrics         // nil: none
	Now     func() time.Time // default time.Now
}

// Validate fills defaults.
func (o *Options) Validate() error {
	if o.Store == nil || len(o.Key) != ed25519.PrivateKeySize {
		return errors.New("an audit log needs a store and a key")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Queue <= 0 {
		o.Queue = 8192
	}
	if o.Wait <= 0 {
		o.Wait = 5 * time.Second
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return nil
}

// Log writes records. It is safe for concurrent use.
type Log struct {
	opts  Options
	keys  []ed25519.PublicKey // ours and the former ones
	node  []byte              // its name as JSON
	queue chan *entry
	copy  *copier
	tally Tally
	stuck atomic.Pointer[error] // why the last try to store failed; nil once one has worked
	alone atomic.Pointer[lapse] // closed while the node has no connection to the store; replaced by the writer

	failures rate.Sometimes // what is said of that: once a second is enough

	life context.Context
	end  context.CancelFunc
	wg   sync.WaitGroup

	mu     sync.RWMutex // held for reading while something is put into queue
	closed bool
	lost   uint64 // records that nobody waited for and that found no room; guarded by lostMu
	lostMu sync.Mutex

	headMu sync.Mutex // for reading at outside of the writer
	at     head       // the chain's head; changed by the writer alone
	after  uint64     // the store's last message; the writer's
	gone   struct {   // a message that ought to be there, and since when it is missed; the writer's
		seq   uint64
		since time.Time
	}
}

// lapse is closed when a node loses its connection to the store: whoever waits then may ask another node.
type lapse chan struct{}

// entry is a record on its way into the log.
type entry struct {
	event Event
	body  []byte
	done  chan error // buffered; nil where nobody waits
	mu    sync.Mutex
	taken bool // into a block; guarded by mu
	left  bool // by who waited, before that; guarded by mu
}

// take claims the entry for a block, unless its caller has gone.
func (e *entry) take() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.taken = !e.left
	return e.taken
}

// leave is the caller's who gives up; it reports whether the record is certain not to be stored.
func (e *entry) leave() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.left = !e.taken
	return e.left
}

// Open finds the end of the log and starts to write.
func Open(ctx context.Context, opts Options) (*Log, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	l := &Log{opts: opts, queue: make(chan *entry, opts.Queue), failures: rate.Sometimes{First: 1, Interval: time.Second}}
	l.node, _ = json.Marshal(opts.Node) // a string always encodes
	l.found()
	l.keys = append(l.keys, opts.Key.Public().(ed25519.PublicKey))
	l.keys = append(l.keys, opts.Former...)
	l.life, l.end = context.WithCancel(context.WithoutCancel(ctx))
	broken, err := l.findHead(ctx)
	if err != nil {
		l.end()
		return nil, fmt.Errorf("find the end of the audit log: %w", err)
	}
	l.copy = newCopier(opts.Copy, opts.Metrics, opts.Logger)
	l.wg.Go(l.write)
	l.wg.Go(l.periodic)
	for _, r := range broken {
		l.Note(r)
	}
	return l, nil
}

// Record stores a record. It returns once it is on the disk, or with an error of code unreachable once it is certain that it
// is not, or unknown: then a caller who changes its mind says so in another record.
func (l *Log) Record(ctx context.Context, r Record) error {
	body, err := encode(r, l.opts.Now())
	if err != nil {
		return err
	}
	began := time.Now()
	e := &entry{event: r.Event, body: body, done: make(chan error, 1)}
	ctx, cancel := context.WithTimeout(ctx, l.opts.Wait)
	defer cancel()
	alone := *l.alone.Load()
	select {
	case <-alone:
		return away(state.ErrNoConnection)
	default:
	}
	if err := l.put(ctx, e); err != nil {
		return away(err)
	}
	select {
	case err = <-e.done:
	case <-ctx.Done():
		e.leave()
		err = ctx.Err()
	case <-alone:
		e.leave()
		err = state.ErrNoConnection
	}
	if err != nil {
		return away(err)
	}
	l.opts.Metrics.waited.Observe(time.Since(began).Seconds())
	return nil
}

func away(err error) error {
	return problem.Wrap(err, problem.Unreachable, "the coordinator cannot store its audit record", "try again in a few seconds")
}

// put queues an entry, waiting for room until ctx ends.
func (l *Log) put(ctx context.Context, e *entry) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed {
		return errors.New("the audit log is closed")
	}
	select {
	case l.queue <- e:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-l.life.Done():
		return errors.New("the audit log is closed")
	}
}

// Note stores a record of something that has happened anyway, without waiting for it. Where there is no room because the
// store has been away for long, it is dropped, and a later record says how many were.
func (l *Log) Note(r Record) {
	body, err := encode(r, l.opts.Now())
	if err != nil {
		l.opts.Logger.Error("an audit record is not stored", "event", r.Event, "err", err)
		l.miss()
		return
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed {
		l.miss()
		return
	}
	select {
	case l.queue <- &entry{event: r.Event, body: body}:
	default:
		l.miss()
	}
}

func (l *Log) miss() {
	l.lostMu.Lock()
	defer l.lostMu.Unlock()
	l.lost++
	l.opts.Metrics.lost.Inc()
}

// takeLost gives the number of records that were dropped since it was last asked.
func (l *Log) takeLost() uint64 {
	l.lostMu.Lock()
	defer l.lostMu.Unlock()
	n := l.lost
	l.lost = 0
	return n
}

// Refused counts a request that was refused before its sender had proven anything: see [Tally].
func (l *Log) Refused(err error, from netip.Addr) {
	l.opts.Metrics.refused.WithLabelValues(string(problem.CodeOf(err))).Inc()
	l.tally.Add(err, from)
}

// Ready says why records cannot be stored just now, or nil.
func (l *Log) Ready() error {
	if err := l.stuck.Load(); err != nil {
		return *err
	}
	return nil
}

// PublicKey is the key by which this log's seals are verified.
func (l *Log) PublicKey() ed25519.PublicKey { return l.keys[0] }

// Close stores what is queued, for as long as ctx lasts, and ends. The store stays open.
func (l *Log) Close(ctx context.Context) error {
	l.noteTally()
	l.mu.Lock()
	again := l.closed
	if !again {
		l.closed = true
		close(l.queue)
	}
	l.mu.Unlock()
	stop := context.AfterFunc(ctx, l.end)
	defer stop()
	l.wg.Wait()
	l.end()
	if again {
		return nil
	}
	l.copy.close()
	if n := len(l.queue) + int(l.takeLost()); n > 0 {
		return fmt.Errorf("%d audit records were not stored", n)
	}
	return nil
}
