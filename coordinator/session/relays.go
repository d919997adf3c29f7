package session

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/culvertnet/culvert/internal/problem"
	"github.com/culvertnet/culvert/internal/relay"
	"github.com/culvertnet/culvert/internal/wire"
)

// maxRelays is how many relays a session gets: as many as a peer uses. Both sides have tickets for all of them, so the client leads
// with the nearest also where it has found out late which one that is, and another carries on where it fails.
const maxRelays = 4

// maxRelayName bounds the name of a relay, in bytes; no configuration has a longer one.
const maxRelayName = 63

// checkRelays bounds a client's choice of relays. Whether there are such relays is not asked here.
func checkRelays(names []string) error {
	const next = "update the client; if it is up to date, report this"
	if len(names) > wire.MaxRelays {
		return problem.New(problem.TooLarge, fmt.Sprintf("more than %d relays", wire.MaxRelays), next)
	}
	for _, n := range names {
		if len(n) > maxRelayName {
			return problem.New(problem.BadRequest, "a relay's name is too long", next)
		}
	}
	return nil
}

// pick gives the relays of a session: the first that the client named, which it measured as nearest, of those that are
// listed, and where it named fewer, the first that are listed.
func pick(named []string, listed []wire.Relay) []wire.Relay {
	var out []wire.Relay
	add := func(r wire.Relay) {
		if len(out) < maxRelays && !slices.ContainsFunc(out, func(o wire.Relay) bool { return o.Name == r.Name }) {
			out = append(out, r)
		}
	}
	for _, n := range named {
		if i := slices.IndexFunc(listed, func(r wire.Relay) bool { return r.Name == n }); i >= 0 {
			add(listed[i])
		}
	}
	for _, r := range listed {
		add(r)
	}
	return out
}

// tickets lets one side of a session, which has this key, use the session's relays until the session's end. Those of its standby are
// for paths of their own.
func (m *Manager) tickets(a *admission, side relay.Side, key wire.Key) []wire.RelayGrant {
	if m.opts.TicketKey == nil || len(a.relays) == 0 {
		return nil
	}
	ticket, err := relay.Sign(m.opts.TicketKey, relay.Claims{
		Session: cmp.Or(a.way, a.lease.Session), Side: side, Key: key, Issued: m.opts.Now(), Expires: a.lease.Ends,
	})
	if err != nil { // the session may still find a path of its own
		a.log().Error("no relay ticket", "side", side, "err", err)
		return nil
	}
	out := make([]wire.RelayGrant, len(a.relays))
	for i, r := range a.relays {
		out[i] = wire.RelayGrant{Relay: r, Ticket: ticket, Expires: a.lease.Ends}
	}
	return out
}

// standingLife is how long a gateway may rely on a standing ticket. It is short because nothing takes one back.
const standingLife = 10 * time.Minute

// errNoTickets is what is given where nobody signs relay tickets.
var errNoTickets = errors.New("no key for relay tickets")

// Standing gives a gateway what it keeps WebSockets to relays ready with.
func (m *Manager) Standing(gateway wire.Key) (wire.Standing, error) {
	if m.opts.TicketKey == nil {
		return wire.Standing{}, errNoTickets
	}
	now := m.opts.Now()
	ticket, err := relay.SignStanding(m.opts.TicketKey, gateway, now, now.Add(standingLife))
	return wire.Standing{Ticket: ticket, Life: wire.Duration(standingLife)}, err
}
