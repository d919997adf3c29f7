// Package session is one session's life at the coordinator: admit, offer, answer, lease, renew, end.
package session

import (
	"context"
	"crypto/ed25519"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/wire"
)

// Store is what sessions need of [state.Store].
type Store interface {
	CreateLease(ctx context.Context, l state.Lease, pool state.Pool) (state.Lease, error)
	AdoptLease(ctx context.Context, l state.Lease) (state.Lease, error)
	Lease(ctx context.Context, session string) (state.Lease, error)
	Recall(session string) (state.Lease, bool)
	UpdateLease(ctx context.Context, l state.Lease) (state.Lease, error)
	Sole() bool
	Stands(l state.Lease) bool
	Saving() (safe func(ctx context.Context) error)
	EndLease(ctx context.Context, session string) error
	Expired() <-chan state.Lease
	ClaimEnd(ctx context.Context, session string) (bool, error)
	Leases(yield func(state.Lease) bool)
	LeasesWhere(match func(state.Head) bool, yield func(state.Lease) bool)
	Held(instance string) int
	Gateways(network string) []state.Presence
	Ask(ctx context.Context, instance string, msg []byte) ([]byte, error)
}

// Verifier is what sessions need of [claims.Verifier]: the one whose issuers may admit jobs.
type Verifier interface {
	Verify(ctx context.Context, token, audience string) (*claims.Claims, error)
	VerifyIf(ctx context.Context, token, audience string, look func(unverified *claims.Claims) error) (*claims.Claims, error)
}

// Rules are what decides about sessions; a reload replaces them as a whole.
type Rules struct {
	Config   *config.Config
	Verifier Verifier
	Relays   []wire.Relay // as they are listed to clients, this node's own first
}

// Options configure a [Manager].
type Options struct {
	Store  Store
	Rules  Rules
	Audit  Auditor // nil: nothing is recorded
	Limits Limits
	Logger *slog.Logger
	// TicketKey signs relay tickets. Without one no session is given a relay.
	TicketKey ed25519.PrivateKey

	OfferTimeout time.Duration    // how long one gateway may think about an offer or a renewal; default 5 s
	MaxOffers    int              // how many gateways are asked for one join; default 3
	Afterlife    time.Duration    // how long an ended session is remembered for a gateway that missed the word; default 60 s
	Now          func() time.Time // default time.Now
}

// Validate fills defaults and reports what is missing.
func (o *Options) Validate() error {
	if o.Store == nil || o.Rules.Config == nil || o.Rules.Verifier == nil {
		return errors.New("a session manager needs a store, a configuration and a verifier")
	}
	if o.Audit == nil {
		o.Audit = noAudit{}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	o.Limits.defaults()
	if o.OfferTimeout <= 0 {
		o.OfferTimeout = 5 * time.Second
	}
	if o.MaxOffers <= 0 {
		o.MaxOffers = 3
	}
	if o.Afterlife <= 0 {
		o.Afterlife = time.Minute
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return nil
}

// Manager leads the sessions of all networks through their lives. It is safe for concurrent use and starts no
// goroutine. Where a session stands is in the store, so that any node can go on with it:
//
//	         token, policy, address
//	Join ──────────────────────────► offered ──── no gateway takes it ────► (lease freed)
//	                                    │
//	                     a gateway's answer; lease names it (see named)
//	                                    ▼
//	Reconcile ────── adopted ───────► held ◄──── renewed (by PATCH, or by the gateway's word)
//	(unknown here, held there)          │   ▲ its standby takes over: by the client's choice, or when the first is gone
//	          ┌──────────────┬──────────┼───────────────────┐
//	     not renewed     DELETE by   policy gives      gateway says end,
//	          │          its owner   less than held    or came back without it
//	          ▼              └────┬─────┘                   │
//	    (lease expires)           ▼                         ▼
//	                            over ── Afterlife ──► (lease freed)
//
// A session that is over keeps lease and address for a while, so that a gateway that was away when it ended learns of it
// on reconnect, and nobody else gets an address that it may still be serving.
type Manager struct {
	opts   Options
	log    *slog.Logger
	rules  atomic.Pointer[Rules]
	joins  joins
	placed placements
	turns  chan struct{} // of renewals in the tunnel, to write to the state; see Renewed

	mu         sync.Mutex
	offered    map[string]*offered // sessions of this node's joins that no gateway has answered for yet
	ended      map[string]ended    // sessions that ended lately; see remember
	endedOrder []string            // the oldest first
}

// offered collects what comes in for a session while it is offered.
type offered struct {
	candidates []wire.Candidate
	mapping    wire.Mapping
}

// later is what has come in, and whether that is anything.
func (o *offered) later(id string) (t wire.Trickle, ok bool) {
	if o == nil || len(o.candidates) == 0 && o.mapping == wire.MappingUnknown {
		return t, false
	}
	return wire.Trickle{Session: id, Candidates: o.candidates, Mapping: o.mapping}, true
}

// New makes a manager.
func New(opts Options) (*Manager, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	m := &Manager{opts: opts, log: opts.Logger, offered: map[string]*offered{}, ended: map[string]ended{}, joins: opts.Limits.tables(), turns: make(chan struct{}, renewalsAtOnce)}
	m.rules.Store(&opts.Rules)
	return m, nil
}

// Rules gives what decides at this moment.
func (m *Manager) Rules() Rules { return *m.rules.Load() }

// pool is where a network's sessions get their addresses.
func pool(n config.Network) state.Pool {
	return state.Pool{V4: n.Sessions, V6: config.Overlay6}
}

// deadline is when a lease given now runs out: after one lease, but never past the session's end.
func (m *Manager) deadline(lease time.Duration, ends time.Time) time.Time {
	if at := m.opts.Now().Add(lease); at.Before(ends) {
		return at
	}
	return ends
}
