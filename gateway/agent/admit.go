package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/culvertnet/culvert/gateway/names"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/tunnel"
	"github.com/culvertnet/culvert/internal/wire"
)

// Bounds on what an offer may carry, whatever its frame could hold.
const (
	maxGrants = 4096
	maxText   = 1024 // one allow line or rule name, in bytes
)

// opener opens a session's place in the data plane.
type opener interface {
	open(id string, key wire.Key, addrs []netip.Addr, r reach, scope *policy.Scope) (carrier, error)
	addresses() []netip.Addr // the gateway's own in the overlay
	services() names.Ranges  // where granted names have their addresses
}

// reach is how a session's client may be reached.
type reach struct {
	candidates []wire.Candidate
	relays     []tunnel.Grant
	way        string // what path checks and relays call the session, where that is not its id
}

// door admits, renews and ends sessions.
type door struct {
	name    string
	key     wire.Key
	judge   *judge
	table   *table
	plane   opener
	own     *ownAddrs
	log     *slog.Logger
	metrics *metrics
	places  chan struct{} // verifications under way
	rate    *rate.Limiter
	told    atomic.Pointer[[]netip.Prefix] // the network's own ranges, where the coordinator has said them

	// candidates are the gateway's own at this moment, and what its NAT does.
	candidates func() ([]wire.Candidate, wire.Mapping)
	// grants are the relays of an offer that the gateway may use, with its tickets.
	grants   func(ctx context.Context, in []wire.RelayGrant, ends time.Time) []tunnel.Grant
	draining draining
	// taken tells the coordinator that a session for which this gateway stood by is carried by it now.
	taken func(wire.Taken)
	// renewed passes a renewal that came through the tunnel on to the coordinator.
	renewed func(wire.Renewed)
}

var errBusy = problem.New(problem.RateLimited, "the gateway is verifying as many tokens as it may", "try again in a few seconds")

// admit judges an offer and, where it holds, puts the session in place.
func (d *door) admit(ctx context.Context, o wire.Offer) (wire.Answer, error) {
	s, err := d.tryAdmit(ctx, o)
	if err != nil {
		d.refused("offer refused", bounded(o.Session), s, err)
		return wire.Answer{}, err
	}
	d.metrics.admitted.Add(1)
	lease := d.table.leaseOf(s)
	candidates, mapping := d.candidates()
	d.log.Info("session admitted", "session", s.id, "repository", s.repo, "run_id", s.who.run, "addr", s.addrs[0], "standby", o.Standby,
		"rule", s.rules, "expires", lease.Expires, "ends", lease.Ends)
	routes, named := d.reach(s)
	return wire.Answer{Lease: &lease, Gateway: &wire.Gateway{
		Name: d.name, Key: d.key, Addresses: d.plane.addresses(), Candidates: candidates, Mapping: mapping, Routes: routes, Names: named,
	}}, nil
}

// tryAdmit gives the session also where it is refused after its token was verified, so that the log can say whose it was.
func (d *door) tryAdmit(ctx context.Context, o wire.Offer) (*session, error) {
	addrs, offered, err := d.checkOffer(o)
	if err != nil {
		return nil, err
	}
	if o.Standby {
		d.table.displace(o.Session)
	}
	done, err := d.table.arrive(o.Session)
	if err != nil {
		return nil, err
	}
	defer done()
	c, err := d.verify(ctx, o.Key, o.Token)
	if err != nil {
		return nil, err
	}
	s := d.newSession(o, addrs, offered, c)
	r := reach{candidates: saneCandidates(o.Candidates), relays: d.grants(ctx, o.Relays, s.ends)}
	if o.Standby {
		r.way = wire.StandbyID(o.Key, d.key)
	}
	if err := d.install(s, r); err != nil {
		d.table.end(s, "refused")
		return s, err
	}
	return s, nil
}

// refused logs and counts a refusal; s is nil where nothing about the job is verified. The cause is for the log alone, which no session
// fills.
func (d *door) refused(what, id string, s *session, err error) {
	p := problem.From(err)
	d.metrics.refused(p)
	if s != nil && !s.said.Allow() {
		return
	}
	args := []any{"session", id, "code", p.Code, "err", p.Message}
	if p.Err != nil {
		args = append(args, "cause", p.Err)
	}
	if s != nil {
		args = append(args, "repository", s.repo, "run_id", s.who.run)
	}
	d.log.Warn(what, args...)
}

// checkOffer bounds an offer before anything in it is believed.
func (d *door) checkOffer(o wire.Offer) ([]netip.Addr, *policy.Grant, error) {
	bad := func(what string) error {
		return problem.New(problem.BadRequest, "the coordinator's offer "+what, "update coordinator and gateway to the same version")
	}
	switch {
	case o.Key.IsZero() || o.Session != o.Key.SessionID():
		return nil, nil, bad("names a session that is not its key's")
	case o.Key == d.key:
		return nil, nil, bad("is for the gateway's own key")
	case len(o.Candidates) > wire.MaxCandidates:
		return nil, nil, bad(fmt.Sprintf("has more than %d candidates", wire.MaxCandidates))
	case len(o.Relays) > wire.MaxRelays:
		return nil, nil, bad(fmt.Sprintf("has more than %d relays", wire.MaxRelays))
	case len(o.Grants) == 0 || len(o.Grants) > maxGrants:
		return nil, nil, bad(fmt.Sprintf("has not between 1 and %d grants", maxGrants))
	case slices.ContainsFunc(o.Grants, func(g wire.Grant) bool { return max(len(g.Allow), len(g.Observe), len(g.Rule)) > maxText }):
		return nil, nil, bad(fmt.Sprintf("has a grant of more than %d bytes", maxText))
	case o.Lease < 0 || o.MaxSession < 0:
		return nil, nil, bad("has a negative duration")
	}
	addrs, err := pair(o.Addresses)
	if err != nil {
		return nil, nil, bad("has addresses that are " + err.Error())
	}
	for _, a := range addrs {
		if slices.Contains(d.plane.addresses(), a) || d.own.has(a) {
			return nil, nil, bad("gives the session an address of the gateway itself")
		}
	}
	offered, err := policy.ParseGrant(o.Grants)
	if err != nil {
		return nil, nil, problem.Wrap(err, problem.BadRequest, "the coordinator's offer has a grant that does not parse",
			"update coordinator and gateway to the same version")
	}
	return addrs, offered, nil
}

// verify judges a token within the limits on verifications.
func (d *door) verify(ctx context.Context, key wire.Key, token wire.Secret) (*claims.Claims, error) {
	if !d.rate.Allow() {
		return nil, errBusy
	}
	select {
	case d.places <- struct{}{}:
		defer func() { <-d.places }()
	default:
		return nil, errBusy
	}
	return d.judge.verify(ctx, key, token)
}

func (d *door) newSession(o wire.Offer, addrs []netip.Addr, offered *policy.Grant, c *claims.Claims) *session {
	now := time.Now()
	lease := time.Duration(o.Lease)
	if lease == 0 {
		lease = defaultLease
	}
	longest := time.Duration(o.MaxSession)
	if longest == 0 {
		longest = policy.DefaultMaxSession
	}
	s := &session{
		id: o.Session, key: o.Key, addrs: addrs, grants: o.Grants, offered: offered,
		who: identify(c), repo: c.Repository, claims: c,
		standby: o.Standby,
		lease:   min(max(lease, minLease), maxLease), admitted: now, ends: now.Add(longest),
		questions: rate.NewLimiter(questionRate, questionBurst),
		renewals:  rate.NewLimiter(rate.Every(time.Second), 5),
		reaches:   rate.NewLimiter(20, 64),
		tries:     make(chan struct{}, 16),
		said:      rate.NewLimiter(lineRate, lineBurst),
	}
	for _, g := range o.Grants {
		if !slices.Contains(s.rules, g.Rule) {
			s.rules = append(s.rules, g.Rule)
		}
	}
	return s
}

// install holds a session against the gateway's pins and opens it.
func (d *door) install(s *session, r reach) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	rule, err := d.judge.rule(s.claims)
	if err != nil {
		return err
	}
	s.ends = earlier(s.ends, rule.end(s.admitted))
	s.expires = earlier(s.admitted.Add(s.lease), s.ends)
	s.policy, s.scope = rule.policy, d.scope(s.offered, rule.local)
	if rule.local != nil && s.scope.Empty() {
		return problem.New(problem.GatewayRefused, "the gateway's own policy gives this job nothing of what the coordinator's gives",
			"make the gateway's --policy file and the coordinator's rules agree")
	}
	if err := d.table.reserve(s); err != nil {
		return err
	}
	carrier, err := d.plane.open(s.id, s.key, s.addrs, r, s.scope)
	if err != nil {
		return problem.Wrap(err, problem.GatewayRefused, "the gateway cannot carry the session",
			"look at the gateway's log for the cause")
	}
	s.carrier = carrier
	if s.standby {
		carrier.AwaitNames()
	}
	late, ok := d.table.open(s)
	if !ok {
		return errOver // whoever ended it waits for s.mu and closes the carrier
	}
	if len(late) > 0 {
		carrier.AddCandidates(saneCandidates(late))
	}
	if rule.policy != d.judge.policy.Load() { // a new file came meanwhile
		return d.rejudge(s)
	}
	return nil
}

// ranges are the overlay's: the defaults, and what the coordinator says. Naming more only denies more.
func (d *door) ranges() []netip.Prefix {
	if told := d.told.Load(); told != nil {
		return append(slices.Clone(overlay), *told...)
	}
	return overlay
}

func (d *door) scope(offered, local *policy.Grant) *policy.Scope {
	return &policy.Scope{
		Offered: offered, Local: local, Own: d.own.has,
		Overlay: append(hostPrefixes(d.plane.addresses()), d.ranges()...),
	}
}

// renew extends a session's lease by a fresh token of the same run. It returns the lease as given.
func (d *door) renew(ctx context.Context, s *session, token wire.Secret) (wire.Lease, error) {
	lease, err := d.tryRenew(ctx, s, token)
	if err != nil {
		d.refused("renewal refused", s.id, s, err)
		return wire.Lease{}, err
	}
	d.metrics.renewals.Add(1)
	d.log.Info("session renewed", "session", s.id, "repository", s.repo, "run_id", s.who.run, "expires", lease.Expires)
	return lease, nil
}

func (d *door) tryRenew(ctx context.Context, s *session, token wire.Secret) (wire.Lease, error) {
	if !s.renewals.Allow() {
		return wire.Lease{}, problem.New(problem.RateLimited, "the session renews too often", "renew once in a third of the lease")
	}
	c, err := d.verify(ctx, s.key, token)
	if err != nil {
		return wire.Lease{}, err
	}
	if identify(c) != s.who {
		return wire.Lease{}, problem.New(problem.GatewayRefused, "the token is for another run than the session",
			"renew with a token of the job that joined")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	ends, err := d.apply(s, c)
	if err != nil {
		return wire.Lease{}, err
	}
	s.claims = c
	return d.table.extend(s, ends)
}

// apply holds a session against the gateway's pins as they are now and gives it that scope. It returns when the session
// must end. s.mu is held.
func (d *door) apply(s *session, c *claims.Claims) (ends time.Time, err error) {
	r, err := d.judge.rule(c)
	if err != nil {
		return time.Time{}, err
	}
	s.policy, s.scope = r.policy, d.scope(s.offered, r.local)
	if s.carrier != nil && !d.table.isGone(s) {
		s.carrier.SetScope(s.scope)
	}
	return r.end(s.admitted), nil
}

// rejudge applies a changed policy of the gateway's own to a session. s.mu is held. The error says that the session must end.
func (d *door) rejudge(s *session) error {
	ends, err := d.apply(s, s.claims)
	if err != nil {
		return err
	}
	d.table.bound(s, ends)
	return nil
}

// rejudgeAll applies a changed policy to every session and ends those that it no longer admits.
func (d *door) rejudgeAll() {
	for _, s := range d.table.all() {
		s.mu.Lock()
		err := d.rejudge(s)
		s.mu.Unlock()
		if err != nil {
			d.table.end(s, "the gateway's policy no longer admits it")
		}
	}
}

// refusal encodes an error for an [wire.Answer].
func refusal(err error) wire.Answer {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		err = problem.Wrap(err, problem.Timeout, "the gateway could not verify the token in time", "try again")
	}
	doc, merr := problem.From(err).MarshalJSON()
	if merr != nil {
		doc = []byte(`{"code":"failed","detail":"the gateway refused"}`)
	}
	return wire.Answer{Problem: doc}
}
