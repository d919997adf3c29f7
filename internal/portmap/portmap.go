// Package portmap asks the router in front of a gateway to forward a UDP port to it: by PCP (RFC 6887), NAT-PMP (RFC 6886) or
// UPnP IGD, whichever the router speaks.
//
// The router is a stranger. It is asked only at the address to which the default route leads, whatever it names itself is
// refused unless it is at that address, everything it says is bounded in size and time, and an external address that
// nobody on the internet could reach is no candidate.
//
//	New ──► Run: idle ──route──► discover ──answer──► add ──routable──► held ──ctx──► remove
//	          ▲                     │                  │                 │
//	          └──── Retry, Refresh ─┴──── nothing ─────┴── lost ◄────────┘
package portmap

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/culvertnet/culvert/internal/wire"
)

const (
	probeTimeout  = 3 * time.Second // for a router to say what it speaks
	addTimeout    = 6 * time.Second // for a mapping to be made
	removeTimeout = 2 * time.Second // for it to be removed at the end
	minLifetime   = 2 * time.Minute // RFC 6887, section 15: shorter ones would be all renewal
	minPause      = 5 * time.Second // between two looks at a mapping
	maxFailures   = 3               // renewals that may fail before the router is asked anew
)

// Options configure a [Manager]. Port is required.
type Options struct {
	// Port is the UDP port on this host that packets shall be forwarded to. The same is asked for outside.
	Port uint16
	// Lifetime is how long a mapping is asked for, and lives on if this process is killed; default 20 min.
	Lifetime time.Duration
	// Check is how often a mapping is looked after, because routers restart and forget; default 2 min.
	Check time.Duration
	// Retry is how long a router that forwards nothing is left alone; default 10 min.
	Retry time.Duration
	// OnChange is called without any lock when [Manager.Candidate] would answer differently. It must not block.
	OnChange func()
	// Route gives the router and this host's address towards it; default [DefaultRouter].
	Route  func() (router, self netip.Addr, err error)
	Logger *slog.Logger
}

// Validate checks the options and fills defaults.
func (o *Options) Validate() error {
	if o.Port == 0 {
		return errors.New("a port mapping needs a port")
	}
	o.Lifetime = cmp.Or(o.Lifetime, 20*time.Minute)
	o.Check = cmp.Or(o.Check, 2*time.Minute)
	o.Retry = cmp.Or(o.Retry, 10*time.Minute)
	if o.Lifetime < minLifetime || o.Check <= 0 || o.Retry <= 0 {
		return fmt.Errorf("a mapping lives for %v at least, and looking after it takes time", minLifetime)
	}
	if o.OnChange == nil {
		o.OnChange = func() {}
	}
	if o.Route == nil {
		o.Route = DefaultRouter
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// request is what is asked of a router.
type request struct {
	self     netip.Addr
	port     uint16
	external netip.AddrPort // what was given before; only a wish. The zero value wishes for port on any address
	lifetime time.Duration
}

// wish is the external port to ask for.
func (r request) wish() uint16 { return cmp.Or(r.external.Port(), r.port) }

// mapping is what a router gave.
type mapping struct {
	external netip.AddrPort
	lifetime time.Duration // 0: until the router restarts
}

// method is a protocol that a router has been found to speak.
type method interface {
	name() string
	// add makes a mapping, or renews the one that r.external names.
	add(ctx context.Context, r request) (mapping, error)
	// verify reports an error unless the mapping is in place, without writing where the protocol can tell.
	verify(ctx context.Context, r request, m mapping) (mapping, error)
	remove(ctx context.Context, r request, m mapping) error
}

// Manager keeps one port mapping. [Manager.Run] does the work.
type Manager struct {
	opts     Options
	log      *slog.Logger
	discover func(ctx context.Context, router, self netip.Addr) []method
	kick     chan struct{} // capacity 1: the network may have changed

	mu  sync.Mutex
	now netip.AddrPort // invalid while there is no mapping
}

// New makes a manager.
func New(opts Options) (*Manager, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	return &Manager{opts: opts, log: opts.Logger, discover: discover, kick: make(chan struct{}, 1)}, nil
}

// Candidate gives the mapped address, while there is one.
func (m *Manager) Candidate() (wire.Candidate, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return wire.Candidate{Kind: wire.Mapped, Addr: m.now}, m.now.IsValid()
}

// Refresh has the router looked at now, because the network may have changed. It does not wait.
func (m *Manager) Refresh() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// Run keeps a mapping until ctx ends, and removes it then, which takes 2 s at most.
func (m *Manager) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if h := m.acquire(ctx); h != nil {
			if m.keep(ctx, h) {
				continue // lost: look for another at once
			}
		}
		m.sleep(ctx, m.opts.Retry)
	}
}

// held is a mapping and where it came from.
type held struct {
	method
	router netip.Addr
	req    request
	now    mapping
	until  time.Time // zero: for good
	renew  time.Time // when half of its time is over
}

// acquire finds the router and asks it for a mapping; nil where there is none to be had.
func (m *Manager) acquire(ctx context.Context) *held {
	router, self, err := m.opts.Route()
	if err != nil {
		m.log.Debug("no router to ask for a port mapping", "err", err)
		return nil
	}
	if Routable(self) {
		m.log.Debug("no port mapping is needed on a public address", "addr", self)
		return nil
	}
	methods := m.discover(ctx, router, self)
	if len(methods) == 0 {
		m.log.Debug("the router maps no ports", "addr", router)
	}
	for _, how := range methods {
		h := &held{method: how, router: router, req: request{self: self, port: m.opts.Port, lifetime: m.opts.Lifetime}}
		if err := m.add(ctx, h); err == nil {
			return h
		} else if ctx.Err() == nil {
			m.log.Info("the router does not map the port", "method", how.name(), "addr", router, "err", bounded(err))
		}
	}
	return nil
}

// add makes or renews the mapping and publishes it. A mapping that is of no use is removed again.
func (m *Manager) add(ctx context.Context, h *held) error {
	ctx, cancel := context.WithTimeout(ctx, addTimeout)
	defer cancel()
	got, err := h.add(ctx, h.req)
	if err != nil {
		return err
	}
	if !Routable(got.external.Addr()) || got.external.Port() == 0 {
		m.remove(ctx, h, got)
		return fmt.Errorf("the router's external address %s is not one that the internet reaches: there is another NAT behind it", got.external)
	}
	m.take(h, got)
	return nil
}

// take notes what the router gave.
func (m *Manager) take(h *held, got mapping) {
	first, now := !h.now.external.IsValid(), time.Now()
	h.now, h.req.external, h.until = got, got.external, time.Time{}
	life := m.opts.Lifetime
	if got.lifetime > 0 { // what a router promises beyond what was asked for is no promise of ours
		life = min(life, got.lifetime)
		h.until = now.Add(life)
	}
	h.renew = now.Add(life / 2)
	if m.publish(got.external) && first {
		m.log.Info("the router maps a port", "method", h.name(), "addr", h.router, "mapped", got.external, "lifetime", life)
	}
}

// publish sets the candidate and reports whether it differs from the last.
func (m *Manager) publish(addr netip.AddrPort) bool {
	m.mu.Lock()
	changed := m.now != addr
	m.now = addr
	m.mu.Unlock()
	if changed {
		m.opts.OnChange()
	}
	return changed
}

// keep looks after a mapping until ctx ends, and then removes it, or until it is lost, which it reports.
func (m *Manager) keep(ctx context.Context, h *held) (lost bool) {
	defer m.publish(netip.AddrPort{})
	failures := 0
	for {
		kicked := m.sleep(ctx, m.pause(h, failures))
		if ctx.Err() != nil {
			m.remove(ctx, h, h.now)
			return false
		}
		if kicked && m.moved(h) {
			return true
		}
		err := m.tend(ctx, h)
		switch {
		case ctx.Err() != nil: // seen to above
		case err == nil:
			failures = 0
		default:
			failures++
			m.log.Debug("a port mapping could not be looked after", "method", h.name(), "addr", h.router, "err", bounded(err))
			if failures >= maxFailures || !h.until.IsZero() && !time.Now().Before(h.until) {
				m.log.Warn("the router no longer maps the port", "method", h.name(), "addr", h.router, "mapped", h.now.external, "err", bounded(err))
				return true
			}
		}
	}
}

// pause is how long a mapping can be left alone: less after a failure, and not beyond its half life, but never so short that
// a router's strange ideas of time would keep us busy.
func (m *Manager) pause(h *held, failures int) time.Duration {
	d := m.opts.Check
	if failures > 0 {
		d = min(d, time.Duration(failures)*minPause)
	}
	return max(min(d, time.Until(h.renew)), minPause)
}

// moved reports whether the way out is another one: the old router cannot be asked any more.
func (m *Manager) moved(h *held) bool {
	router, self, err := m.opts.Route()
	return err != nil || router != h.router || self != h.req.self
}

// tend renews a mapping that is due, and else makes sure that it is there.
func (m *Manager) tend(ctx context.Context, h *held) error {
	if time.Now().Before(h.renew) {
		ctx, cancel := context.WithTimeout(ctx, addTimeout)
		defer cancel()
		got, err := h.verify(ctx, h.req, h.now)
		if err == nil && got.external == h.now.external {
			return nil
		}
	}
	return m.add(ctx, h)
}

// remove takes a mapping back, also when ctx has ended.
func (m *Manager) remove(ctx context.Context, h *held, what mapping) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	if err := h.remove(ctx, h.req, what); err != nil {
		m.log.Info("the router keeps the port mapping until it runs out", "method", h.name(), "addr", h.router, "err", bounded(err))
	}
}

// sleep waits for d, a kick or the end of ctx, and reports a kick.
func (m *Manager) sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	case <-m.kick:
		return true
	}
	return false
}

// discover asks a router in all protocols at once which it speaks, and gives those in the order in which they are
// best used: what tells most and needs least comes first.
func discover(ctx context.Context, router, self netip.Addr) []method {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	probes := []func(context.Context, netip.Addr, netip.Addr) (method, error){probePCP, probeNATPMP, probeUPnP}
	found := make([]method, len(probes))
	var wg sync.WaitGroup
	for i, probe := range probes {
		wg.Go(func() {
			if m, err := probe(ctx, router, self); err == nil {
				found[i] = m
			}
		})
	}
	wg.Wait()
	return slices.DeleteFunc(found, func(m method) bool { return m == nil })
}

// bounded cuts what a router made an error say to what a log line may hold.
func bounded(err error) string {
	const most = 200
	s := fmt.Sprintf("%.*q", most, err.Error()) // quoted: it may hold anything
	return s[1 : len(s)-1]
}
