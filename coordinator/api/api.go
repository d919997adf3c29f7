// Package api is the coordinator's HTTP API: sessions, the gateways' streams and health, with errors as RFC 9457 problems.
package api

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-chi/chi/v5"
	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/downloads"
	"github.com/culvertnet/culvert/coordinator/limit"
	"github.com/culvertnet/culvert/coordinator/session"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/wire"
)

// Sessions is what the API needs of [session.Manager].
type Sessions interface {
	Join(ctx context.Context, j session.Join) (wire.Session, error)
	Update(ctx context.Context, id string, secret wire.Secret, u wire.Update) (wire.Lease, error)
	Standby(ctx context.Context, id string, secret wire.Secret, r wire.StandbyRequest) (wire.Standby, error)
	End(ctx context.Context, id string, secret wire.Secret) error
	Reconcile(ctx context.Context, g session.Gateway, held []wire.Held) (over []string, err error)
	Renewed(ctx context.Context, g session.Gateway, r wire.Renewed) error
	Ended(ctx context.Context, g session.Gateway, e wire.End) error
	Taken(ctx context.Context, g session.Gateway, t wire.Taken) error
	Flows(ctx context.Context, g session.Gateway, f wire.Flows) error
	Held(instance string) int
}

// Presences is what the API needs of [state.Store].
type Presences interface {
	Ready(ctx context.Context) error
	PutPresence(ctx context.Context, p state.Presence, ttl time.Duration) error
	DropPresence(ctx context.Context, instance string) error
	RememberGateway(ctx context.Context, network, name string, key wire.Key) (before wire.Key, err error)
	Serve(instance string, handle func(ctx context.Context, msg []byte) []byte) (stop func(), err error)
}

// Identities is what the API needs of [claims.Verifier]: the one for gateways' workload identities. Its issuers never
// admit jobs.
type Identities interface {
	Verify(ctx context.Context, token, audience string) (*claims.Claims, error)
}

// Rules are what decides about gateways, and what they and clients are told; a reload replaces them as a whole.
type Rules struct {
	Config     *config.Config
	Identities Identities
	STUN       []string     // "host:port"; an empty host means the coordinator's own
	Relays     []wire.Relay // this node's own first
}

// tellTheSame reports whether gateways need not be told anew.
func (r *Rules) tellTheSame(other *Rules) bool {
	return slices.Equal(r.STUN, other.STUN) && slices.Equal(r.Relays, other.Relays)
}

// Options configure an [API].
type Options struct {
	Sessions Sessions
	Store    Presences
	Audit    Auditor  // nil: nothing is recorded
	Metrics  *Metrics // nil: none
	Rules    Rules
	Logger   *slog.Logger
	// TicketKey is the public key of relay tickets as relay.yaml takes it.
	TicketKey string
	// Standing gives a gateway the ticket with which it keeps WebSockets to relays ready; nil: none.
	Standing func(gateway wire.Key) (wire.Standing, error)
	// Relay serves this node's own relay over WebSocket; nil where it has none.
	Relay http.Handler

	TrustedProxies []netip.Prefix // whose X-Forwarded-For is believed
	Rate           rate.Limit     // requests a second from one address (IPv6: one /64); default 100, because runners share NATs
	Burst          int            // and how many at once; default 1000
	FailureRate    rate.Limit     // credentials from one address that are not believed, a second; default 5
	FailureBurst   int            // and how many at once; default 500, which is two matrices of jobs with the same mistake
	MaxAddresses   int            // addresses remembered for that; default 65536
	MaxJoins       int            // joins in progress at once; default 2048

	BodyTimeout   time.Duration    // for a request's body to arrive; default 10 s
	JoinTimeout   time.Duration    // for a join in all; default 20 s
	HelloTimeout  time.Duration    // for a gateway to introduce itself; default 10 s
	AnswerTimeout time.Duration    // for a gateway to answer an offer or a renewal; default 5 s
	PingEvery     time.Duration    // and as long to answer it; default 10 s
	PresenceEvery time.Duration    // how often a gateway is said to be live; default 5 s
	PresenceTTL   time.Duration    // and how long that holds; default 15 s
	ExpiryLeeway  time.Duration    // for a gateway to prove again who it is after its identity token has expired; default 60 s
	Now           func() time.Time // for a credential's expiry; default time.Now
	Queue         int              // frames that may wait for a slow gateway before its stream is dropped; default 256
}

// Validate fills defaults and reports what is missing.
func (o *Options) Validate() error {
	if o.Sessions == nil || o.Store == nil || o.Rules.Config == nil || o.Rules.Identities == nil {
		return errors.New("the API needs sessions, a store, a configuration and a verifier of identities")
	}
	if o.Audit == nil {
		o.Audit = noAudit{}
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	orElse(&o.Rate, 100)
	orElse(&o.Burst, 1000)
	orElse(&o.FailureRate, 5)
	orElse(&o.FailureBurst, 500)
	orElse(&o.MaxAddresses, 1<<16)
	orElse(&o.MaxJoins, 2048)
	orElse(&o.BodyTimeout, 10*time.Second)
	orElse(&o.JoinTimeout, 20*time.Second)
	orElse(&o.HelloTimeout, 10*time.Second)
	orElse(&o.AnswerTimeout, 5*time.Second)
	orElse(&o.PingEvery, 10*time.Second)
	orElse(&o.PresenceEvery, 5*time.Second)
	orElse(&o.PresenceTTL, 15*time.Second)
	orElse(&o.ExpiryLeeway, time.Minute)
	if o.Now == nil {
		o.Now = time.Now
	}
	orElse(&o.Queue, 256)
	return nil
}

func orElse[T ~int | ~int64 | ~float64](v *T, otherwise T) {
	if *v <= 0 {
		*v = otherwise
	}
}

// API serves HTTP and holds the gateways' streams.
type API struct {
	opts     Options
	log      *slog.Logger
	rules    atomic.Pointer[Rules]
	router   http.Handler
	limits   *limit.Table[netip.Prefix]
	failures *limit.Table[netip.Prefix] // of credentials that were not believed
	joins    chan struct{}              // one token for each join in progress
	ledgers  ledgers
	leaving  atomic.Bool
	draining atomic.Bool
	ready    readiness
	releases *downloads.Handler
	warned   rate.Sometimes // of requests over the rate, or whoever sends them would write the log at will

	mu      sync.Mutex
	all     map[*stream]struct{} // from the upgrade on
	streams map[string]*stream   // introduced ones, by gateway instance
	closed  bool
	running sync.WaitGroup // streams
}

// New makes an API. Close must be called when it has served.
func New(opts Options) (*API, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	a := &API{
		opts:     opts,
		log:      opts.Logger,
		limits:   limit.New[netip.Prefix](opts.Rate, opts.Burst, opts.MaxAddresses),
		failures: limit.New[netip.Prefix](opts.FailureRate, opts.FailureBurst, opts.MaxAddresses),
		joins:    make(chan struct{}, opts.MaxJoins),
		warned:   rate.Sometimes{First: 1, Interval: time.Second},
		all:      map[*stream]struct{}{},
		streams:  map[string]*stream{},
	}
	a.rules.Store(&opts.Rules)
	a.releases = downloads.New(func() string { return a.rules.Load().Config.Downloads }, a.log)
	a.router = a.routes()
	return a, nil
}

// ServeHTTP serves the API.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) { a.router.ServeHTTP(w, r) }

func (a *API) routes() http.Handler {
	r := chi.NewRouter()
	r.Use(a.counted, a.recovered, a.secured, a.clientIP())
	r.NotFound(notFound)
	r.MethodNotAllowed(wrongMethod)
	r.Get("/healthz", a.healthz)
	r.Get("/readyz", a.readyz)
	r.Group(func(r chi.Router) {
		r.Use(a.limited)
		r.Get("/openapi.json", a.document)
		r.Get(wire.PathInfo, a.info)
		r.Post(wire.PathSessions, a.join)
		r.Patch(wire.PathSessions+"/{id}", a.update)
		r.Delete(wire.PathSessions+"/{id}", a.end)
		r.Post(wire.PathSessions+"/{id}"+wire.PathStandby, a.standby)
		r.Get(wire.PathGateway, a.gateway)
		r.Get(downloads.Path, a.download)
		if a.opts.Relay != nil {
			r.Get(wire.PathRelay, a.relay)
		}
	})
	return r
}

// Leave reports not ready, while everything is still served: whoever sends requests here is to send them elsewhere.
func (a *API) Leave() { a.leaving.Store(true) }

// Drain refuses new joins and gateways and reports not ready, while those in progress go on.
func (a *API) Drain() { a.draining.Store(true) }

// Draining reports whether Drain was called.
func (a *API) Draining() bool { return a.draining.Load() }

// Close ends all streams with "going away" and waits for them. No new one opens.
func (a *API) Close() {
	a.Drain()
	a.mu.Lock()
	a.closed = true
	for s := range a.all {
		s.end(goingAway)
	}
	a.mu.Unlock()
	a.running.Wait()
}

// SetRules puts a changed configuration into force and drops the gateways whose enrolment is gone. Where STUN servers or
// relays have changed, all come back to be told.
func (a *API) SetRules(rules Rules) {
	before := a.rules.Swap(&rules)
	a.mu.Lock()
	defer a.mu.Unlock()
	for s := range a.all {
		switch {
		case !s.enrolledIn(rules.Config):
			s.end(unenrolled)
		case !rules.tellTheSame(before):
			s.end(changed)
		}
	}
}
