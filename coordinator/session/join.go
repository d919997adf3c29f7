package session

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"github.com/culvertnet/culvert/coordinator/config"
	"github.com/culvertnet/culvert/coordinator/state"
	"github.com/culvertnet/culvert/internal/claims"
	"github.com/culvertnet/culvert/internal/policy"
	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// offerSlack is how much longer than all its offers a lease lives that no gateway has answered for.
const offerSlack = 10 * time.Second

// Join is one request for a session.
type Join struct {
	wire.JoinRequest
	From netip.Addr // where it came from, for the log
	// Admitted, where set, is told of the session as soon as policy has said yes and its addresses are known, while the
	// first gateway is being asked. An error of it ends the join.
	Admitted func(wire.Session) error
}

// admission is a join that policy has said yes to.
type admission struct {
	join     *Join
	rules    Rules
	network  config.Network
	claims   *claims.Claims
	decision policy.Decision
	secret   wire.Secret
	lease    state.Lease
	relays   []wire.Relay      // that both sides get tickets for
	way      string            // what the tickets are for; "" for the session itself
	standby  bool              // another gateway carries the session
	several  bool              // the network has more than one gateway
	asked    string            // the gateway that was asked last, and did not take it; it may think otherwise
	named    bool              // the lease names the gateway that is being asked, and lasts as if that had said yes: one write for a join
	tickets  []wire.RelayGrant // the client's
	logger   *slog.Logger      // see log
	known    []any             // what it says of the job with every line
}

// log gives a logger that names the job. It is made when there is something to say: to make it costs more than the line, and most joins have none.
func (a *admission) log() *slog.Logger { return a.logger.With(a.known...) }

// Join verifies the token, asks policy, gives addresses, and offers the session to the network's best gateways until one
// takes it. Errors are *problem.Error.
func (m *Manager) Join(ctx context.Context, j Join) (wire.Session, error) {
	id := j.Key.SessionID()
	a := &admission{join: &j, logger: m.log, known: []any{"session", id, "addr", j.From}}
	if err := m.admit(ctx, a); err != nil {
		return wire.Session{}, m.refused(ctx, a, err)
	}
	gateways := m.opts.Store.Gateways(a.join.Network)
	if len(gateways) == 0 {
		return wire.Session{}, m.refused(ctx, a, problem.New(problem.NoGateway,
			fmt.Sprintf("no gateway of network %q is connected", a.join.Network), "start one, or look at its log for why it cannot connect"))
	}
	a.several = len(gateways) > 1
	gateways = m.spread(id, gateways)
	if !m.beginOffer(id) { // before there is a lease: one that nobody offers and no gateway holds is ended
		return wire.Session{}, m.refused(ctx, a, keyInUse(nil))
	}
	defer m.dropOffer(id)
	if err := m.createLease(ctx, a, gateways[0]); err != nil {
		return wire.Session{}, m.refused(ctx, a, err)
	}
	safe := m.opts.Store.Saving() // while the record is stored
	if err := m.recordJoin(ctx, a, gateways[0]); err != nil {
		m.free(ctx, id)
		return wire.Session{}, m.unrecorded(a, err)
	}
	s, err := m.place(ctx, a, gateways, safe)
	if err != nil {
		m.free(ctx, id)
		m.tell(ctx, a.asked, wire.FrameEnd, wire.End{Session: id, Reason: reasonWithdrawn})
		return wire.Session{}, m.refused(ctx, a, err)
	}
	return s, nil
}

// admit is everything that decides whether the job may in; it changes nothing but a, whose log knows more about the job
// with every step.
func (m *Manager) admit(ctx context.Context, a *admission) error {
	if err := checkJoin(a.join); err != nil {
		return err
	}
	a.rules = m.Rules()
	c, err := a.rules.Verifier.VerifyIf(ctx, a.join.Token.Reveal(), wire.Audience(a.rules.Config.URL, a.join.Key), m.joins.look)
	if err != nil {
		return err
	}
	m.joins.charge(c)
	a.claims = c
	a.known = append(a.known, "repository", c.Repository, "run_id", c.RunID)
	if err := a.chooseNetwork(m.opts.Now()); err != nil {
		return err
	}
	a.known = append(a.known, "network", a.join.Network)
	a.decision = a.rules.Config.Policy.Evaluate(m.opts.Now(), a.join.Network, c)
	if !a.decision.Allowed {
		return denied(a.decision)
	}
	return nil
}

func checkJoin(j *Join) error {
	const next = "update the client; if it is up to date, report this"
	switch {
	case j.Key.IsZero():
		return problem.New(problem.BadRequest, "the request carries no public key", next)
	case j.Token == "":
		return problem.New(problem.BadRequest, "the request carries no token", next)
	case len(j.Network) > 63:
		return problem.New(problem.BadRequest, "the network's name is too long", "use the name from the coordinator's configuration")
	}
	if err := checkToken(j.Token); err != nil {
		return err
	}
	if err := checkRelays(j.Relays); err != nil {
		return err
	}
	return checkFound(j.Candidates, j.Mapping)
}

func checkToken(t wire.Secret) error {
	if len(t) > wire.MaxToken {
		return problem.New(problem.TooLarge, fmt.Sprintf("the token is larger than %d bytes", wire.MaxToken), "ask the issuer for fewer claims")
	}
	return nil
}

// checkFound bounds what a client has found out about its network.
func checkFound(list []wire.Candidate, m wire.Mapping) error {
	if !m.Valid() {
		return problem.New(problem.BadRequest, "the mapping is none that is known", "update the client; if it is up to date, report this")
	}
	if len(list) > wire.MaxCandidates {
		return problem.New(problem.TooLarge, fmt.Sprintf("more than %d candidates", wire.MaxCandidates), "update the client; if it is up to date, report this")
	}
	for _, c := range list {
		if !c.Addr.IsValid() || c.Addr.Port() == 0 || !c.Kind.Valid() {
			return problem.New(problem.BadRequest, "a candidate has no usable address, or is of no kind that a client may name", "update the client; if it is up to date, report this")
		}
	}
	return nil
}

// chooseNetwork fills in the one network where the job named none, and refuses one that does not exist. What networks
// there are is told only to jobs whose owner some rule pins.
func (a *admission) chooseNetwork(now time.Time) error {
	cfg := a.rules.Config
	names := cfg.NetworkNames()
	if a.join.Network == "" && len(names) == 1 {
		a.join.Network = names[0]
	}
	if n, ok := cfg.Networks[a.join.Network]; ok {
		a.network = n
		return nil
	}
	if !knownOwner(now, cfg, names, a.claims) {
		return denied(policy.Decision{})
	}
	message := fmt.Sprintf("there is no network %q", a.join.Network)
	if a.join.Network == "" {
		message = "there are several networks and the job names none"
	}
	return problem.New(problem.NoNetwork, message, "name one of "+strings.Join(names, ", "))
}

func knownOwner(now time.Time, cfg *config.Config, networks []string, c policy.Claims) bool {
	for _, n := range networks {
		if d := cfg.Policy.Evaluate(now, n, c); d.Allowed || d.Denial != nil {
			return true
		}
	}
	return false
}

// denied is policy's no: with the closest rule for a job whose owner is known, bare for a stranger.
func denied(d policy.Decision) error {
	e := problem.New(problem.Denied, "no rule lets this job in", "ask whoever runs the coordinator to add a rule for it")
	if d.Denial != nil {
		e.Denial = d.Denial
		e.Next = "compare the workflow with the rule; `culvert-coordinator explain` shows how a job is judged"
	}
	return e
}

// createLease gives the session a secret and addresses under a lease that lasts as long as the offers may take. Where this process is the
// only node, it knows by itself what it is offering, so there the lease is what the first gateway's yes would make of it.
func (m *Manager) createLease(ctx context.Context, a *admission, first state.Presence) error {
	now := m.opts.Now()
	secret, hash := newSecret()
	a.secret = secret
	pending := time.Duration(m.opts.MaxOffers)*m.opts.OfferTimeout + offerSlack
	room := pool(a.network)
	room.Hold = a.rules.Config.Lease // for the lease that a gateway's answer makes of this one
	l := state.Lease{
		Session:    a.join.Key.SessionID(),
		Network:    a.join.Network,
		Key:        a.join.Key,
		SecretHash: hash,
		Rules:      a.decision.Rules,
		Grants:     a.decision.Grants,
		Claims:     remember(a.claims, a.rules.Config),
		Issued:     a.claims.IssuedAt,
		Created:    now,
		Expires:    now.Add(pending),
		Ends:       endOf(now, a.decision),
	}
	if a.named = m.opts.Store.Sole(); a.named {
		l.Gateway, l.GatewayName, l.Expires = first.Instance, first.Name, m.deadline(a.rules.Config.Lease, l.Ends)
		room.Hold += pending // gateways count from their answers
	}
	l, err := m.opts.Store.CreateLease(ctx, l, room)
	switch {
	case errors.Is(err, state.ErrExists):
		return keyInUse(err)
	case errors.Is(err, state.ErrFull):
		return problem.Wrap(err, problem.NoAddress, fmt.Sprintf("every address of network %q is in use", a.join.Network),
			"wait for other jobs to end, or give the network a larger `sessions` range")
	case err != nil:
		return storeAway(err)
	}
	a.lease = l
	a.relays = pick(a.join.Relays, a.rules.Relays)
	a.tickets = m.tickets(a, relay.Client, a.lease.Key)
	return nil
}

func keyInUse(err error) error {
	return problem.Wrap(err, problem.KeyInUse, "this key already has a session", "join again with a new key and a new token")
}

// endOf is when a session that begins now has to be over: no rule that let it in lasts longer.
func endOf(now time.Time, d policy.Decision) time.Time {
	ends := now.Add(d.MaxSession)
	if !d.Until.IsZero() && d.Until.Before(ends) {
		return d.Until
	}
	return ends
}

// session is what the client is told, without gateways.
func (a *admission) session() wire.Session {
	return wire.Session{
		ID:        a.lease.Session,
		Network:   a.lease.Network,
		Secret:    a.secret,
		Addresses: a.lease.Addresses,
		Relays:    a.tickets,
		Rules:     a.lease.Rules,
		Lease:     wire.Duration(a.rules.Config.Lease),
		Expires:   a.lease.Expires,
		Ends:      a.lease.Ends,
		Standby:   a.several,
	}
}

// logRefusal writes down a decision against a job: what it was told, and what it was not.
func logRefusal(log *slog.Logger, msg string, err error) {
	p := problem.From(err)
	level := slog.LevelInfo
	if p.Code.Temporary() || p.Code == problem.Failed {
		level = slog.LevelWarn
	}
	attrs := []any{"code", p.Code, "err", p.Message}
	if d := p.Denial; d != nil {
		attrs = append(attrs, "rule", d.Rule, "claim", d.Claim, "expected", d.Expected, "got", d.Got)
	}
	if p.Err != nil {
		attrs = append(attrs, "cause", p.Err)
	}
	log.Log(context.Background(), level, msg, attrs...)
}
