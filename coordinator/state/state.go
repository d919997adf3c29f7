// Package state keeps leases, addresses and gateway presence, and carries messages between coordinator nodes, on NATS
// JetStream: embedded in the process by default, an existing cluster by URL. There is one code path for both in all that is written. Embedded,
// this process is the only node: messages to gateways go by way of memory, a lease is read from the mirror, and who holds an
// address is kept in memory and told by leases (see holds).
//
// Everything lives in one key-value bucket whose keys expire by themselves:
//
//	session.<id>                 a lease
//	address.<network>.<address>  which session holds an IPv4 overlay address; embedded, leases say so themselves
//	gateway.<instance>           a live gateway
//	ended.<session>              that somebody speaks for the end of a session whose lease ran out
//	secret.<name>                what all nodes share and nobody else may know; never expires
//
// The stream's sequence numbers are the revisions that every change is fenced with. Each node watches the bucket and
// mirrors it in memory; the mirror answers what is asked for every join (the live gateways, an address that is likely
// to be free), while the bucket alone decides.
//
// What was acknowledged has been written to the file by then, so it survives the death of the process. It is synced
// to the disk every few seconds, so the death of the machine may take the last of it: leases are soft state, which
// gateways and clients re-assert.
package state

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/nats-io/nats.go"
)

// Options configure a [Store].
type Options struct {
	Dir         string       // embedded: where JetStream keeps its files; "" keeps them in a temporary folder removed on Close
	NATS        []string     // an existing cluster instead: its URLs, for example tls://n1:4222
	Credentials string       // its credentials file: a user's JWT and seed, or an nkey's seed
	Elections   string       // a file like it, of a user of its system account that may ask for elections; "" waits for them
	Logger      *slog.Logger // defaults to slog.Default

	now       func() time.Time // the clock by which leases expire; tests turn it
	resumable time.Duration    // see the constant; tests shorten it
}

// Validate fills defaults. Its errors are [problem.BadConfig] and name no URL, since one may hold a password.
func (o *Options) Validate() error {
	if len(o.NATS) > 0 && o.Dir != "" {
		return problem.New(problem.BadConfig, "state has both a dir and nats URLs",
			"keep dir for the embedded store, or nats for an existing cluster")
	}
	if len(o.NATS) == 0 && o.Credentials+o.Elections != "" {
		return problem.New(problem.BadConfig, "state has credentials but no nats URLs", "add nats, or remove credentials")
	}
	for i, s := range o.NATS {
		u, err := url.Parse(s)
		if err != nil || u.Host == "" {
			return problem.New(problem.BadConfig, fmt.Sprintf("nats URL %d of state does not parse", i+1),
				"write it as tls://host:4222")
		}
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.now == nil {
		o.now = time.Now
	}
	if o.resumable == 0 {
		o.resumable = resumable
	}
	return nil
}

// Errors that callers match.
var (
	ErrExists   = errors.New("exists already")
	ErrNotFound = errors.New("not found")
	ErrConflict = errors.New("changed by another writer")
	ErrFull     = errors.New("no free address")
	ErrAway     = errors.New("gateway does not answer")

	// ErrNoConnection says that no server of a cluster has been reached for a while: another node may reach one.
	ErrNoConnection = errors.New("there is no connection to nats")
)

// Store is a coordinator node's view of the shared state, safe for concurrent use.
type Store struct {
	log      *slog.Logger
	now      func() time.Time
	embedded *embedded // nil with an existing cluster
	syncer   *syncer   // nil with an existing cluster
	conn     *nats.Conn
	panel    *panel // nil where nobody may ask for elections
	bucket   *bucket

	life  context.Context // ends with Close; handlers of messages run under it
	end   context.CancelFunc
	tasks sync.WaitGroup // the watch, and the look after the leader

	mu      sync.Mutex
	closed  bool
	serving map[*service]struct{}
	here    map[string][]*service // by gateway, the oldest first, where the state is embedded
}

// Open starts or connects to NATS and makes the bucket ready: it returns once everything that was stored before is in
// the node's mirror. The store lives until Close, not until ctx ends. A directory that another process uses and
// options that contradict each other are [problem.BadConfig], a cluster that does not answer is [problem.Unreachable].
func Open(ctx context.Context, opts Options) (*Store, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	s := &Store{log: opts.Logger, now: opts.now, serving: map[*service]struct{}{}, here: map[string][]*service{}}
	s.life, s.end = context.WithCancel(context.WithoutCancel(ctx))
	if err := s.open(ctx, opts); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Store) open(ctx context.Context, opts Options) error {
	reconnected := make(chan struct{}, 1)
	var err error
	if len(opts.NATS) == 0 {
		if s.embedded, err = startEmbedded(opts.Dir, storage{name: "culvert", limit: maxStore}, s.log); err != nil {
			return err
		}
	}
	if s.panel, err = newPanel(opts); err != nil {
		return fmt.Errorf("connect to ask for elections: %w", err)
	}
	if s.conn, err = connectBeside(s.panel, opts, s.embedded, reconnected); err != nil {
		return err
	}
	err = Patiently(ctx, s.log, func() (err error) {
		s.bucket, err = openBucket(ctx, s.conn, s.now, s.log)
		return err
	})
	if err != nil {
		return fmt.Errorf("make the state's bucket ready: %w", err)
	}
	if s.embedded != nil {
		s.bucket.mirror.holds = newHolds()
	}
	s.bucket.resumable = opts.resumable
	e := &s.bucket.escape
	if e.election = newElection(s.panel, s.log, s.conn, s.bucket.stream, e.cutOff); e.election != nil {
		s.tasks.Go(func() { e.election.run(s.life) })
	}
	if s.embedded != nil {
		s.syncer = newSyncer(s.embedded.dir)
		s.tasks.Go(func() { s.syncer.run(s.life) })
		s.tasks.Go(func() { s.syncer.sweep(s.life, s.log) })
	}
	s.tasks.Go(func() { s.bucket.follow(s.life, reconnected) })
	select {
	case <-s.bucket.mirror.ready:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("read the state's bucket: %w", context.Cause(ctx))
	}
}

// Close ends services, watches and the embedded server, and waits. It may be called more than once.
func (s *Store) Close() error {
	s.mu.Lock()
	s.closed = true
	services := make([]*service, 0, len(s.serving))
	for v := range s.serving {
		services = append(services, v)
	}
	s.mu.Unlock()
	s.end()
	for _, v := range services {
		v.stop()
	}
	s.tasks.Wait()
	s.panel.close()
	if s.conn != nil {
		s.conn.Close()
	}
	if s.embedded != nil {
		return s.embedded.stop()
	}
	return nil
}

// Ready reports why the store cannot serve, or nil.
func (s *Store) Ready(ctx context.Context) error {
	if status := s.conn.Status(); status != nats.CONNECTED {
		return fmt.Errorf("the connection to nats is %s", status)
	}
	if _, err := s.bucket.stream.Info(ctx); err != nil {
		return fmt.Errorf("ask nats for the state's bucket: %w", err)
	}
	return nil
}
